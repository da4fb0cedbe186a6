"""Who leads thresholds while training goes on, and what is said where they go wrong.

Open `sparsity_schedule.py` first.
"""

from tokengate.training.leading import dead_or_open as dead_or_open  # which watches optimisers
from tokengate.training.leading import pace as pace  # likewise
