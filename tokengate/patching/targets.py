"""From `targets=` to the linear layers that will be patched."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, TypeAlias, cast

from torch import nn

from tokengate.arguments import spelled
from tokengate.errors import TokenGateError
from tokengate.layers.batches import keeping_state
from tokengate.layers.experts.owner import patched_projections
from tokengate.layers.gated_linear import Gated
from tokengate.layers.sliced_linear import Sliced
from tokengate.linears.accelerate_hooks import hides_class, offloaded_whole
from tokengate.linears.convolution import computes_otherwise, is_convolution
from tokengate.linears.experts import StackedLinear, stacked_expert, unpatchable
from tokengate.linears.linear_like import LinearLike, LinearSlice, is_linear, is_linear_like, whole
from tokengate.linears.owners import gives_other_shape, reads_weight, returns_tuple
from tokengate.linears.quantised import blocks_gradients
from tokengate.names import named_children
from tokengate.patching.peft_adapters import parts_of_adapters
from tokengate.patching.skipped_modules import (
    is_target,
    only_layer,
    skipped,
    warn_of_skipped,
    why_not,
)
from tokengate.patching.slice_targets import (
    check_slices,
    matched,
    unknown_slice,
    with_slices,
    without_parts_of_wholes,
)
from tokengate.patching.stack_targets import Single, Singles
from tokengate.patterns import (
    FullName,
    Pattern,
    as_patterns,
    is_literal,
    is_one_word,
    nearest,
    show,
)

Targets: TypeAlias = str | Pattern | Collection[Pattern] | Callable[[str, nn.Module], bool]

ALL_LINEAR = "all-linear"


def find_targets(
    model: nn.Module, targets: Any, exclude: Any = None, slices: Any = None, experts: Any = None
) -> dict[str, LinearLike]:
    """The layers that `targets` means, without those that `exclude` means, by name.

    A layer that is shared is listed once, under its first name.

    Args:
        model: the model.
        targets: as in `patch`.
        exclude: as in `patch`.
        slices: the user's own `Slices` of fused layers, by pattern.
        experts: the axes of the user's own stacked parameters, by pattern.

    Raises:
        TokenGateError: a pattern matches nothing, or nothing that can be patched; a layer is
            patched already.
    """
    with keeping_state(model):  # some layers are called, to see what they give
        names = _Names(model, slices, experts)
    if not callable(targets):
        targets = as_patterns("targets", targets)
    excluded: set[nn.Module] = set()
    if exclude is not None:
        hits = excluded.union(*names.matches("exclude", exclude).values())
        # A name that is excluded means all that is inside it; a callable is asked for each.
        excluded = hits if callable(exclude) else {m for hit in hits for m in hit.modules()}
    names.check_experts(targets, excluded)
    chosen: set[nn.Module] = set()
    literal = {show(p) for p in targets if is_literal(p)} if isinstance(targets, list) else set()
    beside: dict[str, set[nn.Module]] = {}
    entered: dict[nn.Module, nn.Module] = {}
    for label, found in names.matches("targets", targets).items():
        left = {m for m in found if excluded.isdisjoint(_and_around(m))}
        # A module around one layer stands for that, unless the layer is meant anyway.
        around = {m: layer for m in left if (layer := only_layer(m)) and layer not in found}
        entered |= {m: layer for m, layer in around.items() if layer not in excluded}
        left = (left - around.keys()) | {each for each in around.values() if each not in excluded}
        wanted = sorted(left, key=lambda module: names.first[module])
        if not wanted:
            raise TokenGateError(
                f"target {label} matches only what exclude= leaves out: drop one of the two."
            )
        # Other modules may share a linear layer's name; without one, each of them is a mistake.
        linear = [m for m in wanted if is_target(m)]
        for module in linear or wanted:
            refusal = names.refusal(module)
            if refusal is not None:
                raise TokenGateError(f"target {label} matches {names.first[module]!r}, {refusal}.")
        chosen |= set(linear)
        beside[label] = skipped(left, label in literal)
    chosen = names.singles.settled(chosen, excluded)
    check_slices(chosen, excluded, names.first, slices)
    warn_of_skipped(entered, beside, names.first)
    # In the model's order, so that a seed gives the same initial values however one asks.
    return {n: cast(LinearLike, m) for m, n in names.first.items() if m in chosen}


def all_linear_or(targets: Targets) -> Targets:
    """`targets`, but "all-linear" for whatever it was spelled like, alone in a list, too."""
    alone = targets[0] if isinstance(targets, list) and len(targets) == 1 else targets
    return spelled(alone, [ALL_LINEAR]) or targets


class _Names:
    """The modules of a model by name, and what is known of each as a target."""

    def __init__(self, model: nn.Module, slices: Any, experts: Any) -> None:
        self.model = model
        # All names of a shared module count for matching; the first one is its name.
        self.named = with_slices(model, slices, experts)
        self.stacks = [(n, m) for n, m in self.named if isinstance(m, StackedLinear)]
        self.first: dict[nn.Module, str] = {}
        self.by_name: dict[str, list[tuple[str, nn.Module]]] = {}
        for name, module in self.named:
            self.first.setdefault(module, name)
            self.by_name.setdefault(name, []).append((name, module))
        self.singles = Singles(self.stacks, self.first)
        # Layers that no patch could reach, and why, as the end of a sentence.
        self.unreachable: dict[nn.Module, str] = {}
        for owner, name in self.first.items():
            for attribute, module in named_children(owner):
                if is_linear_like(module) and reads_weight(owner, attribute):
                    self.unreachable[module] = (
                        f"whose owner {name!r} is {_kind(owner)}, which reads the weight itself "
                        "instead of calling the layer, so that a patch would do nothing: exclude it"
                        f"{_other_remedy(owner)}"
                    )
            if is_linear_like(owner) and returns_tuple(type(owner)):
                self.unreachable[owner] = (
                    f"which is {_kind(owner)} and returns a tuple, not the tensor that a "
                    "modification is added to: exclude it"
                )
            elif is_linear_like(owner) and gives_other_shape(owner):
                self.unreachable[owner] = (
                    f"which is {_kind(owner)} and gives other outputs than (..., out_features), to "
                    "which M(x) could be added: exclude it"
                )
            elif is_linear_like(owner) and owner.weight.dtype.is_complex:
                self.unreachable[owner] = "whose weight is complex, as no M(x) is: exclude it"
        self.offloaded = offloaded_whole(model)
        self.peft = parts_of_adapters(self.first)
        # A weight that is also an embedding's.
        self.embedding: dict[int, str] = {
            id(module.weight): name
            for module, name in self.first.items()
            if isinstance(module, nn.Embedding)
        }

    def check_experts(self, targets: Any, excluded: set[nn.Module]) -> None:
        """An error if a name means experts that are no layers, besides layers or instead."""
        for pattern in targets if isinstance(targets, list) else ():
            if not is_one_word(pattern):
                continue
            held = stacked_expert(self.model, pattern, excluded)
            if held is None:
                continue
            stacks = [(n, m) for n, m in self.stacks if n.startswith(f"{held[0]}.{held[1]}")]
            if any(matched(each, stacks) for each in targets):  # it, or another pattern
                continue
            part = [s for s in stacks if s[0].endswith("." + str(pattern).removesuffix("_proj"))]
            own = [name for name, _ in part or stacks]
            named = f"name these, too, e.g. {own[0]!r}" if own else "say how, with experts="
            raise TokenGateError(
                f"target {show(pattern)} means the experts in {held[0]!r} too, which are held "
                f"together in its 3-D parameter {held[1]!r} and not in linear layers: {named}, or "
                "leave them out with exclude=['experts']."
            )

    def matches(self, argument: str, patterns: Any) -> dict[str, set[nn.Module]]:
        """What each pattern matches, linear or not; an error where that is nothing."""
        kind = type(self.model).__name__
        if callable(patterns) and not isinstance(patterns, (nn.Module, type)):
            chosen = {module for name, module in self.named if patterns(name, module)}
            if not chosen:
                raise TokenGateError(
                    f"the callable given as {argument}= chose no module of this {kind}: "
                    "return True for at least one."
                )
            return {"<callable>": without_parts_of_wholes(chosen)}
        found = {}
        for pattern in as_patterns(argument, patterns):
            if pattern == ALL_LINEAR:
                found[f'"{ALL_LINEAR}"'] = self._all_linear()
                continue
            # Full names come by the thousand, one for each layer of an adapter.
            full = isinstance(pattern, FullName)
            hits = matched(pattern, self.by_name.get(str(pattern), []) if full else self.named)
            for one in self.singles.matched(pattern, argument == "exclude"):
                if hits.isdisjoint(_and_around(one)):
                    hits.add(one)
            if not hits:
                linear = [name for name, module in self.named if is_target(module)]
                raise TokenGateError(
                    f"{argument.removesuffix('s')} {show(pattern)} matches no module of this "
                    f"{kind}: use the name of a linear layer; {nearest(pattern, linear)}"
                    f"{unknown_slice(pattern, linear)}."
                )
            found[show(pattern)] = hits
        if not found and argument == "targets":
            raise TokenGateError(
                f'{argument}={patterns!r} names no layer: pass names, e.g. ["q_proj", "v_proj"].'
            )
        return found

    def _all_linear(self) -> set[nn.Module]:
        # A language model's output head is a linear layer that one seldom means to adapt.
        head = output_head(self.model)
        linear: set[nn.Module] = {m for m in self.first if is_linear(m)}
        linear = linear - {head} - self.unreachable.keys()
        # As are such whose weight is an embedding's, whatever the model says of its head.
        linear = {m for m in linear if id(m.weight) not in self.embedding}
        if not linear:
            raise TokenGateError(
                f'targets="{ALL_LINEAR}" was asked of a {type(self.model).__name__}, '
                "which has no linear layer: pass a model that has one."
            )
        return linear

    def refusal(self, module: nn.Module) -> str | None:
        """Why `module` cannot be patched, as the end of a sentence; None if it can."""
        kind = type(module).__name__
        if module in self.peft:
            return (
                "which is PEFT's: call model.merge_and_unload() and patch what it returns, gate "
                "the adapter with tokengate.integrations.hf_peft.import_peft, or exclude it"
            )
        if isinstance(module, LinearSlice) and not isinstance(module, Gated):
            if isinstance(module.fused, Gated):
                return (
                    f"a slice of {self.first[module.fused]!r}, which is patched as a whole: call "
                    "tokengate.unpatch(model) first, or exclude it"
                )
            return None if isinstance(module.fused, Sliced) else self.refusal(module.fused)
        if isinstance(module, StackedLinear) and not isinstance(module, Gated):
            return self._refusal_of_stack(module)
        if not is_target(module):
            return why_not(module, [m.key for _, m in self.stacks if m.owner is module])
        module = cast(LinearLike, module)
        if isinstance(module, Gated):
            return "which is patched already: call tokengate.unpatch(model) first, or exclude it"
        if isinstance(module, Sliced):
            return "which is patched in part already: call tokengate.unpatch(model) first"
        if is_convolution(module) and computes_otherwise(module):
            return (
                f"a {kind}, whose class computes with other weights or edges than nn.Conv2d, so "
                "that M(x) would see other pixels than it does: exclude it"
            )
        if hides_class(module):
            return (
                f"a {kind} whose forward was replaced on the instance, so that a patch would never "
                "run: patch first, then replace it, or exclude it"
            )
        if module in self.offloaded:
            return (
                f"which is offloaded with the whole of {self.offloaded[module]!r}, so that its "
                "modification would be too: offload without preload_module_classes, or exclude it"
            )
        if blocks_gradients(module):
            return (
                "which quantises its input too, through which torchao passes no gradient to what "
                "is before it: quantise the weights only, or exclude it"
            )
        if hasattr(module, "modification") or hasattr(module, "gate"):
            return f"a {kind} with its own attribute `modification` or `gate`: exclude it"
        if id(module.weight) in self.embedding:
            return (
                f"whose weight is tied to the embedding {self.embedding[id(module.weight)]!r}: "
                "untie them first (`tie_word_embeddings=False`), or exclude it"
            )
        return self.unreachable.get(module)

    def _refusal_of_stack(self, module: StackedLinear) -> str | None:
        if isinstance(module, Single) and isinstance(module.all_of, Gated):
            return (
                "whose projection has patched experts already: call tokengate.unpatch(model) "
                "first, and name all of them at once"
            )
        for layer in patched_projections(module.owner):
            overlap = module.part is None or layer.part is None
            if layer.parameter == module.parameter and overlap:
                how = "in part" if module.part is None else "as a whole"
                return f"which is patched {how} already: call tokengate.unpatch(model) first"
        if hides_class(module.owner):
            return (
                f"held by a {type(module.owner).__name__} whose forward was replaced on the "
                "instance, so that a patch would never run: patch first, or exclude it"
            )
        return unpatchable(module.owner, module.held)


def output_head(model: nn.Module) -> nn.Module | None:
    """A language model's last layer, which gives the logits; None where there is none."""
    get_head = getattr(model, "get_output_embeddings", None)
    return get_head() if callable(get_head) else None


def _and_around(module: nn.Module) -> list[nn.Module]:
    """A module, and what it is a part of, which may be excluded as a whole."""
    if isinstance(module, StackedLinear):
        around = [module.fused, *([module.all_of] if isinstance(module, Single) else [])]
        return [module, module.owner, *(m for m in around if m is not None)]
    return [module, whole(cast(LinearLike, module))]


def _kind(module: nn.Module) -> str:
    kind = type(module)
    own = kind.__module__.startswith("torch.nn.")
    return f"an nn.{kind.__name__}" if own else f"a {kind.__name__}"


def _other_remedy(owner: nn.Module) -> str:
    if not isinstance(owner, nn.MultiheadAttention):
        return ""
    return ", or call tokengate.integrations.attention.split_attention(model) first"
