"""The callback under Hugging Face's Trainer: each promise against a run without it."""

import pytest
import torch

import tokengate
from tokengate import TokenGateError

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("accelerate", reason="the transformers extra is not installed")

import trainer_runs as runs  # noqa: E402
from accelerate_state import reset  # noqa: E402
from trainer_runs import Norms, Scaled, hooks, language_model, taus, trained, trainer, values  # noqa: E402

from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer  # noqa: E402
from tokengate.integrations.trainer import callback as trainer_callback  # noqa: E402
from tokengate.layers import calls  # noqa: E402

# One thread as in the processes started here.
pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_accelerate"),
    # Some trainings here are without the callback.
    pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning"),
]


def by_hand(s, steps=8, scheduled=None):
    """The same training as plain PyTorch: tau by `TauAdam`, the rest by AdamW under a schedule."""
    model = language_model().train()
    gates = [layer.gate.tau for layer in tokengate.layers(model).values()]
    decayed = [p for p in model.parameters() if p.requires_grad and p.numel() > 1]
    optimizer = torch.optim.AdamW(decayed, lr=1e-2, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    own, path = tokengate.TauAdam(gates, s=s), []
    made, _ = trainer("unused", model)
    for _, batch in zip(range(steps), made.get_train_dataloader(), strict=False):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(decayed, 1.0)
        if scheduled:
            own.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] / 1e-2
        optimizer.step(), own.step()
        schedule.step(), model.zero_grad()
        path.append(taus(model))
    return values(model), torch.stack(path)


@pytest.mark.parametrize("schedule", [False, True])
def test_it_is_the_plain_loop(tmp_path, schedule):
    callback = TokenGateCallback(s=5e-3, schedule=schedule)
    made, path = trained(tmp_path, callback=callback)
    expected, expected_path = by_hand(5e-3, scheduled=schedule)
    other, _ = by_hand(5e-3, scheduled=not schedule)
    torch.testing.assert_close(path, expected_path, rtol=0, atol=1e-6)
    found = values(made.model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=name)
        if name.endswith("tau"):
            assert (other[name] - value).abs() > 1e-3
    assert made.args.max_grad_norm == 1.0


@pytest.mark.parametrize("options", [{"max_steps": 8}, {"max_steps": -1, "num_train_epochs": 0.5}])
def test_s_follows_from_the_number_of_steps(tmp_path, options):
    made, path = trained(tmp_path, callback=TokenGateCallback(), **options)
    assert made.state.max_steps == 8
    start = taus(language_model())
    model = language_model()
    s = tokengate.param_groups(model, lr=0.0, total_steps=8)[-1]["lr"]
    assert s == 2 / 8
    # Adam's first step is s, whatever the gradient, in medians of r, which are below 1 here.
    moved = (path[0] - start).abs()
    assert (moved > 0).all()
    assert (moved < s).all()


def test_the_trainer_alone_does_otherwise(tmp_path):
    """Tau decayed, at the adapters' learning rate, and in the norm that clips them."""
    expected, _ = by_hand(5e-3)
    made, _ = trained(tmp_path, callback=False)
    found = values(made.model)
    assert max((found[n] - expected[n]).abs() for n in found if n.endswith("tau")) > 2e-3


def test_tau_s_gradient_shrinks_nobody_s(tmp_path):
    """A lambda of 10 makes tau's gradient thousands of times the others'."""

    class Norms(transformers.TrainerCallback):
        def __init__(self):
            self.adapters = []

        def on_pre_optimizer_step(self, args, state, control, **context):
            parameters = dict(context["model"].named_parameters()).items()
            grads = [p.grad for n, p in parameters if n.endswith("A") and p.grad is not None]
            self.adapters.append(torch.nn.utils.get_total_norm(grads).item())
            self.tau = max(p.grad.abs().item() for n, p in parameters if n.endswith("tau"))

    norms = {}
    for callback in (None, False):
        for penalty in (0.0, 10.0):
            seen = Norms()
            model = language_model(tau=-1.0, penalty=penalty)
            made, _ = trained(tmp_path, model, callback, more=[seen], max_steps=1, logging_steps=1)
            norms[callback, penalty] = seen.adapters[0]
            if callback is None:
                logged = made.state.log_history[0]["grad_norm"]
                assert (seen.tau > 100) == (penalty > 0)
                assert logged < 10
    assert norms[None, 0.0] > 0
    assert norms[None, 10.0] == pytest.approx(norms[None, 0.0], rel=1e-5)
    assert norms[False, 10.0] < 0.1 * norms[False, 0.0]


@pytest.mark.parametrize("kind", [transformers.Trainer, TokenGateTrainer])
def test_an_interrupted_step_leaves_the_arguments_as_they_were(tmp_path, kind):
    """Another training with the same arguments clips as they say."""

    class Interrupts(transformers.TrainerCallback):
        armed = True

        def interrupt(self, gradient):
            if self.armed:
                raise KeyboardInterrupt

        def on_step_begin(self, args, state, control, **context):
            seen.append(args.max_grad_norm)
            if state.global_step == 2 and not self.armed:
                control.should_training_stop = True

    seen, interrupts = [], Interrupts()
    made, _ = trainer(tmp_path, kind=kind, more=[interrupts], max_grad_norm=1e-3)
    layer = next(iter(tokengate.layers(made.model).values()))
    layer.modification.B.register_hook(interrupts.interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert seen == [1e-3]
    assert made.args.max_grad_norm == 1e-3

    norms = {}
    for name, callback in (("plain", False), ("ours", None)):
        other, _ = trainer(tmp_path, kind=transformers.Trainer, callback=callback, max_steps=1)
        other.args = made.args
        other.add_callback(Norms(norms.setdefault(name, [])))
        other.train()
    assert 0.5e-3 < norms["plain"][0] < 0.99e-3  # the taus have their share
    assert norms["ours"][0] == pytest.approx(1e-3, rel=1e-3)
    # And the one that was interrupted goes on.
    interrupts.armed = False
    made.train()
    assert "clip_grad_norm_" not in vars(made.accelerator)


def test_an_interrupted_training_leaves_nothing_in_the_model(tmp_path, monkeypatch):
    """Another callback takes the model over, as after a training that ended."""
    monkeypatch.setattr(trainer_callback, "will_be_logged", lambda *args: True)

    class Interrupted(TokenGateTrainer, Scaled):
        def training_step(self, *args, **kwargs):
            gates = [layer.gate for layer in tokengate.layers(self.model).values()]
            assert all(gate._unit > 1 and gate.is_led for gate in gates)
            raise KeyboardInterrupt

    model = language_model()
    callback = TokenGateCallback(target_sparsity=0.5)
    made, _ = trainer(tmp_path, model, callback, Interrupted)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    for layer in tokengate.layers(model).values():
        assert layer.gate._unit is None
        assert not layer.gate.is_led
    assert not calls.OPEN
    assert not hooks(made.optimizer)
    reset()
    trained(tmp_path, model, TokenGateCallback(target_sparsity=0.5), max_steps=1)


def test_what_else_is_clipped_is_clipped_as_asked(tmp_path):
    """By a Trainer with a second model, say; whose own way of clipping is there afterwards."""
    other, norms, calls = torch.nn.Linear(3, 3), [], []

    class Two(transformers.Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            other.zero_grad()
            other(torch.ones(2, 3)).sum().mul(1000).backward()
            for parameters in (other.parameters(), other.bias):
                self.accelerator.clip_grad_norm_(parameters, 1.0)
                norms.append(torch.nn.utils.get_total_norm([other.bias.grad]).item())
            return loss

    made, _ = trainer(tmp_path, language_model("adalora"), kind=Two, max_steps=3)
    plain = made.accelerator.clip_grad_norm_

    def own(*args, **kwargs):
        calls.append(1)
        return plain(*args, **kwargs)

    made.accelerator.clip_grad_norm_ = own
    made.train()
    assert max(norms) <= 1
    assert calls
    assert made.accelerator.clip_grad_norm_ is own


@pytest.mark.parametrize("optim", ["sgd", "adafactor", "adamw_torch_fused"])
def test_any_optimizer(tmp_path, optim):
    made, path = trained(tmp_path, optim=optim, max_steps=3)
    # Adam's first step is s, whatever the gradient.
    start = taus(language_model())
    torch.testing.assert_close((path[0] - start).abs(), torch.full_like(start, 5e-3))
    assert not any(
        made.optimizer.state.get(layer.gate.tau) for layer in tokengate.layers(made.model).values()
    )


def test_refused(tmp_path):
    def refuses(message, **options):
        made, _ = trainer(tmp_path, **options)
        with pytest.raises(TokenGateError, match=message):
            made.train()

    plain = tokengate.unpatch(language_model())
    refuses("without a patched layer", model=plain)
    model = language_model()
    adapters = [p for n, p in model.named_parameters() if p.requires_grad and "tau" not in n]
    refuses("not held by the", model=model, optimizers=(torch.optim.SGD(adapters, lr=0.1), None))
    model = language_model()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3, s=1e-3))
    refuses("a group of taus alone", model=model, optimizers=(optimizer, None))
    refuses("two TokenGateCallbacks", more=[TokenGateCallback()])
    for groups in (lambda own: own, lambda own: own[:1]):
        model = language_model()
        optimizer = torch.optim.AdamW(groups(tokengate.param_groups(model, lr=1e-3, s=1e-3)))
        tokengate.follow(model, optimizer, s=1e-3)
        refuses("tokengate.follow was called for", model=model, optimizers=(optimizer, None))
    made, _ = trainer(tmp_path, callback=False, kind=TokenGateTrainer)
    with pytest.raises(TokenGateError, match="no TokenGateCallback"):
        made.train()
    model = language_model()
    context = {"model": model, "optimizer": torch.optim.SGD(model.parameters())}
    state = transformers.TrainerState(max_steps=1)
    with pytest.raises(TokenGateError, match="called by no transformers"):
        TokenGateCallback().on_train_begin(made.args, state, None, **context)
    for options in (
        {"s": -1.0},
        {"target_sparsity": 0.0},
        {"target_sparsity": 1},
        {"betas": (1.0, 0.9)},
        {"schedule": 1},
        {"orthogonality": -0.1},
        {"target_sparsity": 0.5, "target_warmup": 1.0},
        {"target_sparsity": 0.5, "target_warmup": -0.1},
        {"target_sparsity": 0.5, "target_warmup": -1},
        {"target_sparsity": 0.5, "target_warmup": True},
        {"target_warmup": 3},
        {"target_sparsity": 0.5, "settle": 1},
        {"settle": False},
    ):
        with pytest.raises(TokenGateError):
            TokenGateCallback(**options)
    lowering = TokenGateCallback(allocator={"interval": 2})
    with pytest.raises(TokenGateError, match=r"allocator=.* no effect without AdaLoRA layers"):
        trained(tmp_path, language_model(), lowering, max_steps=1)


def test_an_optimizer_of_the_user_s_that_decays_tau_is_put_right(tmp_path):
    paths = []
    for decay in (0.0, 0.5):
        model = language_model(tau=0.5)
        held = [p for p in model.parameters() if p.requires_grad]
        adapters = [p for p in held if p.numel() > 1]
        for parameter in adapters:  # so that tau's gradients are the same
            parameter.requires_grad_(False)
        optimizer = torch.optim.AdamW(held, lr=0.1, weight_decay=decay)
        made, path = trainer(tmp_path, model, optimizers=(optimizer, None))
        made.train()
        paths.append(path.stacked())
    assert torch.equal(*paths)
    assert (paths[0][-1] - paths[0][0]).abs().max() < 8 * 5e-3


def test_an_optimizer_that_runs_no_hooks(tmp_path):
    made, _ = trainer(tmp_path)
    made.create_optimizer()
    made.optimizer.step = lambda closure=None: None
    with pytest.raises(TokenGateError, match="without running its hooks"):
        made.train()


def test_without_gates(tmp_path):
    made, _ = trainer(tmp_path, language_model(gate=False, tau=None, penalty=None))
    made.remove_callback(runs.Path)
    made.train()
    entry = made.state.log_history[0]
    assert entry["sparsity"] == 0
    assert "tau_mean" not in entry
