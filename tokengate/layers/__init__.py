"""What a linear layer becomes: gated, sliced, folded, of several adapters; how masks reach it.

May import `methods`, `gates`, `kernels`, `linears` and below. Open `gated_linear.py` first.
`tokengate.layers` as an attribute is the function of that name: import from here by `from`.
"""

from tokengate.layers.gated_linear import GatedLinear as GatedLinear
