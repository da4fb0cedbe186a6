"""What learns, by what rule: parameter groups, tau's Adam, led thresholds, AdaLoRA's budget.

May import `patching`, `layers` and below. Open `param_groups.py` first, then `tau_adam.py`
and `following.py`.
"""

from tokengate.training import leading as leading  # which watches optimisers
from tokengate.training import other_rules as other_rules  # likewise
from tokengate.training.checks import left_out as left_out  # likewise
