"""Patch a model in place, and give it back as it was."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any, TypeVar

from torch import nn

from tokengate.arguments import finite, in_our_words, non_negative
from tokengate.errors import TokenGateError
from tokengate.gates.base import Gate
from tokengate.gates.registry import check_options
from tokengate.gates.stacked import parts_beside
from tokengate.layers.changing import all_or_nothing, exclusive, refuse_within
from tokengate.layers.coverage import look_anew, watch
from tokengate.layers.folded import folded, marking_what_goes, unchanged_if_interrupted, unfold
from tokengate.layers.following import follow, unfollow
from tokengate.layers.named_adapters import (
    check_can_remove,
    current_name,
    join,
    remove_adapter,
)
from tokengate.layers.patched import (
    all_layers,
    forget,
    forget_plain,
    own_parameters,
    require_layers,
    rest,
)
from tokengate.layers.sliced_linear import put_on, take_off
from tokengate.linears.accelerate_hooks import weights_present
from tokengate.linears.linear_like import LinearLike, holder, whole
from tokengate.linears.mixing import warn_of_mixing
from tokengate.linears.slices import Slices
from tokengate.methods.base import Modification
from tokengate.methods.registry import METHODS, build
from tokengate.names import named_parameters
from tokengate.patching.fast_path import settle_fast_paths
from tokengate.patching.gates import build_gate, gates_by_layer
from tokengate.patching.heads import forget_new, remember_new, warn_of_frozen
from tokengate.patching.options import options_by_layer, warn_of_rank
from tokengate.patching.other_words import check_no_config, check_words
from tokengate.patching.peft_adapters import refuse_around_patched, telling_of_frozen
from tokengate.patching.save_pretrained import watch_saving
from tokengate.patching.targets import ALL_LINEAR, Targets, all_linear_or, find_targets
from tokengate.patching.trained import named_by_train
from tokengate.patching.wrappers import check_can_patch, check_can_unpatch
from tokengate.patterns import Pattern, matches

_Model = TypeVar("_Model", bound=nn.Module)

# On the model that was patched: {parameter name: requires_grad before}, for what was changed.
_BEFORE = "_tokengate_requires_grad"
# Likewise, what each call of `patch` was asked for, which is of use to readers of a saved adapter.
_ASKED = "_tokengate_asked"


@exclusive
def patch(
    model: _Model,
    targets: Targets | None = None,
    method: str | type[Modification] = "lora",
    *,
    tau: float | None = None,
    penalty: float | None = None,
    gate: bool | str | type[Gate] | Mapping[Pattern, Any] = "threshold",
    gate_options: Mapping[str, Any] | None = None,
    exclude: Targets | None = None,
    train: Any = (),
    slices: Mapping[Pattern, Slices] | None = None,
    experts: Mapping[Pattern, str] | None = None,
    **options: Any,
) -> _Model:
    """Give the targeted linear layers of `model` a gated modification, in place.

    Everything is checked first: an error leaves the model untouched. Afterwards the modifications,
    the taus and what `train` names are trainable, everything else is frozen. Patched layers
    compute `(..., in_features) -> (..., out_features)` as before, and at first, for finite inputs,
    exactly what they did before. An `nn.Conv2d` is a linear layer of patches: its positions are the
    pixels of its output. A model may be patched again, on other layers and with another
    method. Of layers that mix tokens or heads, as a Mixer's, a `MixedPositionsWarning` says so; of
    what a checkpoint of transformers had no values for and stays frozen, a `FrozenHeadWarning`; of
    PEFT's adapter that was in training and is frozen, a `FrozenAdapterWarning`; of a rank above
    both features of a layer, a `RankWarning`.

    Args:
        model: any module. Patch it before wrapping it (DDP, FSDP) or compiling it.
        targets: which layers. A list of names or dotted suffixes on whole components (`"q_proj"`,
            `"self_attn.q_proj"`), globs over the full name (`"vision.*.q_proj"`) or compiled
            regular expressions (full match); or one callable `(name, module) -> bool`; or
            `"all-linear"`, alone or in the list, which is every linear layer but a language model's
            output head, what `train` names, and what no patch could reach: a layer whose owner
            reads the weight instead of calling it (as `nn.MultiheadAttention` does), a router that
            returns a tuple. Of what a pattern matches, the linear layers and `nn.Conv2d` are
            patched; there must be at least one, and none that cannot be. A module all of whose
            parameters are those of one layer, as a clamp around it, stands for that layer. One
            `SkippedModuleWarning` says of what is patched so, and what else is matched and stays:
            what has a matrix of its own, as an embedding; all that have parameters, where the
            pattern is a name. One projection of a fused layer is a target by the layer's name and
            its own: `"qkv.v"`, `"*.qkv_proj.q"`; the others stay untouched, bit for bit. So do
            experts that share a parameter with one that is named as reports do:
            `"experts.3.down_proj"`. What a forward still does not reach is reported after the first
            one, as an `UnreachedLayerWarning`; `verify` finds it out at once.
        method: the name of a method, or a `Modification` subclass.
        tau: initial threshold of every layer, 0 by default; at 0 or below every position is open.
        penalty: lambda of eq. 15, the pull towards closed positions, 1e-5 by default; the paper
            searches it in [1e-8, 1e-3].
        gate: what decides where a modification is applied: the name of a gate, `"threshold"` (the
            paper's), `"sigmoid"`, `"random"` or a registered one; a `Gate` subclass; False for the
            plain method, which modifies every position; or a dict from patterns over the layers'
            names to these.
        gate_options: the gate's own, e.g. `{"sparsity": 0.6}` for `"random"`; a dict as a value
            decides by pattern, as in `options`. `tau` and `penalty` are short for those of the
            gates that have them.
        exclude: layers to leave out, as `targets`; a module's name leaves out all inside it.
        train: other parameters to keep trainable: patterns over names of parameters, or of
            modules, whose parameters are then all meant (`train=["classifier"]`). "head" also
            means the head by whatever name: all that `from_pretrained` found no values for; of
            other models what lies outside the base model, or timm's and torchvision's classifier.
            They keep their dtype, also in a 16-bit model.
        slices: how fused layers are divided, by pattern over their names, where the library does
            not know it: `slices={"qkv": tokengate.Slices(q=64, k=64, v=64)}`.
        experts: how 3-D parameters of experts are laid out, by pattern over their names, where the
            library does not know it: `experts={"moe.w1": "eoi"}` for `(experts, outputs, inputs)`,
            `"eio"` for `(experts, inputs, outputs)`.
        **options: the method's own, e.g. `rank`, `scale` and `dropout` for `"lora"`. A dict gives
            each layer the value of the first pattern that matches its name:
            `rank={"*.q_proj": 16, "*": 8}`; every layer must find one, every pattern decide one.

    Returns:
        The same model object.

    Raises:
        TokenGateError: what is asked cannot be done, in one sentence.
    """
    check_no_config(targets, method, *options.values())
    check_can_patch(model, "patch")
    kind = METHODS.find(method)
    check_words(kind, options)
    check_options(kind, options, beside=signature(patch).parameters)
    if targets is None:
        raise TokenGateError(
            'patch was given no targets: pass names of layers, e.g. ["q_proj", "v_proj"], or '
            f'"{ALL_LINEAR}".'
        )
    targets = all_linear_or(targets)
    if tau is not None:
        finite("tau", tau)
    if penalty is not None:
        non_negative("penalty", penalty)
    adapter = current_name(model)
    trained = named_by_train(model, train)
    chosen = find_targets(model, targets, exclude, slices, experts)
    plain = {id(holder(each.layer)) for each in folded(model).values()}
    asked_for: Any = targets if isinstance(targets, (list, tuple, set)) else [targets]
    for name, layer in list(chosen.items()):
        if id(holder(layer)) in plain:
            raise TokenGateError(
                f"{name!r} is folded, with another weight than W0 in place: call "
                "tokengate.unpatch(model) or the folding's undo() first."
            )
        if any(_has(whole(layer), parameter) for parameter in trained.values()):
            if ALL_LINEAR not in asked_for or any(matches(each, name) for each in asked_for):
                raise TokenGateError(
                    f"{name!r} is both a target and named by train=: a target's own weight stays "
                    "frozen, so drop one of the two."
                )
            del chosen[name]
    if not chosen:
        raise TokenGateError(
            "targets matches only layers that train= names: name other layers, or drop train=."
        )

    own_options = options_by_layer(options, list(chosen))
    gates = gates_by_layer(gate, gate_options, {"tau": tau, "penalty": penalty}, list(chosen))
    planned = []
    for name, layer in chosen.items():
        with weights_present(whole(layer)):
            planned.append((layer, *_built(layer, kind, own_options[name], gates[name])))
    asked = {"targets": targets, "exclude": exclude, "train": train}
    install(model, planned, trained, [asked], adapter)
    warn_of_mixing(model, {layer for layer, *_ in planned})
    warn_of_frozen(model)
    if kind.linear:
        warn_of_rank(own_options, chosen)
    return model


def _built(
    layer: LinearLike,
    kind: type[Modification],
    options: dict[str, Any],
    gate: tuple[type[Gate], dict[str, Any]] | None,
) -> tuple[Modification, Gate | None]:
    """The modification and the gate of a layer, or of all experts in one of each."""

    def both(one: Any) -> tuple[Modification, Gate | None]:
        modification = build(kind, one, options)
        return modification, build_gate(gate, one, modification)

    return parts_beside(layer, both)


def install(
    model: nn.Module,
    planned: list[tuple[Any, Modification, Gate | None]],
    trained: dict[str, nn.Parameter],
    asked: list[dict[str, Any]],
    adapter: str,
) -> None:
    """Patch what was planned and checked: each layer with its modification and gate.

    All of them are of the adapter with the name `adapter`.
    """
    others = list(all_layers(model).values())
    refuse_around_patched()
    refuse_within(others, [layer for layer, _, _ in planned])
    with telling_of_frozen(model), all_or_nothing(model.modules()):
        _freeze_all_but(model, trained)
        for layer, modification, layer_gate in planned:
            put_on(layer, modification, layer_gate)
            join(layer, adapter, others)
        model.__dict__.setdefault(_ASKED, []).extend(asked)
        remember_new(model)
        settle_fast_paths(model)
        follow(model)
        watch(model)
    watch_saving(model)


def asked_of(model: nn.Module) -> list[dict[str, Any]]:
    """What `patch` was asked for, call by call: its targets, exclude and train."""
    return [call for root in _patched_roots(model) for call in root.__dict__.get(_ASKED, ())]


@in_our_words(same={"adapter_name": "name", "adapter": "name"})
@exclusive
def unpatch(model: _Model, *, name: str | None = None) -> _Model:
    """Take all modifications out: the same module and parameter objects, trainable as before.

    With a `name` that adapter alone goes, of several; it must not be in use. The others stay what
    they are and the objects they are. What `train` named stays trainable, and an optimiser that has
    the parameters keeps them until it is made anew, of which a `LeftOutWarning` tells at its step.

    Args:
        model: a patched model.
        name: of one adapter, as `load` was given it; by default all go.

    Raises:
        TokenGateError: no layer of the model is patched, or it is wrapped by
            DistributedDataParallel or sharded; the adapter is unknown, the only one, in use, or led
            by a `SparsitySchedule`.
    """
    patched = all_layers(model)
    check_can_unpatch(model, patched)
    if name is not None:
        check_can_remove(model, name)
    with marking_what_goes(model), unchanged_if_interrupted(model):
        if name is None:
            _unpatch(model)
        else:
            _take_out(model, [each for each in patched.values() if not remove_adapter(each, name)])
    return model


def _take_out(model: nn.Module, plain: list[Any]) -> None:
    """Make layers plain that no adapter modifies any more; others stay patched."""
    rest(model, plain)
    forget_plain(model)
    for layer in plain:
        take_off(layer)
    unfollow(model)
    follow(model)  # which knows the layers inside of each module
    settle_fast_paths(model)
    look_anew()


def _unpatch(model: nn.Module) -> None:
    unfold(model)
    forget(model)
    patched, roots = all_layers(model), _patched_roots(model)
    # With a subtree unpatched on its own before, a root may have no patched layer left.
    if not roots:
        patched = require_layers(model, "unpatch")
    for layer in patched.values():
        take_off(layer)
    unfollow(model)  # which is given last, and so taken first
    settle_fast_paths(model)
    for root in roots:
        forget_new(root)
        root.__dict__.pop(_ASKED, None)
        before = root.__dict__.pop(_BEFORE)
        for name, parameter in named_parameters(root):
            if name in before:
                parameter.requires_grad_(before[name])


def _has(layer: LinearLike, parameter: nn.Parameter) -> bool:
    """Whether the layer's weight or bias is the parameter, or a view of it."""
    own = (t for t in (holder(layer), layer.bias) if t is not None)
    return any(parameter is t or parameter is t._base for t in own)


def _freeze_all_but(model: nn.Module, trained: dict[str, nn.Parameter]) -> None:
    # What an earlier patch left trainable stays so: its taus and modifications, its `train`.
    settled = {id(p) for root in _patched_roots(model) for p in root.parameters()}
    settled |= own_parameters(all_layers(model).values())
    keep = {id(p) for p in trained.values()}
    before: dict[str, bool] = model.__dict__.setdefault(_BEFORE, {})
    for name, parameter in named_parameters(model):
        stays = id(parameter) in settled and parameter.requires_grad
        wanted = stays or id(parameter) in keep
        if parameter.requires_grad != wanted:
            before.setdefault(name, parameter.requires_grad)
            parameter.requires_grad_(wanted)


def _patched_roots(model: nn.Module) -> list[nn.Module]:
    """The modules in `model` that were given to `patch`, the model itself included."""
    return [module for module in model.modules() if _BEFORE in module.__dict__]
