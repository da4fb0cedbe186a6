"""LLaVA and its relatives in transformers: the parts of a vision-language model, one or several.

    from tokengate.integrations.llava import llava_targets, record_modalities

    tokengate.patch(model, llava_targets(model, "vision", ["q_proj", "v_proj"]))
    with record_modalities(model) as rec:
        model(**batch)
    print(rec.reports()["image"])

The parts are known by what transformers calls them, which is the same in LLaVA, LLaVA-NeXT and
-OneVision, the Qwen-VL family, PaliGemma, Idefics, InternVL and many more.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tokengate
from tokengate import TokenGateError
from tokengate.contexts import context
from tokengate.errors import brief
from tokengate.linears.linear_like import is_linear
from tokengate.linears.owners import reads_weight, returns_tuple
from tokengate.names import named_modules, submodule
from tokengate.patching.slice_targets import matched, with_slices
from tokengate.patching.targets import ALL_LINEAR, is_target, output_head
from tokengate.patterns import Pattern, as_patterns, nearest, show
from tokengate.reports.recording import Recorder

PARTS = ("vision", "projector", "language")

# The first that is a component of a name says what part the name belongs to: a Qwen-VL's projector
# is inside its vision tower.
_NAMES = {
    "projector": (
        "multi_modal_projector",
        "merger",
        "deepstack_merger_list",
        "connector",
        "aligner",
        "embed_vision",
        "language_projection",
    ),
    "vision": (
        "vision_tower",
        "visual",
        "vision_model",
        "vision_encoder",
        "image_tower",
        "video_tower",
    ),
    "language": ("language_model", "text_model"),
}
_IMAGE_TOKENS = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")


def llava_targets(
    model: nn.Module, parts: str | Collection[str], targets: Pattern | Collection[Pattern]
) -> list[str]:
    """The full names of the linear layers that `targets` means within some parts of a model.

    A slice of a fused one, as `"qkv.q"`, is meant as in `tokengate.patch`. The language model is
    without its output head. Of the vision tower, what gets no gradient is left out: with
    `vision_feature_layer=-2`, as LLaVA has it, its last layer; what comes after all layers; a
    pooling head.

    Args:
        model: a vision-language model of transformers.
        parts: of "vision", "projector", "language"; one or several. A Qwen-VL's `merger` is a
            projector.
        targets: names, dotted suffixes, globs or compiled regular expressions, as `tokengate.patch`
            takes them, or "all-linear".

    Returns:
        The names, in the model's order.

    Raises:
        TokenGateError: the model has no such part; a target matches nothing in any of these parts;
            a part has nothing that a target matches.
    """
    parts = [parts] if isinstance(parts, str) else list(parts)
    for part in parts or [""]:
        if part not in PARTS:
            raise TokenGateError(
                f"llava_targets was asked for the part {brief(part)}: pass one or several of "
                f"{', '.join(PARTS)}."
            )
    patterns = as_patterns("targets", targets)
    kind = type(model).__name__
    head = output_head(model)
    named = [
        (name, module)
        for name, module in with_slices(model, None)
        if _part_of(name) in parts and is_target(module) and module is not head
    ]
    first = {module: name for name, module in reversed(named)}
    layers = {name: _part_of(name) for name, module in named if first[module] == name}
    for part in parts:
        if part not in layers.values():
            raise TokenGateError(
                f"llava_targets was asked for the {part} part of a {kind}, which has no linear "
                f"layer in a module called {' or '.join(_NAMES[part])}: pass a vision-language "
                "model of transformers, or name the layers to tokengate.patch yourself."
            )
    unused = _unused(model)
    unused |= {name for name in layers if name.rpartition(".")[0] in unused}  # their slices
    chosen = set()
    for pattern in patterns:
        if pattern == ALL_LINEAR:
            whole = (name for module, name in first.items() if is_linear(module))
            chosen |= {name for name in whole if name not in unused and _reachable(model, name)}
            continue
        hits = {first[module] for module in matched(pattern, named)}
        if not hits:
            raise TokenGateError(
                f"target {show(pattern)} matches no linear layer in the {' or '.join(parts)} part "
                f"of this {kind}; {nearest(pattern, layers)}."
            )
        if hits <= unused:
            raise TokenGateError(
                f"target {show(pattern)} matches only layers of this {kind} that the language "
                "model sees nothing of, such as those after vision_feature_layer, so that they "
                "would get no gradient: name others."
            )
        chosen |= hits - unused
    for part in parts:
        if not any(layers[name] == part for name in chosen):
            example = next(name for name in layers if layers[name] == part)
            raise TokenGateError(
                f"targets={brief(targets)} matches no layer in the {part} part of this {kind}: "
                f"leave the part out, or add a target for it, e.g. {example!r}."
            )
    return [name for name in layers if name in chosen]


@context
def record_modalities(model: nn.Module) -> Iterator[Recorder]:
    """`tokengate.record`, which also tells the positions of images from those of text:

        with record_modalities(model) as rec:
            model.generate(**batch)
        reports = rec.reports()  # {"image": SparsityReport, "text": SparsityReport}

    In the language model, an image's positions are those whose input id is the image token's or
    the video token's, and all others are text; padding, where `tokengate.record` sees it, is
    neither. In the vision tower and in the projector every position is an image's. Per module the
    two add up to what `rec.report()` has, which is what `tokengate.record` counts. A sample without
    images is no sample of "image".

    Args:
        model: a patched vision-language model of transformers.

    Raises:
        TokenGateError: here, if no layer is patched, if the model's config has no image token, or
            if a layer is in none of the parts; in a forward, if the language model is run without
            `input_ids`, or a layer in it has other positions than they have.
    """
    with (
        _modalities(model, "record_modalities") as groups,
        tokengate.record(model, groups=groups) as recorder,
    ):
        yield recorder


@context
def restrict_to(model: nn.Module, modality: str) -> Iterator[None]:
    """`tokengate.restrict` to the positions of images, or to those of text:

        with restrict_to(model, "image"):
            model.generate(**batch)

    Which these are, `record_modalities` says. So "text" leaves the vision tower and the projector
    as the base's, and "image" what is generated.

    Args:
        model: a patched vision-language model of transformers.
        modality: "image" or "text".

    Raises:
        TokenGateError: `modality` is another; and as `record_modalities` and `tokengate.restrict`.
    """
    if modality not in ("image", "text"):
        raise TokenGateError(
            f"restrict_to was asked for {brief(modality)}: choose 'image' or 'text'."
        )
    with _modalities(model, "restrict_to") as groups:

        def where(name: str, shape: torch.Size) -> Tensor | bool:
            found = groups(name, shape)[modality]
            return found if isinstance(found, bool) else found.reshape(shape)

        with tokengate.restrict(model, where):
            yield


@contextlib.contextmanager
def _modalities(
    model: nn.Module, asked: str
) -> Iterator[Callable[[str, torch.Size], dict[str, Tensor | bool]]]:
    """What tells of a layer and the shape of its positions which of them are of what."""
    tokens = _image_tokens(model, asked)
    names = list(tokengate.layers(model))
    for name in names:
        if _part_of(name) is None and submodule(model, name) is not output_head(model):
            raise TokenGateError(
                f"{asked} was asked of a {type(model).__name__} whose patched layer {name!r} is in "
                f"none of {', '.join(PARTS)}, so that its positions could be anything: exclude it, "
                "or use tokengate.record and tokengate.restrict."
            )
    ids = _InputIds(tokens, asked)

    def groups(name: str, shape: torch.Size) -> dict[str, Tensor | bool]:
        if _part_of(name) in ("vision", "projector"):
            return {"image": True, "text": False}
        is_image = ids.are_images(name, shape)
        return {"image": is_image, "text": ~is_image}

    with ids.followed(model, names):
        yield groups


class _InputIds:
    """The `input_ids` of the forward that is running, `(B, T)`, as what is an image's in them."""

    def __init__(self, tokens: list[int], asked: str) -> None:
        self._tokens, self._asked = tokens, asked
        self._is_image: Tensor | None = None
        self._outside: dict[nn.Module, Tensor | None] = {}

    @contextlib.contextmanager
    def followed(self, model: nn.Module, layers: Collection[str]) -> Iterator[None]:
        """Watch the modules around the language model, which may be entered at any of them."""
        handles = []
        for name in dict.fromkeys(name for layer in layers for name in _around(layer)):
            module = submodule(model, name)
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        names = inspect.signature(type(module).forward).parameters
        ids = {**dict(zip(list(names)[1:], args, strict=False)), **kwargs}.get("input_ids")
        self._outside[module] = self._is_image
        if isinstance(ids, Tensor):
            self._is_image = torch.isin(ids, torch.tensor(self._tokens, device=ids.device))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._is_image = self._outside.pop(module, None)

    def are_images(self, name: str, shape: torch.Size) -> Tensor:
        """`(B, T)`, for a layer whose S has the shape `(B, T)` or `(B T,)`."""
        known = self._is_image
        if known is None:
            raise TokenGateError(
                f"{self._asked} met {name!r} in a forward without input_ids, which tell images "
                "from text: call the whole model, with input_ids instead of inputs_embeds."
            )
        if shape not in (known.shape, known.flatten().shape):
            raise TokenGateError(
                f"{self._asked} met {name!r} with positions of the shape {tuple(shape)}, where the "
                f"input_ids are {tuple(known.shape)}: exclude the layer, or use tokengate.record "
                "and tokengate.restrict."
            )
        return known


def _part_of(name: str) -> str | None:
    components = name.split(".")
    for part, names in _NAMES.items():
        if any(component in names for component in components):
            return part
    return None


def _around(layer: str) -> Iterator[str]:
    """The names of the modules around the language model that `layer` is in."""
    components = layer.split(".")
    if _part_of(layer) in ("vision", "projector"):
        return
    for i, component in enumerate(components):
        yield ".".join(components[:i])
        if component in _NAMES["language"]:
            return


def _image_tokens(model: nn.Module, asked: str) -> list[int]:
    config = getattr(model, "config", None)
    found = {getattr(config, name, None) for name in _IMAGE_TOKENS} - {None}
    if not found:
        raise TokenGateError(
            f"{asked} was asked of a {type(model).__name__} whose config has no "
            "image_token_id: pass a vision-language model of transformers that puts images where "
            "its input_ids have that token."
        )
    return sorted(int(token) for token in found if token is not None)


def _reachable(model: nn.Module, name: str) -> bool:
    owner, _, child = name.rpartition(".")
    kind = type(submodule(model, name))
    return not reads_weight(submodule(model, owner), child) and not returns_tuple(kind)


def _unused(model: nn.Module) -> set[str]:
    """The linear layers of the vision tower that nothing in the language model depends on."""
    selected = getattr(getattr(model, "config", None), "vision_feature_layer", None)
    unused = set()
    for tower, module in named_modules(model):
        if tower.rpartition(".")[2] not in _NAMES["vision"]:
            continue
        inside = [name for name, layer in named_modules(module) if is_linear(layer)]
        blocks, count = _blocks(module)
        if not count:
            continue
        # hidden_states: the embeddings' output, then each block's.
        indices = [selected] if isinstance(selected, int) else selected
        used = count if not indices else max(i if i >= 0 else count + 1 + i for i in indices)
        seen = False
        for name in inside:
            in_block = name.startswith(f"{blocks}.")
            seen = seen or in_block
            index = int(name[len(blocks) + 1 :].partition(".")[0]) if in_block else 0
            after = indices and seen and not in_block
            if index >= used or after or "head" in name.split("."):
                unused.add(f"{tower}.{name}")
    return {name for name in unused if _part_of(name) == "vision"}


def _blocks(tower: nn.Module) -> tuple[str, int]:
    """The name of the list that holds a tower's blocks, and how many they are; 0 without one."""
    lists = [(n, m) for n, m in named_modules(tower) if isinstance(m, nn.ModuleList)]
    sizes = [sum(is_linear(layer) for layer in module.modules()) for _, module in lists]
    if not any(sizes):
        return "", 0
    name, blocks = lists[sizes.index(max(sizes))]
    return name, len(blocks)
