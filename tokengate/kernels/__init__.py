"""The arithmetic on tensors alone: norms of positions, products, sums of output and gated change.

May import the root's modules and nothing else: no gate, method or layer. Open `norms.py`, then
`factors.py`.
"""

from tokengate.kernels.factors import Factors as Factors
from tokengate.kernels.norms import Norms as Norms
from tokengate.kernels.precision import KeepsFloat32 as KeepsFloat32
from tokengate.kernels.recomputation import MaskMemory as MaskMemory
