"""What a Trainer's constructor asks of a quantised model: that adapters are attached to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import tokengate

# What transformers asks a quantised model for. Left there, `save_pretrained` would look for PEFT's.
_FLAG = "_hf_peft_config_loaded"


@contextlib.contextmanager
def attached(model: Any) -> Iterator[None]:
    """Make a Trainer of any class for a patched model, quantised or not, within this context:

        with attached(model):
            trainer = SFTTrainer(model, args, train_dataset=data, callbacks=[TokenGateCallback()])

    Here transformers is told that adapters are attached, without which it trains no quantised
    model; and what is trained is afterwards what it was, to the bit, on the device where it is by
    then: TRL's trainers round it to bfloat16. Models that are not quantised, or not patched, are
    left alone. `TokenGateTrainer` does this by itself.

    Args:
        model: what the Trainer is given.
    """
    if not (getattr(model, "is_quantized", False) and tokengate.layers(model)):
        yield
        return
    trained = {p: p.data for p in model.parameters() if p.requires_grad}
    before = {key: value for key, value in vars(model).items() if key == _FLAG}
    vars(model)[_FLAG] = True
    try:
        yield
    finally:
        del vars(model)[_FLAG]
        vars(model).update(before)
        for parameter, data in trained.items():
            if parameter.shape == data.shape and parameter.data_ptr() != data.data_ptr():
                parameter.data = data.to(parameter.device)
