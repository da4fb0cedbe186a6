"""What `suggest` is not: a training of the user's, or advice about what was not the cause."""

import copy
import warnings

import pytest
import torch
from models import Net, one_sentence, snapshot
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokengate


def batches(rows=2):
    torch.manual_seed(1)
    return [(torch.randn(2, 5, 8), torch.randint(3, (2, 5))) for _ in range(rows)]


def of_net(model, batch):
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def of_net_with_noise(model, batch):
    x, y = batch
    return of_net(model, (x + 0.1 * torch.randn_like(x), y))


def led(gate="fisher"):
    torch.manual_seed(0)
    model = tokengate.patch(Net().train(), "all-linear", rank=2, gate=gate)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    return model, optimizer, tokengate.SparsitySchedule(model, optimizer, 0.5, 50)


def said_in(steps, model, optimizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            optimizer.zero_grad()
            of_net(model, batches(1)[0]).backward()
            optimizer.step()
    return [str(each.message) for each in caught]


def test_its_steps_are_no_training_of_the_user_s():
    """It said that the gates had been trained by another optimizer than the schedule's."""
    model, optimizer, schedule = led()
    tokengate.suggest(model, batches(), loss=of_net, steps=9)  # where a warning is an error
    assert schedule.steps == 0
    assert said_in(10, model, optimizer) == []
    assert schedule.steps == 10


@pytest.mark.parametrize("asked", [False, True])
def test_and_take_no_warning_from_one_that_is(asked):
    """It was never said after `suggest` had said it, wrongly."""
    model, _, schedule = led()
    if asked:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokengate.suggest(model, batches(), loss=of_net, steps=9)
    other = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    (said,) = said_in(10, model, other)
    assert "trained for 8 steps of AdamW and the optimizer of the SparsitySchedule" in said
    assert schedule.steps == 0


class Beside(Net):
    """With a layer that runs and gets no gradient."""

    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(8, 3)

    def forward(self, x):
        return super().forward(x) + self.idle(x).detach()


def test_nor_speak_of_layers_that_get_no_gradient():
    model = tokengate.patch(Beside().train(), "all-linear", rank=2, gate=False)
    tokengate.suggest(model, batches(), loss=of_net, steps=2)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    (said,) = said_in(1, model, optimizer)
    assert "at the first step of this AdamW, 'idle' got no gradient" in said


@pytest.mark.parametrize("patched", [False, True])
def test_nothing_is_left_behind_by_a_loss_that_draws(patched):
    torch.manual_seed(0)
    model, data = Net(), batches()
    assert of_net_with_noise(model, data[0]) != of_net_with_noise(model, data[0])
    if patched:
        tokengate.patch(model, "all-linear", rank=2, gate=False)
        model(data[0][0])  # what the first forward leaves
    before, state = snapshot(model), torch.get_rng_state()
    tokengate.suggest(model, data, loss=of_net_with_noise, steps=2)
    assert torch.equal(torch.get_rng_state(), state)
    if patched:
        tokengate.fisher_scores(model, data, of_net_with_noise)
        assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before


@pytest.mark.parametrize("given", [list, iter])
@pytest.mark.parametrize("name", ["suggest", "fisher_scores", "drift", "calibrate"])
def test_no_batches_are_told_of(name, given):
    model = tokengate.patch(Net(), "all-linear", rank=2)
    with one_sentence(f"{name} was given no batches"):
        getattr(tokengate, name)(model, given(()))
    if name == "suggest":
        with one_sentence(f"{name} was given no batches"):
            tokengate.suggest(Net(), given(()))


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_no_number_from_the_start(patched, value):
    """Lower rates were advised against labels that are all -100."""
    model = Net()
    if patched:
        tokengate.patch(model, "all-linear", rank=2, gate=False)
    x, y = batches(1)[0]
    bad = (x, torch.full_like(y, -100)) if value == "nan" else (x, y)
    loss = of_net if value == "nan" else lambda model, batch: of_net(model, batch) + torch.inf
    with one_sentence(f"suggest found a loss of {value}", "-100"):
        tokengate.suggest(model, [(x, y), bad], loss=loss)
    if patched:
        with one_sentence(f"fisher_scores found a loss of {value}"):
            tokengate.fisher_scores(model, [bad], loss)


@torch.no_grad()
def test_it_has_gradients_of_its_own():
    """As `fisher_scores` has; it ended in an error of torch's."""
    assert tokengate.suggest(Net(), batches(), loss=of_net, steps=2)


def test_a_loss_that_does_not_move():
    closed = tokengate.patch(Net(), "all-linear", rank=2, tau=0.5)
    before = snapshot(closed)
    with one_sentence("the loss stayed at 1.", "gates close all positions", "tau=0"):
        tokengate.suggest(closed, batches(), loss=of_net, steps=2)
    assert snapshot(closed) == before
    frozen = tokengate.patch(Net(), "all-linear", rank=2, gate=False).requires_grad_(False)
    with one_sentence("nothing to train in this patched Net", "requires_grad_(True)"):
        tokengate.suggest(frozen, batches(), loss=of_net)
    with one_sentence("the loss stayed at 1.", "pass a larger lr"):
        tokengate.suggest(Net(), batches(), loss=of_net, steps=2, lr=1e-30)


def test_a_loss_of_nothing_that_is_patched():
    """Scores of 0 told of an untrained model."""
    model = tokengate.patch(Net(), "all-linear", rank=2)
    for loss in (lambda m, b: m(b[0]).detach().sum(), lambda m, b: torch.zeros(())):
        with one_sentence("fisher_scores found a loss that hangs on no patched layer"):
            tokengate.fisher_scores(model, batches(), loss)


@pytest.mark.parametrize(("rows", "steps"), [(3, 32), (40, 40)])
def test_every_batch_is_trained_on_and_few_again_and_again(rows, steps):
    """Of more than 32 the rest was measured alone."""
    given = [(*batch, place) for place, batch in enumerate(batches(rows))]
    seen = []

    def loss(model, batch):
        seen.append(batch[-1])
        return of_net(model, batch)

    tokengate.suggest(Net(), given, loss=loss, lr=1e-3)
    measured = list(range(rows))  # the loss before and after, and the scores
    assert seen == measured + [step % rows for step in range(steps)] + 2 * measured


@pytest.mark.parametrize(("far", "lowest"), [(0.003, 6.25e-4), (0.03, 1e-2)])
def test_without_a_rate_that_is_taken_which_learns_most(far, lowest):
    """It was the first at which the loss fell at all, however little."""
    torch.manual_seed(0)
    base = Net()
    asked = [(x, (base(x) + far * torch.randn(2, 5, 3)).detach()) for x, _ in batches()]

    def named(lr=None):
        after = []

        def loss(model, batch):
            value = (model(batch[0]) - batch[1]).square().mean()
            if not torch.is_grad_enabled():
                after.append(value.item())
            return value

        names = tokengate.suggest(copy.deepcopy(base), asked, 0.25, loss=loss, lr=lr, steps=9)
        return names, sum(after[2:])

    found = {lr: named(lr) for lr in (lowest, 2.5e-3)}
    assert found[lowest][1] < found[2.5e-3][1]
    assert found[lowest][0] != found[2.5e-3][0]
    assert named()[0] == found[lowest][0]


@pytest.mark.parametrize("asked", [{"targets": ["fc1"]}, {"train": "head"}], ids=str)
def test_options_of_a_bare_model_are_refused_of_a_patched_one(asked):
    model = tokengate.patch(Net(), "all-linear", rank=2, gate=False)
    with one_sentence(f"suggest was given {next(iter(asked))}=", "tokengate.unpatch(model)"):
        tokengate.suggest(model, batches(), loss=of_net, **asked)
    tokengate.unpatch(model)
    named = tokengate.suggest(model, batches(), 1.0, loss=of_net, steps=2, **asked)
    assert len(named) == (2 if "targets" in asked else 8)


@pytest.mark.parametrize(
    "loss", ["x", lambda batch: 0, 3.0], ids=["a name", "a function of one", "a number"]
)
def test_what_is_no_loss(loss):
    with one_sentence("loss=", "no function of a model and a batch", "cross_entropy"):
        tokengate.suggest(Net(), batches(), loss=loss)


def test_a_share_is_refused_before_anything_runs():
    with one_sentence("fraction=40"):
        tokengate.suggest(Net(), batches(), 40, loss=lambda model, batch: 1 / 0)


def test_without_gradients_there_are_no_scores():
    model = tokengate.patch(Net(), "all-linear", rank=2)
    with torch.no_grad():
        assert tokengate.fisher_scores(model, batches(), of_net)
    with torch.inference_mode(), one_sentence("fisher_scores was called under torch.inference"):
        tokengate.fisher_scores(model, batches(), of_net)


def test_it_has_its_own_gradients_under_no_grad():
    model = Net()
    plain = tokengate.suggest(model, batches(), loss=of_net, steps=4)
    with torch.no_grad():
        assert tokengate.suggest(model, batches(), loss=of_net, steps=4) == plain


class Checkpointed(Net):
    def __init__(self, reentrant):
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x):
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("name", ["suggest", "fisher_scores"])
def test_reentrant_checkpoints_are_told_of(name):
    model = Checkpointed(reentrant=True)
    tokengate.patch(model, "all-linear", rank=2)
    asked = getattr(tokengate, name)
    with one_sentence(f"{name} found reentrant", "use_reentrant=False"):
        asked(model, batches(), loss=of_net)
    model.reentrant = False
    assert asked(model, batches(), loss=of_net, **({"steps": 2} if name == "suggest" else {}))
    if name == "suggest":
        bare = Checkpointed(reentrant=True)
        with one_sentence("suggest found reentrant"):
            tokengate.suggest(bare, batches(), loss=of_net)


@pytest.mark.parametrize("asked", [tokengate.suggest, tokengate.drift, tokengate.calibrate])
def test_labels_that_a_model_does_not_take(asked):
    """Torch said what it missed, but not that tokengate had given the labels, too."""
    model = Net() if asked is tokengate.suggest else tokengate.patch(Net(), "all-linear", rank=2)
    with pytest.raises(TypeError, match=r"Net with the 2 parts of a batch: .*loss="):
        asked(model, batches())


@pytest.mark.parametrize("parts", [1, 2])
def test_and_errors_that_are_not_of_that(parts):
    kind = ZeroDivisionError if parts == 2 else RuntimeError

    class Fails(Net):
        def forward(self, x, y=None):
            raise kind("its own")

    model = tokengate.patch(Fails(), "all-linear", rank=2)
    with pytest.raises(kind, match=r"^its own$"):
        tokengate.drift(model, [batches()[0][:parts]])
