"""What decides at which positions a change is applied, how that learns, and how it is counted.

May import `kernels` and below; knows nothing of methods or layers. Open `threshold.py` first: the
paper's equations 4, 14, 15 and 17 stand there.
"""

from tokengate.gates.threshold import TokenGate as TokenGate
from tokengate.gates.threshold import token_gate as token_gate
