"""Running a model over a user's batches, to look at it and not to train it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tokengate.errors import TokenGateError, brief
from tokengate.kernels.recomputation import trial
from tokengate.layers.padding import signature_of
from tokengate.names import inside
from tokengate.sharding import local_part

# A buffer of at most so many bytes may be what a forward counts or averages; larger ones, which are
# not copied, are quantised weights.
_SMALL = 2**16


@contextlib.contextmanager
def keeping_state(model: nn.Module, most: float = _SMALL) -> Iterator[None]:
    """After this context every module is in training or evaluation, and has the buffers, as before.

    But for buffers that no state_dict is to have: a cache goes with attributes that say what it is
    of.

    Args:
        model: whatever is run in it.
        most: bytes of the largest buffer to put back.
    """
    modes = {module: module.training for module in model.modules()}
    held = [
        (module, name, buffer, None if buffer is None else local_part(buffer).clone())
        for module in modes
        for name, buffer in module._buffers.items()
        if name not in module._non_persistent_buffers_set and _may_change(buffer, most)
    ]
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for module, name, buffer, value in held:
                module._buffers[name] = buffer  # a forward may have put another in its place
                if buffer is None or value is None:
                    continue
                own = local_part(buffer)
                # Not unless it has: some backward may wait for it. BatchNorm's have no version.
                if not torch.equal(_bytes(own), _bytes(value)):
                    own.copy_(value)


def _may_change(buffer: Tensor | None, most: float) -> bool:
    if buffer is None:  # as long as nothing was called
        return True
    own = local_part(buffer)
    plain = type(own) is Tensor and own.layout == torch.strided
    return plain and not (own.is_meta or own.is_quantized) and own.nbytes <= most


def _bytes(tensor: Tensor) -> Tensor:
    """Which are equal also where numbers are NaN, and of every dtype."""
    return tensor.resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)


@contextlib.contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """A trial: no gate counts what is computed in it, and random numbers then go on as before."""
    devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices), trial():
        yield


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within this context nothing is dropped and nothing kept for backward; then all is as was."""
    with keeping_state(model), torch.no_grad():
        model.eval()
        yield


def run(model: nn.Module, batch: Any) -> Any:
    """The model's output: of a dict by keyword, of a list or tuple by position, else of itself."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (list, tuple)):
        try:
            return model(*batch)
        except (TypeError, RuntimeError) as problem:
            # A kind of its own, as no memory, says what it is.
            if type(problem) in (TypeError, RuntimeError) and len(batch) > 1:
                problem.args = (f"{problem} ({_by_position(model, batch)})",)
            raise
    return model(batch)


def _by_position(model: nn.Module, batch: Sequence[Any]) -> str:
    return (
        f"tokengate called {type(model).__name__} with the {len(batch)} parts of a batch: where "
        "labels are among them that it does not take, pass its inputs alone, as in "
        "[x for x, y in loader], or a loss= of model and batch where there is one"
    )


def named(model: nn.Module, batch: Any) -> Mapping[str, Any]:
    """What `run` calls the model with, by the names of its forward's parameters."""
    if isinstance(batch, Mapping):
        return batch
    given = batch if isinstance(batch, (list, tuple)) else (batch,)
    return dict(zip(signature_of(inside(model)).names, given, strict=False))


def part_of(output: Any, name: str, otherwise: Any = None) -> Any:
    """What a model has returned by that name: of a dict its entry, else an attribute."""
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, otherwise)


def check_batches(asked: str, batches: Any) -> Iterator[Any]:
    """They, one by one; else an error, which names the function that was called.

    At once, if these cannot be iterated over; in the end, if there was none.
    """
    if not isinstance(batches, Iterable) or isinstance(batches, (str, bytes, Mapping, Tensor)):
        raise TokenGateError(
            f"{asked} was given {brief(batches)}: pass several batches, e.g. a DataLoader or a "
            "list of what the model is called with."
        )
    return _at_least_one(asked, batches)


def _at_least_one(asked: str, batches: Iterable[Any]) -> Iterator[Any]:
    count = 0
    for count, batch in enumerate(batches, 1):  # noqa: B007
        yield batch
    if not count:
        raise TokenGateError(
            f"{asked} was given no batches: pass at least one, and an iterator only once."
        )
