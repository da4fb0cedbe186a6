"""What learns, by what rule: parameter groups, tau's Adam, lambda's controller, AdaLoRA's budget.

May import `patching`, `layers` and below. Open `param_groups.py` first, then `tau_adam.py`.
"""

from tokengate.training.rank_allocator import RankAllocator as RankAllocator
from tokengate.training.sparsity_controller import SparsityController as SparsityController
from tokengate.training.tau_adam import TauAdam as TauAdam
