"""What decides at which positions a change is applied, how that learns, and how it is counted.

May import `kernels` and below; knows nothing of methods or layers. Open `threshold.py` first: the
paper's equations 4, 14, 15 and 17 stand there; then `base.py` for a gate of your own.
"""

from tokengate.gates import skipped_gradients as skipped_gradients  # which watches optimisers
from tokengate.gates.base import Gate as Gate
from tokengate.gates.firm import FirmGate as FirmGate
from tokengate.gates.fisher import FisherGate as FisherGate
from tokengate.gates.positions import Positions as Positions
from tokengate.gates.random import RandomGate as RandomGate
from tokengate.gates.registry import register_gate as register_gate
from tokengate.gates.sigmoid import SigmoidGate as SigmoidGate
from tokengate.gates.threshold import TokenGate as TokenGate
from tokengate.gates.threshold import token_gate as token_gate
