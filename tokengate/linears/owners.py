"""Owners that read a layer's weight themselves: their code says so before anything is run."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from tokengate.linears.class_swap import Swapped

# Where both happen in one class, what decides. By the classes' names, because importing their
# libraries would cost what most users do not use; found by running them.
_DEPENDS = {
    "timm.models.beit.Attention": "qkv",
    "timm.models.eva.EvaAttention": "qkv",
    "timm.models.swin_transformer_v2.WindowAttention": "qkv",
    "transformers.models.falcon_mamba.modeling_falcon_mamba.FalconMambaMixer": "dt_proj",
    "transformers.models.jamba.modeling_jamba.JambaMambaMixer": "dt_proj",
    "transformers.models.bloom.modeling_bloom.BloomAttention": "dense",
    "transformers.models.bloom.modeling_bloom.BloomMLP": "dense_4h_to_h",
}

_LIBRARIES = ("torch.", "torchao.", "bitsandbytes.", "deepspeed.", "peft.")


def reads_weight(owner: nn.Module, attribute: str) -> bool:
    """Whether `owner` computes with `owner.attribute.weight` and does not call the layer.

    Reading the weight proves nothing (T5 reads `wo.weight` for its dtype and then calls `wo`), so
    the class must read it and contain no call. What it does in other ways is seen when it runs.
    """
    if isinstance(owner, nn.MultiheadAttention):
        # A class of attention may say that it calls its projections.
        return attribute == "out_proj" and not getattr(owner, "calls_projections", False)
    kind = f"{type(owner).__module__}.{type(owner).__qualname__}"
    if _DEPENDS.get(kind) == attribute:
        return _decided(owner)
    source = _source(type(owner))  # type: ignore[arg-type]
    name = re.escape(attribute)
    # .weight.dtype, .weight.device and the like ask about the weight and do not compute with it.
    reads = re.search(
        rf"self\.{name}\.weight\b(?!\.(dtype|device|shape|size|data|requires))", source
    )
    return reads is not None and re.search(rf"self\.{name}\(", source) is None


def returns_tuple(kind: type[nn.Module]) -> bool:
    """Whether the class's own `forward` returns several values, as routers of experts do."""
    return _returns_tuple(kind.forward)


# A model has hundreds of linear layers, of one class or two.
@functools.cache
def _returns_tuple(forward: Callable[..., Any]) -> bool:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return any(isinstance(value, ast.Tuple) for value in returned)


def gives_other_shape(layer: Any) -> bool:
    """Whether a linear class of another's gives no `(..., out_features)`: it is called to see.

    As DeepSeek-V4's, which multiplies groups of heads apart. Those of libraries that quantise or
    divide weights are left alone, and what wants more than x cannot be asked.
    """
    kind = type(layer)
    if kind.forward is nn.Linear.forward or kind.__module__.startswith(_LIBRARIES):
        return False
    if not isinstance(layer, nn.Linear) or isinstance(layer, Swapped) or is_lazy(layer.weight):
        return False
    shape = (2, 8)
    x = layer.weight.new_zeros(*shape, layer.in_features)
    try:
        with torch.no_grad():
            out = kind.forward(layer, x)
    except TypeError:
        return False
    except RuntimeError:
        return True
    return not isinstance(out, torch.Tensor) or out.shape != (*shape, layer.out_features)


def _decided(owner: Any) -> bool:
    if hasattr(owner, "q_bias"):  # timm concatenates the biases of q and v with zeros for k
        return owner.q_bias is not None and not getattr(owner, "qkv_bias_separate", False)
    if hasattr(owner, "pretraining_tp"):
        return bool(owner.pretraining_tp > 1 and owner.slow_but_exact)
    return True


@functools.cache
def _source(kind: type) -> str:
    """The methods of a class and those it inherits, apart from torch's and from initialisation."""
    methods = []
    for cls in kind.__mro__:
        if cls.__module__.startswith("torch.nn.modules.module") or cls is object:
            continue
        for name, value in vars(cls).items():
            function = inspect.unwrap(value) if callable(value) else None
            if inspect.isfunction(function) and "init" not in name and "reset" not in name:
                try:
                    methods.append(inspect.getsource(function))
                except (OSError, TypeError):
                    continue
    return "\n".join(methods)
