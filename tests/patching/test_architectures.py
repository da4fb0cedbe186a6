"""Every architecture of the table: patched by role, reached, trainable, and given back."""

import pytest
import torch
from architectures import BEGIN, END, HOSTS, README, Architecture, table
from models import away_from_initialisation

import tokengate
from tokengate.errors import UnreachedLayerWarning

for host in ("transformers", "timm", "torchvision", "open_clip"):
    pytest.importorskip(host, reason=f"{host} is not installed")

import architectures_text  # noqa: E402
import architectures_vision  # noqa: E402

ARCHITECTURES = architectures_text.TEXT + architectures_vision.VISION
REFUSED = architectures_text.REFUSED + architectures_vision.REFUSED
BY_NAME = {one.name: one for one in ARCHITECTURES}


pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def run_without_gradients(one, model):
    return one.run(model)


def check(one):
    # In evaluation, where dropout is off and gradients flow. Compared frozen and under no_grad:
    # hosts choose another kernel, which rounds differently, where something needs a gradient.
    model = one.build().eval().requires_grad_(False)
    keys = list(model.state_dict())
    base = run_without_gradients(one, model)
    targets = one.targets(model)
    tokengate.patch(model, targets, tau=1e-4)
    layers = tokengate.layers(model)
    if one.roles:
        assert sorted(layers) == sorted(targets)

    assert torch.equal(run_without_gradients(one, model), base), "at first, it changes nothing"

    away_from_initialisation(model, 0.1)
    with tokengate.record(model) as rec:
        changed = one.run(model)
    difference = (changed - base).abs().max()
    assert difference > 1e-4 * base.abs().max(), "a modification changes the output"
    unreached = [name for name, counted in rec.report().modules.items() if not counted.samples]
    assert not unreached, f"never called: {unreached}"
    changed.float().square().sum().backward()
    for name, layer in layers.items():
        for parameter in (*layer.modification.parameters(), layer.gate.tau):
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        assert layer.modification.B.grad.any(), name

    tokengate.unpatch(model)
    assert torch.equal(run_without_gradients(one, model), base), "unpatched, it is what it was"
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("one", ARCHITECTURES, ids=lambda one: one.name)
def test_patched_by_role(one):
    check(one)


def test_the_check_can_fail():
    """A layer that its owner never calls, and whose code does not show it."""

    class Reader(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            layer = self.b
            return torch.nn.functional.linear(self.a(x), layer.weight)

    dead = Architecture("torch/reader", Reader, lambda m: m(torch.ones(2, 3, 4)), ("a", "b"))
    with (
        pytest.warns(UnreachedLayerWarning),
        pytest.raises(AssertionError, match=r"never called: \['b'\]"),
    ):
        check(dead)


@pytest.mark.parametrize("one", REFUSED, ids=lambda one: f"{one.name}-{','.join(one.what)}")
def test_refused(one):
    model = one.build()
    with pytest.raises(tokengate.TokenGateError, match=one.says) as error:
        tokengate.patch(model, one.roles(model, *one.what) if one.roles else list(one.what))
    assert str(error.value).endswith(".")
    assert not tokengate.layers(model)


def test_there_are_enough_of_each_host():
    assert len(BY_NAME) == len(ARCHITECTURES) >= 80
    assert {one.host for one in ARCHITECTURES} == set(HOSTS)


def test_the_table_is_up_to_date():
    written = README.read_text().partition(BEGIN)[2].partition(END)[0]
    assert written == table(ARCHITECTURES), "run `python tests/patching/architectures.py`"
