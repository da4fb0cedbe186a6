"""What was asked for and nothing would use is refused, and only where it was asked for."""

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence

import tokengate

X = torch.ones(2, 3, 8)
MASK = torch.ones(2, 3, dtype=torch.bool)


def patched(**options):
    return away_from_initialisation(tokengate.patch(Net(), ["q_proj"], rank=2, **options), 0.3)


def ungated(*targets, **options):
    tokengate.patch(Net(), [*targets] or ["q_proj"], **{"gate": False, **options})


def report():
    with tokengate.record(model := patched()) as rec:
        model(X)
    return rec.report()


def suggested(**options):
    tokengate.suggest(patched(), [X], loss=lambda model, x: model(x).square().sum(), **options)


def restricted(where, **options):
    with tokengate.restrict(model := patched(), where, **options):
        model(X)


def recorded(**options):
    with tokengate.record(patched(), **options):
        pass


CALLS = {
    "gate_options={'tau': 0.1}, which has no effect with gate=False": (
        lambda: ungated(gate_options={"tau": 0.1})
    ),
    "tau=0.1, which has no effect beside gate_options={'tau': 0.2}": (
        lambda: patched(tau=0.1, gate_options={"tau": 0.2})
    ),
    "penalty=0.1, which has no effect beside gate_options={'penalty': {'*': 0.2}}": (
        lambda: patched(penalty=0.1, gate_options={"penalty": {"*": 0.2}})
    ),
    "gate_options={'tau': {'*': 1}}, which has no effect with gate=False": (
        lambda: ungated(gate_options={"tau": {"*": 1}})
    ),
    "tau= names '*.q_proj', which matches no gated layer": (
        lambda: ungated(
            "q_proj", "v_proj",
            gate={"*.q_proj": False, "*": "threshold"},
            gate_options={"tau": {"*.q_proj": 0.1, "*": 0.2}},
        )
    ),
    "steps=3, which has no effect on a model that is trained": lambda: suggested(steps=3),
    "lr=0.1, which has no effect on a model that is trained": lambda: suggested(lr=0.1),
    "new=False, which has no effect without a mask": (
        lambda: restricted(lambda name, shape: True, new=False)
    ),
    "new=False, which has no effect without": (
        lambda: restricted({"*": tokengate.after([5])}, new=False)
    ),
    "memory=9, which has no effect without positions=True": lambda: recorded(memory=9),
    "folder='.', which has no effect without positions=True": (
        lambda: recorded(folder=".", ratios=True)
    ),
    "names=('a', 'b'), which has no effect without another report beside=": (
        lambda: report().to_html(names=("a", "b"))
    ),
    "limit=9, which has no effect without a model": (
        lambda: tokengate.History.load("unread.json", limit=9)
    ),
    "force=0.9 without batches": lambda: tokengate.merge_and_unload(patched(), force=0.9),
    "force=0.8 without batches": lambda: tokengate.fold(patched(), report(), force=0.8),
}  # fmt: skip


@pytest.mark.parametrize("said", CALLS)
def test_what_nothing_would_use_is_refused(said):
    with one_sentence(said):
        CALLS[said]()


def test_what_something_uses_is_taken():
    model = tokengate.patch(
        Net(),
        ["q_proj", "v_proj"],
        gate={"*.q_proj": False, "*": "threshold"},
        gate_options={"tau": {"*.v_proj": 0.2}},  # those without a gate need none
    )
    gates = {name: layer.gate for name, layer in tokengate.layers(model).items()}
    assert gates.pop("blocks.0.q_proj") is gates.pop("blocks.1.q_proj") is None
    assert [gate.tau.item() for gate in gates.values()] == pytest.approx([0.2, 0.2])
    # A run without a gate shares its numbers with those that have one.
    ungated(gate_options={}, tau=0.1, penalty=0.0)
    restricted(lambda name, shape: True, new=True)
    restricted({"*.0.*": MASK, "*": lambda name, shape: True}, new=False)
    recorded(positions=True, memory=9, folder=".")
    report().to_html(beside=report(), names=("a", "b"))
