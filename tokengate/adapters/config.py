"""What tokengate_config.json says: how each layer was patched, and what the weights' file holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from functools import cache
from typing import Any

from tokengate.arguments import non_negative
from tokengate.errors import TokenGateError, brief
from tokengate.linears.experts import AXES

FORMAT = 1


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One patched layer."""

    method: str
    options: dict[str, Any]
    """The method's own, as `patch` was given them."""
    in_features: int
    out_features: int
    penalty: float | None
    """lambda; None where there is no gate, or it has none."""
    s: float | None = None
    """The slope of eq. 11 that `param_groups` was last asked for."""
    slices: dict[str, int] | None = None
    """Of a slice: how its fused layer is divided."""
    groups: int = 1
    """How many times that repeats."""
    axes: str | None = None
    """Of experts in a 3-D parameter: what its dimensions are, as `patch(experts=...)` has it."""
    experts: list[int] | None = None
    """Which of them, by their numbers; None for all."""
    gate: str | None = None
    """The name of its gate; None without one."""
    gate_options: dict[str, Any] = field(default_factory=dict)
    """The gate's own, as `patch` was given them."""


@dataclass(frozen=True, slots=True)
class TensorConfig:
    """One tensor of the weights' file."""

    dtype: str
    """As safetensors names it, e.g. "F32"."""
    shape: list[int]


@dataclass(frozen=True, slots=True)
class SampleConfig:
    """Some values of a frozen parameter of the base."""

    dtype: str
    """As safetensors names it."""
    shape: list[int]
    """Of the whole parameter."""
    values: list[float]
    """From its first to its last, at equal distances."""


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter without its weights."""

    tokengate_version: str
    base_class: str
    """The model's class, with its module."""
    base_fingerprint: str
    """SHA-256 of names and shapes of the base model's linear layers; empty where it is unknown."""
    layers: dict[str, LayerConfig]
    tensors: dict[str, TensorConfig]
    targets: list[dict[str, Any]] = field(default_factory=list)
    """What was asked of each call of `patch`; a regular expression or callable by its own name."""
    train: list[str] = field(default_factory=list)
    """Other parameters that were trained, whose values are kept along."""
    base_id: str = ""
    """What the base was loaded by, as `user/model`; empty where it is unknown."""
    base_revision: str = ""
    """The commit of the base that was loaded; likewise."""
    base_values: dict[str, SampleConfig] = field(default_factory=dict)
    """Of the base's frozen parameters that are random, or may be: its head's."""

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"format": "tokengate", "format_version": FORMAT, **asdict(self)}


def from_dict(found: dict[str, Any], where: str) -> AdapterConfig:
    """Checked, so that what it says has the types it should have.

    Raises:
        TokenGateError: it is of another format or version; a field is missing, unknown or wrong.
    """
    if found.get("format") != "tokengate":
        if "peft_type" in found:
            raise TokenGateError(
                f"{where} is of Hugging Face PEFT's format: read it with import_peft(model, "
                "folder) of tokengate.integrations.hf_peft, or pass a folder that tokengate.save "
                "wrote."
            )
        raise TokenGateError(
            f"{where} is not of tokengate's format: pass a folder that tokengate.save wrote."
        )
    version = found.get("format_version")
    if version != FORMAT:
        raise TokenGateError(
            f"{where} has format_version {brief(version)}, and this tokengate reads {FORMAT}: "
            "install the version that wrote it, "
            f"{brief(found.get('tokengate_version', 'which it does not say'))}."
        )
    parts = {k: v for k, v in found.items() if k not in ("format", "format_version")}
    parts = {**_UNSAID, **parts}
    kinds = {"layers": LayerConfig, "tensors": TensorConfig, "base_values": SampleConfig}
    for part, kind in kinds.items():
        entries = parts.get(part)
        if not isinstance(entries, dict):
            raise _wrong(where, part, entries)
        if kind is LayerConfig:
            entries = {name: _with_gate(each) for name, each in entries.items()}
        parts[part] = {n: _made(kind, e, f"{where}: {part} {n!r}") for n, e in entries.items()}
    config: AdapterConfig = _made(AdapterConfig, parts, where)
    for name, layer in config.layers.items():
        sizes = layer.slices or {}
        if sizes.keys() & {"self", "groups"} or any(
            type(size) is not int for size in sizes.values()
        ):
            raise _wrong(where, f"the slices of {name!r}", sizes)
        for part, value in (("penalty", layer.penalty), ("s", layer.s)):
            try:
                if value is not None:
                    non_negative(part, value)
            except TokenGateError:
                raise _wrong(where, f"the {part} of {name!r}", value) from None
        if layer.axes not in (None, *AXES):
            raise _wrong(where, f"the axes of {name!r}", layer.axes)
        numbers = [0] if layer.experts is None else layer.experts
        whole = all(type(number) is int and number >= 0 for number in numbers)
        has_axes = layer.experts is None or layer.axes is not None
        if not (has_axes and numbers and whole and numbers == sorted(set(numbers))):
            raise _wrong(where, f"the experts of {name!r}", numbers)
        if min(layer.in_features, layer.out_features, layer.groups) < 1:
            raise _wrong(where, f"layers {name!r}", asdict(layer))
    if any(type(name) is not str for name in config.train):
        raise _wrong(where, "train", config.train)
    for part, tensors in (("tensors", config.tensors), ("base_values", config.base_values)):
        for name, tensor in tensors.items():
            for size in tensor.shape:
                if type(size) is not int or size < 0:
                    raise _wrong(where, f"{part} {name!r}", tensor.shape)
    for name, sample in config.base_values.items():
        if any(type(value) is not float for value in sample.values):
            raise _wrong(where, f"base_values {name!r}", sample.values)
    return config


# What was written before adapters said more of their base.
_UNSAID: dict[str, Any] = {"base_id": "", "base_revision": "", "base_values": {}}


def _with_gate(entry: Any) -> Any:
    """What was written before gates had names, all of them the paper's, and experts axes."""
    if not isinstance(entry, dict):
        return entry
    entry = {"axes": None, "experts": None, **entry}
    if "gate" in entry:
        return entry
    gate = None if entry.get("penalty") is None else "threshold"
    return {**entry, "gate": gate, "gate_options": {}}


_TYPES: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float | None": (float, int, type(None)),
    "str | None": (str, type(None)),
    "dict[str, int] | None": (dict, type(None)),
    "list[int] | None": (list, type(None)),
}


@cache
def _fields(kind: Any) -> dict[str, tuple[type, ...]]:
    """The types that each field may have."""
    return {
        each.name: _TYPES.get(str(each.type), (list if "list" in str(each.type) else dict,))
        for each in fields(kind)
    }


def _made(kind: Any, found: Any, where: str) -> Any:
    if not isinstance(found, dict):
        raise _wrong(where, kind.__name__, found)
    known = _fields(kind)
    for name in found:
        if name not in known:
            raise TokenGateError(
                f"{where} has an unknown field {name!r}: save the adapter again, or install the "
                "version of tokengate that wrote it."
            )
    for name, kinds in known.items():
        if name not in found:
            raise TokenGateError(f"{where} lacks the field {name!r}: save the adapter again.")
        if not isinstance(found[name], kinds) or isinstance(found[name], bool):
            raise _wrong(where, name, found[name])
    return kind(**found)


def _wrong(where: str, name: str, value: Any) -> TokenGateError:
    return TokenGateError(f"{where} has {brief(value)} for {name}: save the adapter again.")
