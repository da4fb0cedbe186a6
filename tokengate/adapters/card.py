"""The model card: README.md in an adapter's folder, for people and for the Hub."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tokengate.adapters.config import AdapterConfig, LayerConfig
from tokengate.errors import listed, printable
from tokengate.files.atomic_write import write_text
from tokengate.files.regular import read_text
from tokengate.gates.registry import GATES
from tokengate.methods.registry import METHODS
from tokengate.reports.report import SparsityReport

CARD = "README.md"
# Between them is what `save` writes anew each time; what others write around it stays.
_BEGIN, _END = "<!-- tokengate.save begins -->", "<!-- tokengate.save ends -->"
# In bytes, of a card that is added to.
_LONGEST = 1 << 20
# What the Hub takes for the name of a model.
_REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def write_card(
    folder: Path, config: AdapterConfig, report: SparsityReport | None, name: str | None = None
) -> None:
    """Write the card, or its part between our two lines; a card without these lines stays as it is.

    Args:
        folder: of the adapter.
        config: what the adapter says of itself.
        report: of the same model; without one, the part that an earlier one gave is gone.
        name: by which it is loaded; the folder's own by default.
    """
    body = _body(config, report, name or folder.resolve().name)
    path, ours = folder / CARD, f"{_BEGIN}\n{body}\n{_END}"
    if not path.exists():
        write_text(path, f"{_head(config)}\n{ours}\n")
        return
    try:
        before, begin, rest = read_text(path, _LONGEST).partition(_BEGIN)
    except (OSError, ValueError):
        return  # no text, and so none of ours
    _, end, after = rest.partition(_END)
    if begin and end:
        write_text(path, f"{before}{ours}{after}")


def _head(config: AdapterConfig) -> str:
    """What the Hub reads."""
    methods = sorted({layer.method for layer in config.layers.values()})
    said = ["---", "library_name: tokengate"]
    if _is_repository(config.base_id):
        said.append(f"base_model: {json.dumps(config.base_id)}")
    tags = [f"- {json.dumps(tag)}" for tag in ["tokengate", *methods]]
    return "\n".join([*said, "tags:", *tags, "---"])


def _body(config: AdapterConfig, report: SparsityReport | None, name: str) -> str:
    base = config.base_id or config.base_class
    facts = {"base": _code(base)}
    if config.base_revision:
        facts["revision"] = _code(config.base_revision)
    facts |= {
        "class": _code(config.base_class),
        "method": _counted(map(_method, config.layers.values())),
        "gate": _counted(map(_gate, config.layers.values())),
        "trained beside": listed(map(_code, config.train)) or "nothing",
        "values": f"{len(config.tensors)} tensors",
        "written by": f"tokengate {_plain(config.tokengate_version)}",
    }
    said = [f"# An adapter of {_plain(base)}", "| | |\n|:--|:--|"]
    said[-1] += "".join(f"\n| {key} | {value} |" for key, value in facts.items())
    said += ["## How to load it", f"```python\n{_loading(config, name)}\n```"]
    if report is not None:
        said += [
            "## Which positions it leaves as they are",
            f"Sparsity {100 * report.sparsity:.1f} %: the share of positions at which a layer's "
            "gate was closed, averaged over samples and layers; by layer and projection:",
            report.to_markdown(),
        ]
    return "\n\n".join(said)


def _loading(config: AdapterConfig, name: str) -> str:
    module, _, kind = config.base_class.rpartition(".")
    said = ["import tokengate"]
    if module.startswith("transformers.") and config.base_id:
        revision = f", revision={config.base_revision!r}" if config.base_revision else ""
        said += [
            f"from transformers import {kind}\n",
            f"model = {kind}.from_pretrained({_plain(config.base_id)!r}{revision})",
        ]
    else:
        said.append(f"\nmodel = ...  # {_plain(config.base_class)}, not patched")
    if config.base_values:
        values = listed(map(_plain, config.base_values), 3)
        said.append(f"# with the values that it was trained with of {values}")
    said += map(_plain, _not_ours(config))
    said.append(f"tokengate.load(model, {name!r})  # a folder, or user/name on the Hub")
    return "\n".join(said)


def _not_ours(config: AdapterConfig) -> Iterator[str]:
    """What is to be registered before `load`, since this library does not."""
    gates = {layer.gate for layer in config.layers.values() if layer.gate is not None}
    methods = {layer.method for layer in config.layers.values()}
    for registry, names in ((METHODS, methods), (GATES, gates)):
        for name in sorted(names):
            kind = registry.kinds.get(name)
            if kind is None or not kind.__module__.startswith("tokengate."):
                by = f"@tokengate.{registry.decorator}({name!r})"
                yield f"# first import what registers {name!r}, by {by}"


def _method(layer: LayerConfig) -> str:
    options = ", ".join(f"{k}={v}" for k, v in layer.options.items() if v not in (None, False))
    return _code(f"{layer.method}({options})")


def _gate(layer: LayerConfig) -> str:
    if layer.gate is None:
        return "none, every position is modified,"
    penalty = "" if layer.penalty is None else f" with penalty {layer.penalty:g}"
    return f"{_code(layer.gate)}{penalty}"


def _counted(kinds: object) -> str:
    counts = Counter(kinds)  # type: ignore[call-overload]
    return "; ".join(
        f"{kind} in {count} layer{'s' if count > 1 else ''}" for kind, count in counts.most_common()
    )


def _is_repository(name: str) -> bool:
    return _REPOSITORY.fullmatch(name) is not None and not Path(name).exists()


def _code(text: str) -> str:
    return f"`{_plain(text)}`"


def _plain(text: str) -> str:
    """On one line, in a table, without an end of what it stands in."""
    return printable(text).replace("`", "'").replace("|", "/").replace("-->", "->")
