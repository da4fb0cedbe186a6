"""The last thresholds are told by the model that has come of a training, and what it was given."""

import contextlib
import copy
import importlib.util

import pytest
import torch
import transformers
from led_trainings import STEPS, Net, closed, given, is_led, made, thresholds, train, trained
from models import one_sentence
from places import EXAMPLES
from torch import nn

import tokengate
from tokengate.training.leading import settling
from tokengate.training.leading.last_calls import LEAST

pytestmark = pytest.mark.usefixtures("one_thread")

_spec = importlib.util.spec_from_file_location("networks", EXAMPLES / "benchmarks" / "held_out.py")
networks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(networks)

HALF = (torch.arange(10) < 5).expand(16, -1)


@pytest.mark.parametrize(
    ("kind", "seed"),
    [("alike", 12), ("alike", 62), ("pictures", 32), ("pictures", 41), ("pictures", 45)],
)
def test_where_few_samples_were_followed(kind, seed):
    """.05 to .11 off the target, most of them without a word."""
    followed, settled = (networks.case(kind, (20, 700), seed, settle) for settle in (False, True))
    assert abs(networks.held_out(**followed)["off"]) > 0.03
    assert abs(networks.held_out(**settled)["off"]) <= 0.03


def test_it_is_of_a_model_in_evaluation():
    """Dropout of the model's own, and BatchNorm of the batch, are of training alone."""
    followed, _ = trained(make=lambda: Net(0.5), settle=False)
    settled, schedule = trained(make=lambda: Net(0.5))
    assert abs(closed(followed) - 0.5) > 0.03
    assert closed(settled) == pytest.approx(0.5, abs=0.02)
    gates = [layer.gate for layer in tokengate.layers(settled).values()]
    assert [gate.tau.item() for gate in gates] == pytest.approx(list(schedule.thresholds.values()))
    assert not any(gate.is_led for gate in gates)


def test_layers_that_see_what_others_close():
    """Of one pass each was right for inputs that were others by then: .569 and .621 of .6."""
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = transformers.BertConfig(num_attention_heads=2, num_labels=1, **shape)
    model = transformers.BertForSequenceClassification(config)
    targets = ["query", "value", "attention.output.dense", "intermediate.dense"]
    tokengate.patch(model, targets, rank=4, gate="fisher", train="head")
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    tokengate.SparsitySchedule(model, optimizer, 0.6, 60, per_layer=True)
    texts = torch.randint(50, (60, 8, 24))
    for ids in texts:
        optimizer.zero_grad()
        model(ids, labels=(ids == 3).sum(1) - 0.5).loss.backward()
        optimizer.step()
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        for ids in texts:
            model(ids)
    assert [*rec.report().by_module.values()] == pytest.approx([0.6] * 8, abs=0.01)


@pytest.mark.parametrize("slope", [0.0, 0.4, 0.52, -0.4, -1.1, -1.5])
def test_thresholds_that_change_what_tells_them(slope, monkeypatch):
    """At -1.1 each pass went beyond as far as it had come: .674 was closed of .71 in the end.

    At .52 they come nearer from one side, where half of the way is too little.
    """

    def told(model, patched, steps, share, now):
        """By layers that close so much more, or less, for a threshold that is not 1."""
        off = now.item() - 1
        own = 1 + slope * off
        return settling.Settled([own], share, 0.0, share + off, abs(own - now.item()))

    monkeypatch.setattr(settling, "_told", told)
    written = []
    found = settling.settled(
        nn.Module(), {}, [[]] * LEAST, 0.5, torch.tensor([1.2]), written.append
    )
    assert written[-1].item() == pytest.approx(1, abs=0.03)
    assert found.closed == pytest.approx(0.5, abs=0.03)


class Taking(Net):
    """What a batch has is taken out of it, and written over."""

    def forward(self, batch):
        (x,) = batch.pop("x")
        seen.append(x.sum().item())
        return super().forward(x.mul_(3))


seen = []


def test_a_call_that_changes_what_it_is_given_is_made_alike_each_time(monkeypatch):
    """A second pass had the first one's leavings: a KeyError, or inputs three times as large."""
    monkeypatch.setattr(settling, "_SAME", -1.0)  # all passes
    seen.clear()
    trained(call=lambda model, x, step: model({"x": [x]}), make=Taking)
    first, *passes = (seen[i : i + STEPS] for i in range(0, len(seen), STEPS))
    assert passes == [first] * settling._PASSES
    assert len(set(first)) == STEPS


@pytest.mark.parametrize("fails_in", [2, 3])
def test_what_was_followed_stays_where_a_later_pass_fails(fails_in, monkeypatch):
    """The thresholds of the pass before stayed, and the share that it had foretold was told."""
    found = [settling.Settled([x], 0.5, 0.0, 0.7, moved) for x, moved in ((1.2, 0.1), (1.1, 0.2))]
    told = iter([*found[: fails_in - 1], None])
    monkeypatch.setattr(settling, "_told", lambda *_: next(told))
    written = []
    end = settling.settled(nn.Module(), {}, [[]] * LEAST, 0.5, torch.tensor([1.0]), written.append)
    assert written[0].item() != written[-1].item() == 1.0
    assert end.closed == 0.7


class Routed(nn.Module):
    """Of whose two experts the first alone is called in the end."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return self.experts[int(self.calls < STEPS // 2)](x)


def test_where_no_expert_is_called_that_has_a_gate():
    """It was an IndexError out of the optimiser's step."""
    torch.manual_seed(0)
    model = Routed()
    tokengate.patch(model, ["experts.1"], rank=2)
    model.experts[0].requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, STEPS)
    train(model, optimizer, lambda model, x, step: model(x))
    (threshold,) = schedule.thresholds.values()
    assert threshold > 0
    assert not is_led(model)


def test_data_that_seem_to_change_by_chance(monkeypatch):
    """What was followed stayed, though it closed .53 of .6 to the end."""
    monkeypatch.setattr(settling, "_trends", lambda off: True)
    model, _ = trained(make=lambda: Net(0.5))
    assert closed(model) == pytest.approx(0.5, abs=0.02)


def test_nothing_else_is_changed():
    states = []
    for settle in (False, True):
        model, schedule = trained(make=lambda: Net(0.5), settle=settle)
        own = {name: t for name, t in model.state_dict().items() if "tau" not in name}
        modes = [module.training for module in model.modules()]
        states.append((own, modes, torch.rand(3), schedule.sparsity, schedule.thresholds))
    (one, *rest, followed), (other, *others, settled) = states
    assert followed != settled
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert rest[0] == others[0]
    assert all(rest[0])
    assert torch.equal(rest[1], others[1])
    assert rest[2] == others[2]


def test_buffers_that_are_changed_in_evaluation_too():
    class Counting(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))
            self.register_buffer("mean", torch.zeros(6))

        def forward(self, x):
            self.calls += 1
            self.mean = 0.9 * self.mean + 0.1 * x.mean((0, 1))
            return super().forward(x)

    (settled, schedule), (followed, other) = (
        trained(make=Counting, settle=settle) for settle in (True, False)
    )
    assert schedule.thresholds != other.thresholds
    assert (settled.calls.item(), followed.calls.item()) == (STEPS, STEPS)
    assert torch.equal(settled.mean, followed.mean)


def test_batches_may_be_written_into_the_same_memory():
    memory = torch.empty_like(given(0))
    again = thresholds(lambda model, x, step: model(memory.copy_(x)))
    assert again == thresholds()


def test_calls_by_keyword_and_of_a_part():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def encode(self, x):
            return self.net(x, scale=1.0, more={"names": ["a", None], "sizes": (1, 2.0)})

    assert thresholds(lambda model, x, step: model.encode(x), make=Around) == thresholds()


def test_nobody_else_is_told():
    model, optimizer, _ = made()
    with tokengate.record(model, positions=True) as rec:
        train(model, optimizer, lambda model, x, step: model(x))
    assert len(rec.report().by_sample()) == 16 * STEPS


@pytest.mark.parametrize(
    "call",
    [
        lambda model, x, step: model(x, more=iter(())),
        lambda model, x, step: model(x if step > 2 else x.requires_grad_()),
        lambda model, x, step: model.last(model.first(x).tanh()),
        lambda model, x, step: model(x * 0.01 * 1.2**step),  # beside a bias
    ],
    ids=["no plain arguments", "gradients of inputs", "its layers by hand", "data that change"],
)
def test_as_followed_where_calls_tell_less(call):
    assert thresholds(call) == thresholds(call, settle=False)


def around_all(settle=True):
    model, optimizer, schedule = made(settle=settle)
    with tokengate.restrict(model, HALF):
        train(model, optimizer, lambda model, x, step: model(x))
    return list(schedule.thresholds.values())


def around_each(where):
    """A call, within a restriction of its own."""

    def restricted(model, x, step):
        with tokengate.restrict(model, where(step)):
            return model(x)

    return restricted


def test_each_call_is_made_again_within_its_own_restriction():
    each = around_each(lambda step: HALF)
    assert around_all() != around_all(settle=False)
    assert thresholds(each) == around_all()
    masks = torch.rand(STEPS, *HALF.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    written = torch.empty_like(HALF)
    others = thresholds(around_each(lambda step: masks[step]))
    assert others != thresholds(each)
    assert others == thresholds(around_each(lambda step: written.copy_(masks[step])))


def test_what_was_around_another_model_does_not_count():
    """As a teacher, which answers as its base beside what is trained."""
    teacher = tokengate.patch(Net(), "all-linear", rank=1)

    def beside(model, x, step):
        with tokengate.disabled(teacher):
            return model(x) + 0 * teacher(x).detach()

    assert thresholds() != thresholds(settle=False)
    assert thresholds(beside) == thresholds()


def test_of_a_mask_that_is_trained_values_are_kept_and_no_graph():
    """It would hold what each of the last steps has computed for it."""
    model, optimizer, schedule = made()
    weights = torch.zeros(HALF.shape, requires_grad=True)
    train(model, optimizer, around_each(lambda step: weights.sigmoid()), 16)
    (said,) = [said for call in schedule._calls._steps[0] for said in call.around.values()]
    masks = [region.where for _, region in said.values()]
    assert [(mask.mean().item(), mask.requires_grad) for mask in masks] == [(0.5, False)] * 2


def test_as_followed_within_what_cannot_be_said_again():
    each = around_each(lambda step: lambda name, shape: HALF)
    assert thresholds(each) == thresholds(each, settle=False) != thresholds()

    def ends(model, x, step):
        # What holds at the end was not around the others.
        if step == STEPS - 1:
            around.enter_context(tokengate.restrict(model, HALF))
        return model(x)

    found = []
    for settle in (False, True):
        with contextlib.ExitStack() as around:
            found.append(thresholds(ends, settle=settle))
    assert found[0] == found[1]


@pytest.mark.parametrize("steps", [LEAST - 1, LEAST])
def test_few_calls_tell_less(steps):
    assert (thresholds(steps=steps) == thresholds(steps=steps, settle=False)) == (steps < LEAST)


def test_a_step_that_is_not_taken():
    """Nor what it was given, which may be no numbers."""

    def skipping(settle):
        model, optimizer, schedule = made(settle=settle)
        for step in range(STEPS):
            if step == 12:
                model(given(step) * torch.nan).sum().backward()
                schedule.skip_step()
            optimizer.zero_grad()
            (model(given(step)) - 1).square().mean().backward()
            optimizer.step()
        return schedule.thresholds

    def quietly(settle):
        with pytest.MonkeyPatch.context() as patch:  # BatchNorm's means are no numbers either
            patch.setattr(nn.BatchNorm1d, "forward", lambda self, x: x)
            return skipping(settle)

    assert quietly(True) != quietly(False)


def test_two_towers_that_are_called_by_themselves():
    """One layer closes most, the other one little: that is no difference between calls."""

    class Towers(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = nn.Sequential(nn.Linear(6, 16), nn.Tanh())
            self.other = nn.Sequential(nn.Linear(6, 16), nn.Tanh())

    def call(model, x, step):
        return (model.one(x) * model.other(30 * x)).sum(-1)

    model, _ = trained(call, make=Towers, steps=40)
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model.one(given(-1, 1000)), model.other(30 * given(-1, 1000))
    shares = [*rec.report().by_module.values()]
    assert abs(shares[0] - shares[1]) > 0.2
    assert sum(shares) / 2 == pytest.approx(0.5, abs=0.03)


def test_within_an_autocast():
    def call(model, x, step):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    dtypes = []

    class Told(Net):
        def forward(self, x):
            out = super().forward(x)
            dtypes.append((self.training, out.dtype))
            return out

    thresholds(call, make=Told)
    assert dtypes.count((True, torch.bfloat16)) == STEPS
    assert dtypes.count((False, torch.bfloat16)) == len(dtypes) - STEPS > 0


def test_settle_is_true_or_false():
    model, optimizer, schedule = made()
    schedule.detach()
    before = copy.deepcopy(model.state_dict())
    with one_sentence("settle=1.5", "neither True nor False") as error:
        tokengate.SparsitySchedule(model, optimizer, 0.5, STEPS, settle=1.5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not is_led(model), error


def test_a_step_of_a_class_that_calls_its_parent_s():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # whose step torch announces, too

    class Own(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    assert thresholds(optimizer=Own) == thresholds()


def test_a_step_that_is_compiled():
    model, optimizer, schedule = made()
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    train(model, optimizer, lambda model, x, step: model(x))
    assert list(schedule.thresholds.values()) == thresholds()


def test_of_a_closure_s_calls_the_first():
    model, optimizer, schedule = made(
        optimizer=lambda groups: torch.optim.LBFGS(groups[0]["params"], lr=0.05, max_iter=5)
    )
    calls = []

    def closure():
        optimizer.zero_grad()
        calls.append(schedule.steps)
        loss = (model(given(step)) - 1).square().mean()
        loss.backward()
        return loss

    evaluated = []
    model.register_forward_hook(lambda *_: evaluated.append(None) if not model.training else None)
    for step in range(STEPS):  # noqa: B007
        optimizer.step(closure)
    assert len(calls) > 3 * STEPS
    assert evaluated  # of a pass or more, whole ones
    assert len(evaluated) % STEPS == 0


def test_another_forward_for_the_time_of_a_call():
    """As Lightning has its training step called on several devices."""

    def call(model, x, step):
        own = model.forward
        model.forward = lambda x, step: own(x)
        try:
            return model(x, step)
        finally:
            model.forward = own

    assert thresholds(call) == thresholds(call, settle=False)


def test_what_an_autocast_has_cast_is_of_before_the_step():
    class Trained(Net):
        def __init__(self):
            super().__init__()
            self.before = nn.Linear(6, 6)

        def forward(self, x):
            return super().forward(self.before(x))

    def trained(within):
        torch.manual_seed(0)
        model = tokengate.patch(Trained(), ["first", "last"], rank=4, train=["before"])
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-1))
        schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, STEPS)
        for step in range(STEPS):
            optimizer.zero_grad()
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.autocast("cpu", torch.bfloat16))
                loss = (model(given(step)).float() - 1).square().mean()
                if not within:
                    stack.close()
                loss.backward()
                optimizer.step()
        return schedule.thresholds

    assert trained(within=True) == trained(within=False)
