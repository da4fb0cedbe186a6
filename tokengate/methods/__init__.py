"""The modifications M of eq. 1, one file each beside what they share; importing registers them.

May import `gates`, `kernels`, `linears` and below; knows nothing of layers. Open `lora.py` first,
then `base.py` for a method of your own.
"""

from tokengate.methods.adalora import AdaLoRA as AdaLoRA
from tokengate.methods.adapter import Adapter as Adapter
from tokengate.methods.base import Modification as Modification
from tokengate.methods.dora import DoRA as DoRA
from tokengate.methods.lora import LoRA as LoRA
from tokengate.methods.registry import register as register
