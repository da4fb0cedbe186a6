"""The kernels' arithmetic where a GPU does it: few launches, no host that waits, nothing kept.

Imported by `kernels/fused.py` alone, and only where there is a GPU. Every function here is also an
operation, `torch.ops.tokengate.<name>`; open `sizes.py` first.
"""

from tokengate.kernels.triton.dropping import add_thinned_ as add_thinned_
from tokengate.kernels.triton.dropping import thin as thin
from tokengate.kernels.triton.learning import direct as direct
from tokengate.kernels.triton.learning import pass_gain as pass_gain
from tokengate.kernels.triton.learning import weigh as weigh
from tokengate.kernels.triton.rows import measure_rows as measure_rows
from tokengate.kernels.triton.rows import scale_rows as scale_rows
from tokengate.kernels.triton.rows import unscale_rows as unscale_rows
from tokengate.kernels.triton.scaling import scale_down as scale_down
from tokengate.kernels.triton.scaling import scale_up as scale_up
from tokengate.kernels.triton.sizes import decide as decide
from tokengate.kernels.triton.sizes import finish as finish
from tokengate.kernels.triton.sizes import measure as measure
from tokengate.kernels.triton.summing import gated_sum as gated_sum
from tokengate.kernels.triton.summing import gated_sum_ as gated_sum_
