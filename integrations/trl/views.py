"""A patched model as its own reference: the base model, or another of its adapters."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tokengate
from tokengate import TokenGateError
from tokengate.errors import brief
from tokengate.layers.batches import keeping_state
from tokengate.layers.calls import unobserved
from tokengate.layers.named_adapters import names_of
from tokengate.layers.patched import all_layers, own_parameters
from tokengate.linears.linear_like import is_linear
from tokengate.names import named_parameters


class Reference(nn.Module):
    """A view of a patched model, or of a module in it, that runs it as a reference.

    Whatever is called by way of it, itself, a method or a module inside, runs without gradients,
    without dropout, uncounted, and as the base model or with the view's adapter. It has no
    parameters and no children, so that what is done to it, as to be frozen, moved or sharded, or
    given another `forward`, is not done to the model.
    """

    # Accelerate prepares it by itself, whether the model is prepared or not.
    _is_accelerate_prepared = False

    def __init__(self, model: nn.Module, adapter: str | None, seen: nn.Module) -> None:
        super().__init__()
        # Past nn.Module, which would make children of them.
        vars(self).update(_model=model, _adapter=adapter, _seen=seen)
        self.eval()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What its module returns."""
        # Not in `forward` alone, which others replace.
        with self._in_its_place():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What its module returns."""
        with self._in_its_place():
            return self._seen(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if "_seen" not in vars(self):  # while it is copied
            raise AttributeError(name)
        return self._as_mine(getattr(self._seen, name))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, (nn.Module, nn.Parameter)):
            raise TokenGateError(
                f"{name!r} of a reference was to be a {type(value).__name__}, and a view has none "
                "of its own: change the model, or make the trainer another reference."
            )
        super().__setattr__(name, value)

    # Python looks these up past __getattr__.
    def __getitem__(self, key: Any) -> Any:
        return self._as_mine(self._seen[key])

    def __iter__(self) -> Iterator[Any]:
        return map(self._as_mine, self._seen)

    def __len__(self) -> int:
        return len(self._seen)

    def __bool__(self) -> bool:
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> Reference:
        model, seen = (memo.get(id(each), each) for each in (self._model, self._seen))
        return Reference(model, self._adapter, seen)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The model's, and the adapter's name: by its hash TRL knows whose answers it kept."""
        name = "" if self._adapter is None else self._adapter
        own: Tensor = torch.tensor(list(name.encode()), dtype=torch.uint8)
        return {**self._seen.state_dict(*args, **kwargs), "reference": own}

    @contextlib.contextmanager
    def _in_its_place(self) -> Iterator[None]:
        model, adapter = self._model, self._adapter
        with (
            torch.no_grad(),
            keeping_state(model, most=0),  # at every step: none is compared
            unobserved(),
            tokengate.disabled(model) if adapter is None else tokengate.use(model, adapter),
        ):
            for module in model.modules():
                # Linear layers drop nothing; bitsandbytes' pack their weight for good.
                if not is_linear(module):
                    module.training = False
            yield

    def _as_mine(self, found: Any) -> Any:
        if isinstance(found, nn.Module):
            return Reference(self._model, self._adapter, found)
        if inspect.ismethod(found) or inspect.isfunction(found):
            return self._in_place(found)
        return found

    def _in_place(self, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            with self._in_its_place():
                return self._as_mine(method(*args, **kwargs))

        return run


def reference(model: nn.Module, adapter: str | None = None) -> Reference:
    """A view of `model` that answers as its reference does: no second model is held for it.

        trainer = DPOTrainer(model, ref_model=reference(model), ...)        # against the base model

        tokengate.load(model, "sft")                                 # goes on from here,
        tokengate.load(model, "sft", name="before")                  # and is compared with this
        trainer = DPOTrainer(model, ref_model=reference(model, "before"), ...)

    TRL's other trainers that take a `ref_model` take it, too; where one makes its own, as GRPO
    does, see `gated`, or set `trainer.ref_model`.

    Args:
        model: a patched model, which may be quantised.
        adapter: the name of another of its adapters than the one in use; None for the base model.

    Raises:
        TokenGateError: no layer is patched; there is no such adapter, or it is the one in use,
            which is trained; or something outside of the adapters is, which the reference would
            follow.
    """
    patched = all_layers(model)
    if not patched:
        raise TokenGateError(
            f"reference was asked of a {type(model).__name__} without a patched layer: call "
            "tokengate.patch or tokengate.load first."
        )
    known = names_of(patched.values())
    if adapter is not None and adapter not in known:
        raise TokenGateError(
            f"reference was given {brief(adapter)}, and the model's adapters are "
            f"{', '.join(map(repr, known))}: pass one of these, or None for the base model."
        )
    if adapter is not None and any(layer.in_use() == adapter for layer in patched.values()):
        raise TokenGateError(
            f"reference was given {brief(adapter)}, which is in use and so is what is trained: "
            'load what it is to be compared with beside it, with tokengate.load(..., name="before")'
            ", and pass that name."
        )
    own = own_parameters(patched.values())
    for name, parameter in named_parameters(model):
        if parameter.requires_grad and id(parameter) not in own:
            raise TokenGateError(
                f"reference was asked of a model that trains {name!r} beside its adapters, which "
                "the reference would follow: patch without train=, or give the trainer another "
                "model as its reference."
            )
    return Reference(model, adapter, model)
