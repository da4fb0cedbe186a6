"""The modifications M of eq. 1, one file each; importing this package registers them."""

from tokengate.modifications.base import Modification as Modification
from tokengate.modifications.lora import LoRA as LoRA
from tokengate.modifications.registry import register as register
