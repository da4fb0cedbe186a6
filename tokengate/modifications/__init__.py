"""The modifications M of eq. 1, one file each beside what they share; importing registers them."""

from tokengate.modifications.adalora import AdaLoRA as AdaLoRA
from tokengate.modifications.adapter import Adapter as Adapter
from tokengate.modifications.base import Modification as Modification
from tokengate.modifications.dora import DoRA as DoRA
from tokengate.modifications.lora import LoRA as LoRA
from tokengate.modifications.registry import register as register
