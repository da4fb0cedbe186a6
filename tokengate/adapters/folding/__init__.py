"""An adapter as its model's own weights: folded until that is undone, or for good.

Part of `tokengate.adapters`, which it may import.
"""

from tokengate.adapters.folding.folding import Folding as Folding
from tokengate.adapters.folding.folding import fold as fold
