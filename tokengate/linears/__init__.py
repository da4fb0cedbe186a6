"""What can be patched: linear-like layers, slices of fused ones, quantised ones; and what cannot.

May import `files` and the root's modules; knows nothing of gates or methods. Open `linear_like.py`
first.
"""

from tokengate.linears.class_swap import Swapped as Swapped
from tokengate.linears.linear_like import LinearLike as LinearLike
from tokengate.linears.linear_like import LinearSlice as LinearSlice
from tokengate.linears.linear_like import is_linear as is_linear
from tokengate.linears.slices import Slices as Slices
