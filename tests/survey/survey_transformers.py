"""Every architecture of the installed transformers, built small, patched, run and given back.

    python tests/survey/survey_transformers.py             # all, some hundred, in half an hour
    python tests/survey/survey_transformers.py llama t5    # these
    python tests/survey/survey_transformers.py --write     # docs/survey.md, from what was found

Each is written to build/survey.jsonl when it is done, and not run again: interrupt it at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import pathlib
import resource
import signal
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from shrinking import WAYS, shrunken
from special_cases import SPECIAL, Special
from survey_inputs import generic_inputs
from survey_results import ROOT, Found, counted, keep, read, write
from torch import Tensor, nn

import tokengate
from tokengate.errors import UnreachedLayerWarning
from tokengate.linears.experts import is_expert
from tokengate.linears.linear_like import is_linear

RESULTS = ROOT / "build" / "survey.jsonl"
# Larger ones would take a machine's memory, and minutes.
_LARGEST = 120_000_000
_SECONDS = 90
_MEMORY = 12 << 30  # of addresses, of which torch's libraries take four

# The heads in the order of choosing: what people train first, the model without a head last.
_HEADS = (
    "IMAGE_TEXT_TO_TEXT",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "CTC",
    "IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
)


def classes() -> dict[str, str]:
    """Of each model type that transformers knows, the class that is built."""
    from transformers.models.auto import modeling_auto

    every = {
        n: m
        for n, m in vars(modeling_auto).items()
        if n.startswith("MODEL_") and n.endswith("_NAMES")
    }
    first = [f"MODEL_FOR_{head}_MAPPING_NAMES" for head in _HEADS] + ["MODEL_MAPPING_NAMES"]
    found: dict[str, str] = {}
    for name in first + sorted(every.keys() - set(first)):
        for model_type, kind in every.get(name, {}).items():
            found.setdefault(model_type, kind[0] if isinstance(kind, (list, tuple)) else kind)
    return dict(sorted(found.items()))


def survey(model_type: str, kind: str) -> Found:
    """Build one small, and see what becomes of it."""
    found = Found(model_type, kind)
    special = SPECIAL.get(model_type, Special())
    if special.unbuilt:
        found.reason = special.unbuilt
        return found
    try:
        with _limited(_SECONDS):
            build, inputs = _working(model_type, kind, special)
    except Exception as error:
        found.reason = _brief(error)
        return found
    targets = _targets(build())
    found.outcome, found.layers, found.called, found.reason = _outcome(build, inputs, targets)
    if targets := stacked(build()):
        experts, _, _, reason = _outcome(build, inputs, targets)
        found.experts = experts
        found.reason = found.reason or reason
    return found


def _targets(model: nn.Module) -> Any:
    """All that is linear; of a model without that its convolutions."""
    if any(is_linear(module) for module in model.modules()):
        return "all-linear"
    convolves = any(_is_plain_convolution("", module) for module in model.modules())
    return _is_plain_convolution if convolves else "all-linear"


def _is_plain_convolution(name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == 1


def stacked(model: nn.Module) -> list[str]:
    """The experts of a model that are held together in 3-D parameters, as names of targets."""
    return sorted(
        {
            f"{name.rpartition('.')[2]}.{own}"
            for name, module in model.named_modules()
            if "expert" in name.rpartition(".")[2]
            for own, parameter in module.named_parameters(recurse=False)
            if parameter.dim() == 3
        }
    )


def _working(model_type: str, kind: str, special: Special) -> tuple[Any, dict[str, Any]]:
    """A builder of the model as small as it can be built and run, and what it is run with."""
    import transformers

    default, error = transformers.CONFIG_MAPPING[model_type], None
    for way in WAYS:
        try:
            config = shrunken(default(), way, special.fields)

            def build(config: Any = config) -> nn.Module:
                torch.manual_seed(0)
                return getattr(transformers, kind)(config).eval().requires_grad_(False)

            with torch.device("meta"):
                size = sum(p.numel() for p in getattr(transformers, kind)(config).parameters())
            if size > _LARGEST:
                raise MemoryError(f"{size:,} parameters are too many for a survey")
            model = build()
            tries = [special.inputs(config)] if special.inputs else generic_inputs(model, config)
            for inputs in tries:
                try:
                    if not floats(run(model, inputs)):
                        raise TypeError("forward returns no floating-point tensor")
                    return build, inputs
                except TimeoutError:
                    raise
                except Exception as found:
                    error = found
        except (TimeoutError, MemoryError) as found:
            raise error or found from None
        except Exception as found:
            error = found
        gc.collect()
    raise error  # type: ignore[misc]


def _outcome(build: Any, inputs: dict[str, Any], targets: Any) -> tuple[str, int, int, str]:
    try:
        with _limited(_SECONDS):
            return check(build(), inputs, targets)
    except tokengate.TokenGateError as error:
        return "refused", 0, 0, str(error)
    except (TimeoutError, MemoryError) as error:
        return "unbuilt", 0, 0, str(error)
    except Exception as error:
        if "allocate memory" in str(error):
            return "unbuilt", 0, 0, "takes more memory than a survey has"
        return "failed", 0, 0, _brief(error)


def check(model: nn.Module, inputs: dict[str, Any], targets: Any) -> tuple[str, int, int, str]:
    """Patch, run, go backward, unpatch: the outcome, layers, those called, what was said."""
    keys = list(model.state_dict())
    base = run(model, inputs)
    alike = same(run(model, inputs), base)  # or it draws numbers that no seed gives again
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokengate.patch(model, targets, rank=2, tau=1e-4)
    layers = tokengate.layers(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = run(model, inputs)
    said = [str(w.message) for w in caught if w.category is UnreachedLayerWarning]
    assert not alike or same(first, base), "patched, it is not what it was"
    called = {name: layer for name, layer in layers.items() if layer._reached}
    missed = layers.keys() - called.keys()
    routed = {name for name in missed if is_expert(name)}
    assert not missed - routed or said, "layers were not called, and no warning said so"
    _away_from_initialisation(layers)
    if called:
        _go_backward(model, inputs)
    trained = 0
    for name, layer in called.items():
        for own, parameter in layer.named_parameters():
            if parameter.requires_grad and parameter.grad is not None:
                assert parameter.grad.isfinite().all(), f"{name}.{own} got no finite gradient"
        trained += any(p.grad is not None for p in layer.modification.parameters())
    assert trained or not called, "no layer was trained"
    tokengate.unpatch(model)
    assert not alike or same(run(model, inputs), base), "given back, it is not what it was"
    assert list(model.state_dict()) == keys, "given back, it has other names"
    outcome = "reached" if missed == routed else "partly"
    return outcome, len(layers), len(called), said[0] if said else ""


def _go_backward(model: Any, inputs: dict[str, Any]) -> None:
    """Give gradients to what is trained, in evaluation if the base can do it there.

    RWKV writes over what it needs, but in training; Reformer's layers, too, pass gradients on in
    training alone, and where their inputs ask for some.
    """
    error: Exception = AssertionError("no output depends on what is patched")
    for prepare in (model.eval, model.train, getattr(model, "enable_input_require_grads", None)):
        if prepare is not None:
            prepare()
        output = [each for each in floats(run(model, inputs, gradients=True)) if each.requires_grad]
        try:
            if output:
                sum(each.float().square().sum() for each in output).backward()
                break
        except (AssertionError, RuntimeError) as found:
            error = found
    else:
        raise error
    if getattr(model, "_require_grads_hook", None) is not None:
        model.disable_input_require_grads()
    model.eval()


def run(model: nn.Module, inputs: dict[str, Any], gradients: bool = False) -> Any:
    """What forward returns, with the same random numbers each time."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(gradients), warnings.catch_warnings():
        if not any(w[0] == "always" for w in warnings.filters[:1]):
            warnings.simplefilter("ignore")
        return model(**inputs)


def floats(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output, however nested."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.numel() else []
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    if isinstance(output, dict):
        output = list(output.values())
    return [t for each in output for t in floats(each)] if isinstance(output, (list, tuple)) else []


def same(a: Any, b: Any) -> bool:
    """Whether two outputs are equal, bit for bit."""
    pairs = zip(floats(a), floats(b), strict=True)
    return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in pairs)


@torch.no_grad()
def _away_from_initialisation(layers: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(7)
    for layer in layers.values():
        for parameter in layer.modification.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.05 * noise.to(parameter)


def _brief(error: BaseException) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text} ({pathlib.Path(where.filename).name}:{where.lineno})"


@contextlib.contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model_types", nargs="*", help="which; all that were not run yet")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--again", nargs="*", default=[], help="outcomes to run again, as failed")
    parser.add_argument("--part", default="0/1", help="of several processes: 0/2 and 1/2")
    parser.add_argument("--write", action="store_true", help="write docs/survey.md and end")
    asked = parser.parse_args()
    results = read(asked.results)
    if asked.write:
        write(results)
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, resource.RLIM_INFINITY))
    part, parts = map(int, asked.part.split("/"))
    for model_type, kind in list(classes().items())[part::parts]:
        done = results.get(model_type)
        again = done is None or done.outcome in asked.again or done.experts in asked.again
        if model_type in asked.model_types if asked.model_types else again:
            # First as one that ended the process, in case it does.
            for found in (Found(model_type, kind, "failed", reason="the process ended"), None):
                found = found or survey(model_type, kind)
                results[model_type] = found
                keep(asked.results, results)
            said = (found.outcome, found.called, found.experts, found.reason[:150])
            print(found.model_type, *said, flush=True)
            gc.collect()
    print(counted(Counter(found.outcome for found in results.values())))


if __name__ == "__main__":
    main()
