"""Each mistake in docs/mistakes.md does what stands there; run as a program, this writes it.

A row of its tables is one line of Python and what comes of it: "Right." where it does what was
meant, or the error or the one warning, word for word.
"""

import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))  # where it is run as a program
from models import Net, away_from_initialisation
from places import ROOT

import tokengate
from tokengate.gates.registry import GATES
from tokengate.methods import LoRA
from tokengate.methods.registry import METHODS

PAGE = ROOT / "docs" / "mistakes.md"
_ROW = re.compile(r"\| `(?P<code>.+)` \| (?P<response>.+) \|")
ROWS = [match for match in map(_ROW.fullmatch, PAGE.read_text().splitlines()) if match]
RIGHT = "Right."


def train(model, optimizer):
    """Three steps."""
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8)).square().mean().backward()
        optimizer.step()


def patched(*targets, **options):
    return tokengate.patch(Net(), [*targets] or ["q_proj"], **{"rank": 2, **options})


def schedule(model, **options):
    """A SparsitySchedule of it and an optimizer."""
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    return tokengate.SparsitySchedule(model, optimizer, **options)


def ddp(model):
    """`model` in DistributedDataParallel; whoever calls it ends the process group."""
    place = Path("store").absolute()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{place}", rank=0, world_size=1
    )
    return nn.parallel.DistributedDataParallel(model)


def prepare():
    """Folders called "ours" and "theirs", each with an adapter."""
    model = patched()
    away_from_initialisation(model)
    tokengate.save(model, "ours")
    from tokengate.integrations.hf_peft import export_peft

    export_peft(model, "theirs", ungated=True)


def response_to(code):
    """What comes of a line of code, in words."""
    torch.manual_seed(0)
    here = {
        "torch": torch, "nn": nn, "tokengate": tokengate, "re": re, "train": train, "ddp": ddp,
        "model": Net(), "base": Net(), "batch": torch.ones(2, 3, 8), "patched": patched,
        "schedule": schedule,
    }  # fmt: skip
    if "folder" in code or '"ours"' in code or '"theirs"' in code:
        prepare()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(code, here)
        except Exception as error:
            kind = "TokenGateError" if isinstance(error, tokengate.TokenGateError) else "!"
            return f"{kind}: {error}"
        finally:
            here.clear()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
    said = [f"{each.category.__name__}: {each.message}" for each in caught]
    return " ".join(said) or RIGHT


def as_markdown(response):
    """In a cell of a table."""
    for character, escaped in (("\\", "\\\\"), ("|", "\\|"), ("*", "\\*"), ("<", "&lt;")):
        response = response.replace(character, escaped)
    return response


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["code"])
def test_each_mistake_is_right_or_said_in_one_sentence(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for kinds in (METHODS.kinds, GATES.kinds):  # those that other tests have made are not in it
        for name in [n for n, k in kinds.items() if not k.__module__.startswith("tokengate.")]:
            monkeypatch.delitem(kinds, name)
    if "import peft" in row["code"]:
        pytest.importorskip("peft", reason="the test extra is not installed")
    response = response_to(row["code"])
    assert as_markdown(response) == row["response"]
    if response != RIGHT:
        kind, _, sentence = response.partition(": ")
        assert re.fullmatch(r"TokenGateError|\w+Warning", kind)
        assert sentence.endswith((".", "?"))
        assert "Warning: " not in sentence  # once
        assert "\n" not in sentence


def test_there_are_those_asked_for_and_ten_more():
    assert len(ROWS) >= 100
    assert sum(row["response"] == RIGHT for row in ROWS) >= 4


def test_what_is_right_is_what_was_meant():
    asked = tokengate.patch(Net(), "All_Linear", method="DoRA", gate="Threshold", rank=2)
    plain = tokengate.patch(Net(), "all-linear", method="dora", gate="threshold", rank=2)
    kinds = [
        {n: (type(m.modification), type(m.gate)) for n, m in tokengate.layers(model).items()}
        for model in (asked, plain)
    ]
    assert kinds[0] == kinds[1]
    assert {kind.__name__ for kind, _ in kinds[0].values()} == {"DoRA"}


def test_an_option_of_a_method_s_own_is_its_own_whatever_others_call_so():
    class Own(LoRA):
        def __init__(self, linear, *, r=2, threshold=1.0, bias="none"):
            super().__init__(linear, rank=r)

    model = tokengate.patch(Net(), ["q_proj"], Own, r=3, threshold=2.0, bias="all")
    assert {m.modification.rank for m in tokengate.layers(model).values()} == {3}


def test_every_name_of_peft_s_options_is_answered():
    """But for those of methods that tokengate has not, of which its own options are told."""
    peft = pytest.importorskip("peft", reason="the test extra is not installed")
    from tokengate.patching.other_words import OTHERWISE, SAME

    for kind in (peft.LoraConfig, peft.AdaLoraConfig):
        for name in set(kind.__dataclass_fields__) - {"auto_mapping"}:
            with pytest.raises(tokengate.TokenGateError) as error:
                tokengate.patch(Net(), ["q_proj"], **{name: 1})
            assert name in str(error.value)
    asked = peft.LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj"], modules_to_save=["head"], use_dora=True
    )
    with pytest.raises(tokengate.TokenGateError) as error:
        tokengate.patch(Net(), asked)
    said = re.search(r"tokengate\.patch\(model, .*\)", str(error.value))[0]
    model = eval(said, {"tokengate": tokengate, "model": Net()})  # which is right as it stands
    (first, *_) = tokengate.layers(model).values()
    assert (type(first.modification).__name__, first.modification.rank) == ("DoRA", 4)
    assert first.modification.scale == 16 / 4
    assert model.head.weight.requires_grad
    assert not SAME.keys() & OTHERWISE.keys()


def test_nothing_of_a_configuration_of_peft_s_is_lost():
    peft = pytest.importorskip("peft", reason="the test extra is not installed")

    def said(config):
        with pytest.raises(tokengate.TokenGateError) as error:
            tokengate.patch(Net(), config)
        call, _, beside = str(error.value).partition("as in ")[2].partition("; ")
        here = {"tokengate": tokengate, "model": Net(), "re": re}
        return list(tokengate.layers(eval(call.removesuffix("."), here)).values()), beside

    common = {"target_modules": ["q_proj"]}
    layers, beside = said(peft.AdaLoraConfig(init_r=6, target_r=3, total_step=10, **common))
    kind = layers[0].modification
    assert (kind.rank, kind.target_rank) == (6, 3)  # r, which it has too, is 8 and means nothing
    assert "total_step=10, pass it to tokengate.RankAllocator" in beside
    layers, beside = said(
        peft.LoraConfig(
            target_modules=r".*\.[qv]_proj", rank_pattern={"q_proj": 4}, bias="all",
            layer_replication=[[0, 1]], task_type="SEQ_CLS",
        )
    )  # fmt: skip
    assert len(layers) == 4  # a string is a regular expression there
    for name in ("rank_pattern", "bias", "layer_replication", "task_type"):
        assert f"{name}=" in beside
    assert 'train="head"' in beside
    assert said(peft.LoraConfig(**common))[1] == ""
    with pytest.raises(tokengate.TokenGateError, match=r"LoHaConfig .* whose method is not here"):
        tokengate.patch(Net(), peft.LoHaConfig(**common))
    both = peft.LoraConfig(target_parameters=["experts.w1"], **common)
    with pytest.raises(tokengate.TokenGateError, match=r"targets=\['q_proj', 'experts.w1'\]"):
        tokengate.patch(Net(), both)


@pytest.mark.parametrize("apart", [False, True])
def test_an_optimizer_that_another_completes_leaves_nothing_out(apart):
    """As one for the taus alone, or `follow`."""
    model = patched(tau=0.1)
    away_from_initialisation(model)
    others, taus = tokengate.param_groups(model, lr=1e-3)
    first = torch.optim.SGD([others], lr=1e-3)
    second = tokengate.TauAdam(taus["params"]) if apart else tokengate.follow(model, first)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            model(torch.randn(2, 3, 8)).square().mean().backward()
            first.step()
            if apart:
                second.step()


def test_a_context_that_is_entered_says_nothing():
    model = patched()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        waiting = tokengate.disabled(model)
        with waiting, tokengate.restrict(model, torch.ones(2, 3, dtype=torch.bool)):
            model(torch.randn(2, 3, 8))
        tokengate.disabled(model)(lambda: model(torch.randn(2, 3, 8)))()  # as a decorator
        assert not hasattr(waiting, "__fspath__")


def test_a_wrapper_that_is_gone_wraps_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Net()
    wrapped = ddp(model)
    wrapped.itself = [wrapped]  # only the collector finds that nobody holds it
    try:
        with pytest.raises(tokengate.TokenGateError, match="wrapped by DistributedDataParallel"):
            tokengate.patch(model.blocks, ["q_proj"], rank=2)
        del wrapped
        assert tokengate.layers(tokengate.patch(model, ["q_proj"], rank=2))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    import os
    import tempfile

    text = PAGE.read_text()
    for row in ROWS:
        os.chdir(tempfile.mkdtemp())
        new = f"| `{row['code']}` | {as_markdown(response_to(row['code']))} |"
        text = text.replace(row[0], new)
    PAGE.write_text(text)
