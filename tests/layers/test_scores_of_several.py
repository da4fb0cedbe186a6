"""Where rows or regions have adapters of their own, each gate counts the scores of its own."""

import pytest
import torch
from models import away_from_initialisation
from torch import nn

import tokengate
from tokengate.gates.score_counts import no_counts

NAMES = ["default", "second", "default", None]
X = torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(4, 5, dtype=torch.long)
MASK[0, 3:] = MASK[1, :2] = 0
LEFT, RIGHT = torch.zeros(2, 4, 5, dtype=torch.bool)
LEFT[:, :2], RIGHT[:, 3:] = True, True


class Model(nn.Module):
    """Whose layer sees positions as `way` says."""

    def __init__(self, way):
        super().__init__()
        self.way, self.fc = way, nn.Linear(6, 8)

    def forward(self, x, attention_mask=None):
        if self.way == "flattened":
            return self.fc(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        if self.way == "sequence first":
            return self.fc(x.transpose(0, 1)).transpose(0, 1)
        return self.fc(x)


def both(tmp_path, way="plain", **options):
    torch.manual_seed(0)
    model = away_from_initialisation(tokengate.patch(Model(way), ["fc"], rank=3, **options))
    tokengate.save(model, tmp_path / "second")
    tokengate.load(model, tmp_path / "second", name="second")
    with tokengate.use(model, "second"):
        away_from_initialisation(model)
    model.fc._sequence_first = way == "sequence first"
    return model


def gates_of(model):
    return {name: model.fc.adapter(name)[1] for name in ("default", "second")}


def optimizer_of(model):
    groups = []
    tokengate.use(model, None)  # what is in use is among what is trained
    for name in gates_of(model):
        with tokengate.use(model, name):
            groups += tokengate.param_groups(model, lr=0.0, total_steps=10)
    return torch.optim.AdamW(groups)


def together(model, kind):
    """All in one call."""
    several = NAMES if kind == "rows" else {"default": LEFT, "second": RIGHT}
    with tokengate.use(model, several):
        model(X, attention_mask=MASK).square().sum().backward()


def apart(model, kind):
    """A call for each adapter."""
    for name, inside in (("default", LEFT), ("second", RIGHT)):
        with tokengate.use(model, name):
            if kind == "rows":
                own = [each == name for each in NAMES]
                model(X[own], attention_mask=MASK[own]).square().sum().backward()
            else:
                with tokengate.restrict(model, inside):
                    model(X, attention_mask=MASK).square().sum().backward()


@pytest.mark.parametrize("kind", ["rows", "regions"])
@pytest.mark.parametrize("way", ["plain", "flattened", "sequence first"])
def test_what_is_counted(kind, way, tmp_path):
    found = []
    for run in (together, apart):
        model = both(tmp_path, way)
        for gate in gates_of(model).values():
            gate._seen = no_counts(torch.device("cpu"))
        run(model, kind)
        found.append([gate._seen for gate in gates_of(model).values()])
    for seen, expected in zip(*found, strict=True):
        assert seen.sum() > 0
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["rows", "regions"])
def test_taus_are_paced(kind, tmp_path):
    found = []
    for run in (together, apart):
        model = both(tmp_path)
        optimizer = optimizer_of(model)
        before = [gate.tau.detach().clone() for gate in gates_of(model).values()]
        run(model, kind)
        optimizer.step()
        after = [gate.tau.detach() for gate in gates_of(model).values()]
        assert all((one - other).abs() > 1e-3 for one, other in zip(before, after, strict=True))
        found.append(torch.cat(after))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.filterwarnings("ignore::tokengate.errors.LeftOutWarning")  # the other adapter
@pytest.mark.parametrize("kind", ["rows", "regions"])
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_a_schedule_leads(gate, method, kind, tmp_path):
    found = []
    for run in (together, apart):
        model = both(tmp_path, gate=gate, method=method)
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
        schedule = tokengate.SparsitySchedule(model, optimizer, target=0.5, total_steps=8)
        for _ in range(5):
            optimizer.zero_grad()
            run(model, kind)
            optimizer.step()
        found.append(schedule.thresholds["fc"])
    assert found[0] == pytest.approx(found[1], rel=1e-3)
    assert found[0] > 0
