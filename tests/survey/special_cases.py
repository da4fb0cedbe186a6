"""What cannot be guessed of an architecture of transformers: fields of its configuration, inputs.

By model type. `fields` is given to the configuration's class beside what was shrunk, `inputs` makes
the keyword arguments of forward, and `unbuilt` says why none can be built here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Special:
    fields: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], dict[str, Any]] | None = None
    unbuilt: str = ""


SPECIAL = {
    "bark": Special(unbuilt="the model has no forward, its parts have"),
    "dinat": Special(unbuilt="needs natten, which is not installed"),
    "dots1": Special({"n_shared_experts": 1}),
    "esm": Special({"vocab_size": 33, "mask_token_id": 32, "pad_token_id": 1}),
    "gpt_neo": Special({"attention_types": [[["global", "local"], 1]]}),
    "autoformer": Special(unbuilt="takes series of several inputs"),
    "reformer": Special({"axial_pos_shape": [3, 3]}),
    "edgetam_video": Special(unbuilt="takes a session of video inference"),
    "sam2_video": Special(unbuilt="takes a session of video inference"),
}
