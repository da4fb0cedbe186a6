"""A wanted sparsity: reached on data that were held out, whatever the training is like."""

import copy
import gc
import pickle

import pytest
import torch
from drawing import many, only_listed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import away_from_initialisation, one_sentence
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate import TokenGateError
from tokengate.errors import UnreachedSparsityWarning
from tokengate.gates.score_counts import count_scores, log_quantile, no_counts, share_below


class Simulated(tokengate.Modification):
    """Ratios ||m_i|| / ||w_i|| and mu_i as they are given: w is e_1 and m is r_i e_2."""

    def __init__(self, linear):
        super().__init__(linear)
        self.unused = self.new_parameter(1)

    def reset_parameters(self):
        nn.init.zeros_(self.unused)

    def forward(self, x, w):
        return torch.stack((torch.zeros_like(x[..., 0]), x[..., 1]), -1) + 0 * self.unused


class Simulation(nn.Module):
    """Layers of which each sees positions (1, r_i), and a loss with dL/dh_i = (0, mu_i / r_i)."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(layers))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))

    def forward(self, r: Tensor, mu: Tensor) -> Tensor:  # (layers, B, T) each
        loss = torch.zeros(())
        for layer, own_r, own_mu in zip(self.layers, r, mu, strict=True):
            h = layer(torch.stack((torch.ones_like(own_r), own_r), -1))
            loss = loss + (h[..., 1] * own_mu / own_r.clamp(min=1e-9)).sum()
        return loss


def growth(curve, x):
    """How large M(x) is of what it will be, at a share x of the training."""
    return {"line": x, "root": x**0.5, "saturates": min(1.0, x / 0.3), "decays": 1 - (1 - x) ** 2}[
        curve
    ]


def simulate(
    steps, target, *, gate="threshold", layers=6, batch=(8, 30), ratio=0.05, spread=0.5,
    noise=1.0, loss_scale=1.0, curve="line", seed=0, parts=1, **options,
):  # fmt: skip
    """The held out sparsity after a training whose ratios grow as `curve` says; the schedule."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    model = tokengate.patch(Simulation(layers), "all-linear", Simulated, gate=gate)
    groups = tokengate.param_groups(model, lr=0.0, s=1e-3)
    optimizer = torch.optim.AdamW(groups)
    schedule = tokengate.SparsitySchedule(model, optimizer, target, steps, **options)
    scales = torch.exp(0.4 * normal(layers, 1, 1))

    def draw(step, batch):
        grown = ratio * growth(curve, step / steps) * scales
        r = grown * torch.exp(spread * normal(layers, *batch))
        return r, loss_scale * (0.3 + noise * normal(layers, *batch)) * r

    for step in range(steps):
        r, mu = draw(step, batch)
        optimizer.zero_grad()
        for some_r, some_mu in zip(r.chunk(parts, 1), mu.chunk(parts, 1), strict=True):
            model(some_r, some_mu / parts).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad(), tokengate.record(model) as rec:
        model(*draw(steps, (100, batch[1])))
    return rec.report(), schedule


LISTED = [
    # target, steps, batch, ratio, spread, noise, loss_scale, curve, gate, layers, seed
    (0.1, 20, (16, 30), 0.01, 1.0, 1.0, 1e-4, "line", "threshold", 6, 0),
    (0.6, 20, (32, 40), 0.06, 0.5, 1.0, 1.0, "decays", "firm", 6, 1),
    (0.9, 20, (16, 60), 0.06, 1.0, 3.0, 1e3, "root", "threshold", 12, 2),
    (0.5, 50, (8, 60), 0.01, 0.6, 0.0, 1.0, "saturates", "threshold", 6, 3),
    (0.6, 100, (8, 20), 0.06, 0.3, 1.0, 1.0, "decays", "fisher", 6, 4),
    (0.2, 300, (1, 60), 0.01, 1.0, 0.0, 1e-4, "line", "threshold", 4, 2),  # the controller: 0.485
    (0.8, 150, (4, 30), 0.03, 0.6, 1.0, 1e-4, "line", "firm", 6, 6),
]
NAMES = [
    *("target", "steps", "batch", "ratio", "spread", "noise", "loss_scale", "curve"),
    *("gate", "layers", "seed"),
]


def listed(test):
    for values in LISTED:
        test = example(**dict(zip(NAMES, values, strict=True)))(test)
    return test


@settings(max_examples=many(4), phases=only_listed())
@listed
@given(
    target=st.sampled_from([0.1, 0.3, 0.5, 0.7, 0.9]),
    steps=st.sampled_from([20, 50, 200]),
    batch=st.sampled_from([(16, 60), (32, 40)]),
    ratio=st.sampled_from([0.01, 0.06]),
    spread=st.sampled_from([0.5, 1.0]),
    noise=st.sampled_from([0.0, 1.0, 3.0]),
    loss_scale=st.sampled_from([1e-4, 1.0, 1e3]),
    curve=st.sampled_from(["line", "root", "saturates", "decays"]),
    gate=st.sampled_from(["threshold", "firm", "fisher"]),
    layers=st.sampled_from([4, 12]),
    seed=st.integers(0, 50),
)
def test_held_out_it_is_within_003(target, steps, **simulation):
    report, _ = simulate(steps, target, **simulation)
    assert abs(report.sparsity - target) <= 0.03


def test_each_layer_or_all_together():
    per_layer, schedule = simulate(30, 0.5, per_layer=True)
    together, one = simulate(30, 0.5)
    shares = torch.tensor([m.sparsity for m in per_layer.modules.values()])
    assert (shares - 0.5).abs().max() < 0.06
    assert len({*schedule.thresholds.values()}) == 6
    shares = torch.tensor([m.sparsity for m in together.modules.values()])
    assert (shares - 0.5).abs().max() > 0.2
    assert abs(shares.mean() - 0.5) < 0.03
    assert len({*one.thresholds.values()}) == 1


def test_the_share_rises_and_nothing_closes_before_m_has_grown():
    model, optimizer = net()
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.modification.B.zero_()
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 40, warmup_steps=4)
    path = []
    for step in range(40):
        train(model, optimizer, 1, start=step)
        path.append((schedule.wanted, max(schedule.thresholds.values())))
    assert all(threshold == 0 for _, threshold in path[:3])
    wanted = [0.6 * (1 - (1 - min(1, max(0, step - 4) / 21.6)) ** 3) for step in range(1, 41)]
    assert [share for share, _ in path] == pytest.approx(wanted)
    assert path[-1][1] > path[10][1] > 0


def test_counts_of_parts_are_those_of_the_whole():
    """To the bit, in any order: as of micro-batches and ranks, of samples of any length."""
    scores, lengths = torch.rand(9, 40), torch.arange(9) * 4 + 3
    mask = (torch.arange(40) < lengths.unsqueeze(1)).float()
    whole = no_counts(scores.device)
    count_scores(whole, scores, mask)
    for order in (range(9), reversed(range(9))):
        parts = no_counts(scores.device)
        for row in order:
            count_scores(parts, scores[row : row + 1], mask[row : row + 1])
        assert torch.equal(parts, whole)
    assert whole.sum() == pytest.approx(9)
    assert whole.sum() != mask.sum()


@settings(max_examples=many(40))
@given(seed=st.integers(0, 999), share=st.floats(0.01, 0.99), size=st.sampled_from([1e-8, 1.0]))
def test_a_quantile_closes_its_share(seed, share, size):
    scores = size * torch.exp(torch.randn(4, 500, generator=torch.Generator().manual_seed(seed)))
    counts = no_counts(scores.device)
    count_scores(counts, scores, None)
    threshold = log_quantile(counts, share)
    assert abs((scores.double().log2() < threshold).double().mean() - share) < 0.01
    assert abs(share_below(counts, threshold) - share) < 1e-9


def net(gate="threshold", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    tokengate.patch(model, "all-linear", rank=2, gate=gate, **options)
    away_from_initialisation(model, 0.3)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=1e-2))
    return model, optimizer


def train(model, optimizer, steps, parts=1, start=0):
    for step in range(start, start + steps):
        x = torch.randn(16, 5, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        for part in x.chunk(parts):
            (model(part).square().mean() / parts).backward()
        optimizer.step()
    gates = [layer.gate for layer in tokengate.layers(model).values()]
    return torch.cat([gate.threshold.detach() for gate in gates])


@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_micro_batches_are_one_step(gate):
    ends = []
    for parts in (1, 4):
        model, optimizer = net(gate)
        schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 20)
        ends.append(train(model, optimizer, 20, parts))
        assert schedule.steps == 20
    assert ends[0].min() > 1e-5
    torch.testing.assert_close(*ends, rtol=1e-3, atol=0)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("stop", [5, 15])
@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher", "learned"])
def test_resumed_to_the_bit(gate, stop, model_first):
    options = {"learn_from": 0.5} if gate == "learned" else {}
    kind = "threshold" if gate == "learned" else gate

    def made():
        model, optimizer = net(kind)
        return model, optimizer

    model, optimizer = made()
    tokengate.SparsitySchedule(model, optimizer, 0.6, 20, **options)
    train(model, optimizer, 20)
    expected = copy.deepcopy(model.state_dict())
    model, optimizer = made()
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 20, **options)
    train(model, optimizer, stop)
    parts = (model, optimizer, schedule)
    saved = copy.deepcopy([part.state_dict() for part in parts])
    assert not all(map(torch.equal, saved[0].values(), expected.values()))
    model, optimizer = made()
    if model_first:  # as a Trainer does
        model.load_state_dict(saved[0])
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 20, **options)
    if not model_first:
        model.load_state_dict(saved[0])
    for part, state in zip((optimizer, schedule), saved[1:], strict=True):
        part.load_state_dict(state)
    train(model, optimizer, 20 - stop, start=stop)
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_led_taus_have_no_gradient_of_their_own_and_learn_when_told():
    for learn_from in (None, 0.5):
        model, optimizer = net()
        schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 10, learn_from=learn_from)
        path = torch.stack([train(model, optimizer, 1, start=step) for step in range(14)])
        led = 10 if learn_from is None else 5
        assert torch.equal(path[led - 1], torch.tensor([*schedule.thresholds.values()]).float())
        moved = (path[led:] != path[led - 1]).any()
        assert moved == (learn_from is not None)
        state = [optimizer.state.get(t) for t in optimizer.param_groups[1]["params"]]
        assert all(bool(s) == (learn_from is not None) for s in state)
        assert not any(layer.gate.is_led for layer in tokengate.layers(model).values())


def test_detached():
    model, optimizer = net()
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 10)
    train(model, optimizer, 3)
    schedule.detach()
    before = train(model, optimizer, 1, start=3)
    assert schedule.steps == 3
    assert not torch.equal(before, train(model, optimizer, 1, start=4)), "tau learns again"
    tokengate.SparsitySchedule(model, optimizer, 0.6, 10)


@pytest.mark.parametrize("gate", ["threshold", "fisher"])
def test_nobody_leads_copies_nor_what_a_lost_schedule_led(gate):
    """They were led by nobody for ever, silently, and refused another schedule."""
    model, optimizer = net(gate)
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 10)
    train(model, optimizer, 3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert not any(layer.gate.is_led for layer in tokengate.layers(other).values())
        its_own = torch.optim.AdamW(tokengate.param_groups(other, lr=1e-2))
        tokengate.SparsitySchedule(other, its_own, 0.6, 10)
        train(other, its_own, 2)
    assert schedule.steps == 3
    del schedule, optimizer
    gc.collect()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    first = tokengate.SparsitySchedule(model, optimizer, 0.6, 3)
    train(model, optimizer, 3)
    second = tokengate.SparsitySchedule(model, optimizer, 0.6, 3)
    first.detach()
    assert all(layer.gate.is_led for layer in tokengate.layers(model).values())
    train(model, optimizer, 3)
    assert (first.steps, second.steps) == (3, 3)


def test_evaluation_and_what_is_computed_again_do_not_count():
    model, optimizer = net("fisher")
    tokengate.SparsitySchedule(model, optimizer, 0.6, 10)
    gates = [layer.gate for layer in tokengate.layers(model).values()]
    x = torch.randn(4, 5, 6)
    with torch.no_grad():
        model(x)
        model.eval()(x)
    assert not any(gate._seen.any() for gate in gates)
    for reentrant in (True, False):
        y = x.clone().requires_grad_()
        checkpoint(model, y, use_reentrant=reentrant).sum().backward()
        for gate in gates:
            assert gate._seen.sum() == pytest.approx(4)
            assert gate._fed[-1] == 20
            gate._seen.zero_()
            gate._fed.zero_()


def test_skipped_steps_change_nothing():
    model, optimizer = net("fisher")
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.6, 10)
    for factor in (1.0, float("inf"), 1.0):
        step, before = schedule.steps, scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(4, 5, 6)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < before:
            schedule.skip_step()
        assert schedule.steps - step == (factor == 1.0)
        assert not any(layer.gate._seen.any() for layer in tokengate.layers(model).values())
    assert all(layer.gate.Q.isfinite().all() for layer in tokengate.layers(model).values())


def test_a_gate_of_one_s_own():
    class Large(tokengate.Gate):
        """Its score is ||m||."""

        def __init__(self, linear):
            super().__init__(linear)
            self.limit = self.new_parameter(1)

        @property
        def threshold(self):
            return self.limit

        def scores(self, positions):
            return positions.m_norm.detach()

        def weights(self, positions):
            return positions.m_norm >= self.limit

    model, optimizer = net(Large)
    tokengate.SparsitySchedule(model, optimizer, 0.4, 20)
    train(model, optimizer, 20)
    with tokengate.record(model.eval()) as rec:
        model(torch.randn(200, 5, 6, generator=torch.Generator().manual_seed(99)))
    assert abs(rec.report().sparsity - 0.4) < 0.03


def test_a_share_that_no_threshold_closes_is_told_of():
    """Half of the positions have W0 x = 0, and are never closed."""
    model = nn.Sequential(nn.Linear(6, 3, bias=False))
    away_from_initialisation(tokengate.patch(model, "all-linear", rank=2))
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    tokengate.SparsitySchedule(model, optimizer, 0.8, 4)
    x = torch.randn(8, 10, 6)
    x[:, :5] = 0
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    model(x).square().mean().backward()
    with pytest.warns(UnreachedSparsityWarning, match="80% .* ended with (49|5[0-9])%"):
        optimizer.step()


@pytest.mark.parametrize("target", [0.0, 1.0, -0.1, 60, float("nan"), "0.5", None])
def test_refused_target(target):
    model, optimizer = net()
    with pytest.raises(TokenGateError, match="target"):
        tokengate.SparsitySchedule(model, optimizer, target, 10)
    assert not any(layer.gate.is_led for layer in tokengate.layers(model).values())


def test_refused():
    model, optimizer = net()
    ungated, its_own = net(gate=False)
    with one_sentence("none of whose layers has a gate with a threshold"):
        tokengate.SparsitySchedule(ungated, its_own, 0.5, 10)
    for layer in tokengate.layers(model).values():
        layer.gate.tau.data.fill_(0.125)
    with one_sentence("pass a torch.optim.Optimizer"):
        tokengate.SparsitySchedule(model, None, 0.5, 10)
    assert all(layer.gate.tau == 0.125 for layer in tokengate.layers(model).values())
    with one_sentence("total_steps=0"):
        tokengate.SparsitySchedule(model, optimizer, 0.5, 0)
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
    with one_sentence("'0' has a SparsitySchedule already"):
        tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
    state = schedule.state_dict()
    with one_sentence("differ in the layer '0'"):
        schedule.load_state_dict({**state, "layers": ["2"]})
    with one_sentence("another per_layer"):
        schedule.load_state_dict({**state, "thresholds": torch.zeros(2)})
    model(torch.randn(4, 5, 6))
    with one_sentence("no gradient of tau was seen in any of the 2 gates"):
        optimizer.step()


def followed(rate):
    """A schedule of a layer whose modification has this rate, beside a tau and a head."""
    model = tokengate.patch(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), ["0"], train=["1"])
    layer, head = model[0], list(model[1].parameters())
    own = [(head, 1.0), (list(layer.modification.parameters()), rate), ([layer.gate.tau], 0.5)]
    optimizer = torch.optim.AdamW([{"params": params, "lr": lr} for params, lr in own])
    return model, optimizer, tokengate.SparsitySchedule(model, optimizer, 0.5, 10)


@pytest.mark.parametrize("rate", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_scores_are_followed_over_the_rate_of_what_they_are_of(rate):
    """Not that of taus, which does not fall, nor that of a head."""
    model, optimizer, schedule = followed(rate)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(3, 5, 4)).sum().backward()
        optimizer.step()
    tracker = schedule.state_dict()["tracker"]
    assert (tracker["went"].item(), tracker["way"].item()) == pytest.approx((0.01, 0.02))


def test_an_optimiser_that_finds_its_own_rate_is_followed_over_steps():
    """As Adafactor, whose groups say None."""
    _, optimizer, schedule = followed(0.01)
    optimizer.param_groups[1]["lr"] = None
    assert schedule._moves.of(optimizer) == 1.0
