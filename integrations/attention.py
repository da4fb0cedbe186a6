"""Make `torch.nn.MultiheadAttention` call its projections, so that they can be patched.

`nn.MultiheadAttention` (torch's own transformers, torchvision's ViT, open_clip's native towers and
poolers, SigLIP's pooling head) holds q, k and v as parameters and reads `out_proj.weight` itself:
a patch there would never run. `split_attention` gives it linear layers that it calls:

    tokengate.patch(split_attention(model), ["q_proj", "v_proj"])

As `patch` does, it changes classes and wraps nothing. The parameters stay what and where they
were: `q_proj.weight` is a view of the rows of `in_proj_weight`, made anew at every use. So a split
copies no memory and changes no key of the `state_dict`; what reads, casts, moves, loads, freezes or
shards `in_proj_weight` works as ever; and what writes into `q_proj.weight` in place writes there.
A copy and a pickle of the model, or of an attention, are split too.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tokengate
from tokengate import TokenGateError
from tokengate.layers.folded import folded
from tokengate.linears.class_swap import Swapped, swap, swap_back
from tokengate.names import check_module, named_modules
from tokengate.patterns import as_patterns, matches, nearest, show

_Model = TypeVar("_Model", bound=nn.Module)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")
# On an nn.TransformerEncoder whose nested tensors are off for as long as it is split.
_NESTED_BEFORE = "_tokengate_used_nested_tensor"


def split_attention(model: _Model, targets: Any = None) -> _Model:
    """Give every `nn.MultiheadAttention` in `model` the layers q_proj, k_proj, v_proj, in place.

    They and `out_proj` are then called, with inputs `(B, T, features)` whatever `batch_first`
    says, and the fast paths of torch that would bypass them are not taken. This goes for
    `linear1` and `linear2` of an `nn.TransformerEncoderLayer`, too. Outputs stay the same up to
    rounding, except that an `nn.TransformerEncoder` no longer writes zeros at padded positions:
    its own fast path does, its ordinary one does not. `nn.DataParallel` does not work with it.

    Args:
        model: any module. Split it before patching its attention.
        targets: which attentions: names, dotted suffixes, globs or compiled regular expressions,
            as in `tokengate.patch`; None for all. Give the whole model rather than a part of it:
            an `nn.TransformerEncoder` outside of the part may pass nested tensors, which a split
            attention refuses.

    Returns:
        The same model object.

    Raises:
        TokenGateError: there is no such attention, or one that cannot be split; nothing was
            changed.
    """
    chosen = _find(model, targets)
    for name, attention in chosen.items():
        refusal = _refusal(attention)
        if refusal is not None:
            raise TokenGateError(f"split_attention was asked to split {name!r}, {refusal}.")
    for attention in chosen.values():
        swap(attention, SplitAttention)
        for name in _PROJECTIONS:
            attention.add_module(name, Projection(attention, name))
    for encoder in model.modules():
        if (
            isinstance(encoder, nn.TransformerEncoder)
            and getattr(encoder, "use_nested_tensor", False)
            and any(isinstance(module, SplitAttention) for module in encoder.modules())
        ):
            encoder.use_nested_tensor = False
            encoder.__dict__[_NESTED_BEFORE] = True
    return model


def merge_attention(model: _Model) -> _Model:
    """Take back what `split_attention` did: the same objects, classes, values and keys.

    Args:
        model: what was split, or what contains it. Unpatch it first.

    Returns:
        The same model object.

    Raises:
        TokenGateError: nothing in it is split, or a layer that would no longer be called is still
            patched or folded. Nothing was changed.
    """
    check_module("merge_attention", model)
    split = [m for m in model.modules() if isinstance(m, SplitAttention)]
    encoders = [m for m in model.modules() if _NESTED_BEFORE in m.__dict__]
    if not split and not encoders:
        raise TokenGateError(
            f"merge_attention was asked of a {type(model).__name__} without a split attention: "
            "call split_attention(model) first, and pass that model."
        )
    owners = (*split, *(m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer)))
    called = {module for owner in owners for module in owner.modules()}
    for name, layer in tokengate.layers(model).items():
        if layer in called:
            raise TokenGateError(
                f"merge_attention was called while {name!r} is patched, which would then never be "
                "called: call tokengate.unpatch(model) first."
            )
    for name, each in folded(model).items():
        if each.layer in called:
            raise TokenGateError(
                f"merge_attention was called while {name!r} is folded, which could then not be "
                "undone: call the folding's undo() or tokengate.unpatch(model) first."
            )
    for attention in split:
        for name in _PROJECTIONS:
            delattr(attention, name)
        swap_back(attention)
    for encoder in encoders:
        encoder.use_nested_tensor = encoder.__dict__.pop(_NESTED_BEFORE)
    return model


class Projection(nn.Linear):
    """`q_proj`, `k_proj` or `v_proj`: `(..., in_features) -> (..., embed_dim)`.

    It has no parameters of its own: `weight` and `bias` are those of its attention.
    """

    # What hooks that offload `weight` are on; `tokengate.patch` asks for it.
    weight_holder: nn.MultiheadAttention

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        super(nn.Linear, self).__init__()  # nn.Linear's own would make parameters
        # Past nn.Module, which would make the attention a child of its child.
        object.__setattr__(self, "weight_holder", attention)
        self.training = attention.training
        widths = (attention.embed_dim, attention.kdim, attention.vdim)
        self._part = _PROJECTIONS.index(name)
        self.in_features = widths[self._part]
        self.out_features = attention.embed_dim

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """`(embed_dim, in_features)`."""
        if self.weight_holder.in_proj_weight is not None:
            return self._own_rows(self.weight_holder.in_proj_weight)
        separate: Tensor = getattr(self.weight_holder, f"{_PROJECTIONS[self._part]}_weight")
        return separate

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """`(embed_dim,)`, or None."""
        packed = self.weight_holder.in_proj_bias
        return None if packed is None else self._own_rows(packed)

    def _own_rows(self, packed: Tensor) -> Tensor:
        start = self._part * self.out_features
        return packed[start : start + self.out_features]


class SplitAttention(Swapped, nn.MultiheadAttention):
    """`nn.MultiheadAttention` as the composition of four linear layers that are called.

    Never constructed: `split_attention` gives an existing attention this class and three children.
    """

    # What `tokengate.patch` asks the owner of `out_proj`.
    calls_projections: ClassVar[bool] = True
    _own_class: ClassVar[type[nn.Module]] = nn.MultiheadAttention

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear

    @property
    def _qkv_same_embed_dim(self) -> bool:
        # The one attribute by which nn.TransformerEncoderLayer can be kept off its fast path, which
        # reads our weights. The instance's own value is hidden, and there again after a merge.
        return False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention.forward`.

        Args:
            query: `(B, L, embed_dim)`, `(L, B, embed_dim)` without `batch_first`, or
                `(L, embed_dim)`.
            key: as `query`, with S and kdim for L and embed_dim.
            value: as `query`, with S and vdim for L and embed_dim.
            key_padding_mask: `(B, S)` or `(S,)`; True is left out, or to be added to the scores.
            need_weights: whether to return the attention's weights.
            attn_mask: `(L, S)` or `(B * num_heads, L, S)`, as `key_padding_mask`.
            average_attn_weights: whether to return the mean of the weights over the heads.
            is_causal: a hint that `attn_mask` is the causal mask.

        Returns:
            The output, in the shape of `query`; and None or the weights, `(B, L, S)` or
            `(B, num_heads, L, S)`, without B where `query` is without it.
        """
        batched = query.dim() == 3
        if not batched:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        _check_inputs(query, key, value, is_causal and attn_mask is None)

        q = self._heads(self.q_proj(query))
        k, v = self.k_proj(key), self.v_proj(value)
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat((x, bias.to(x.dtype).expand(len(x), 1, -1)), dim=1)
                for x, bias in ((k, self.bias_k), (v, self.bias_v))
            )
        if self.add_zero_attn:
            k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        k, v = self._heads(k), self._heads(v)

        # The hint lets scaled_dot_product_attention do without a mask, where there is no other.
        hinted = is_causal and key_padding_mask is None and not need_weights
        B, H, L, S = query.shape[0], self.num_heads, query.shape[1], key.shape[1]
        added = None
        views: dict[tuple[int, ...], tuple[int, ...]]  # the shapes a mask may have, and as what
        if attn_mask is not None and not hinted:
            views = {(L, S): (1, 1, L, S), (B * H, L, S): (B, H, L, S)}
            added = _additive("attn_mask", attn_mask, views, q.dtype)
        if key_padding_mask is not None:
            views = {(B, S): (B, 1, 1, S)}
            padding = _additive("key_padding_mask", key_padding_mask, views, q.dtype)
            added = padding if added is None else added + padding
        if added is not None:
            added = F.pad(added, (0, k.shape[2] - S))  # what was added to k is never masked

        weights = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            weights = torch.softmax(scores if added is None else scores + added, dim=-1)
            # Before they are returned, as in torch.
            weights = F.dropout(weights, self.dropout, self.training)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            dropout = self.dropout if self.training else 0.0
            heads = F.scaled_dot_product_attention(q, k, v, added, dropout, hinted)

        out: Tensor = self.out_proj(heads.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """`(B, T, embed_dim) -> (B, num_heads, T, head_dim)`."""
        return x.view(*x.shape[:2], self.num_heads, self.head_dim).transpose(1, 2)


def _check_inputs(query: Tensor, key: Tensor, value: Tensor, causal_without_mask: bool) -> None:
    if query.is_nested or key.is_nested or value.is_nested:
        raise TokenGateError(
            "a split attention was given a nested tensor: give split_attention the whole model, or "
            "build its nn.TransformerEncoder with enable_nested_tensor=False."
        )
    # Without this, one sample would be broadcast to many.
    if not (len(query) == len(key) == len(value) and key.shape[1] == value.shape[1]):
        shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
        raise TokenGateError(
            f"a split attention was given query, key and value of the shapes {shapes} (batch "
            "first): pass as many samples in each, and as many values as keys."
        )
    if causal_without_mask:
        raise TokenGateError(
            "a split attention was given is_causal=True without an attn_mask: pass the causal mask "
            "too, as nn.MultiheadAttention demands."
        )


def _additive(
    name: str, mask: Tensor, views: dict[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype
) -> Tensor:
    """The mask as what is added to the scores, `(B or 1, num_heads or 1, L or 1, S)`."""
    shape, is_bool = tuple(mask.shape), mask.dtype == torch.bool
    if shape not in views or not (is_bool or mask.is_floating_point()):
        raise TokenGateError(
            f"{name} has the shape {shape} and the type {mask.dtype}: pass booleans or "
            f"floating-point numbers of the shape {' or '.join(map(str, views))}."
        )
    mask = mask.view(views[shape])
    if is_bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)


def _find(model: nn.Module, targets: Any) -> dict[str, nn.MultiheadAttention]:
    """The attentions that `targets` means, by their first names."""
    check_module("split_attention", model)
    kind = type(model).__name__
    # All names of a shared attention count, as in `tokengate.patch`.
    named = {
        name: module
        for name, module in named_modules(model, remove_duplicate=False)
        if isinstance(module, nn.MultiheadAttention)
    }
    if not named:
        raise TokenGateError(
            f"split_attention was asked of a {kind}, which has no nn.MultiheadAttention: its "
            "linear layers, if it has any, can be patched as they are."
        )
    hits = set(named.values())
    if targets is not None:
        hits = set()
        for pattern in as_patterns("targets", targets):
            found = {module for name, module in named.items() if matches(pattern, name)}
            if not found:
                raise TokenGateError(
                    f"target {show(pattern)} matches no nn.MultiheadAttention of this {kind}; "
                    f"{nearest(pattern, named)}."
                )
            hits |= found
    return {n: m for n, m in named_modules(model) if m in hits and n in named}


def _refusal(attention: nn.MultiheadAttention) -> str | None:
    """Why `attention` cannot be split, as the end of a sentence; None if it can."""
    kind = type(attention).__name__
    if isinstance(attention, SplitAttention):
        return "which is split already: call merge_attention(model) first, or name others"
    if type(attention).forward is not nn.MultiheadAttention.forward:
        return f"a {kind} with a forward of its own, which would be lost: name others in targets="
    if "forward" in attention.__dict__:
        return (
            f"a {kind} whose forward was replaced on the instance, so that a split would never "
            "run: split first, then dispatch or hook the model, or name others in targets="
        )
    return None
