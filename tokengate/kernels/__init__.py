"""The arithmetic on tensors alone: norms of positions, products, sums of output and gated change.

May import the root's modules and nothing else: no gate, method or layer. Open `change.py` first,
then `factors.py` and `norms.py`.
"""

from tokengate.kernels.factors import Factors as Factors
