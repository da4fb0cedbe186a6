"""Hugging Face's Trainer and Accelerate: the callback's promises, each against a run without it."""

import copy
import json
import math
import signal
import types
import warnings

import pytest
import torch

import tokengate
from tokengate import TokenGateError
from tokengate.errors import NonFiniteWarning
from tokengate.layers import calls

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
accelerate = pytest.importorskip("accelerate", reason="the transformers extra is not installed")

import trainer_runs as runs  # noqa: E402
import two_ranks  # noqa: E402
from accelerate_state import reset  # noqa: E402
from trainer_runs import language_model, resumable, taus, trainer  # noqa: E402

from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer, set_penalty_unit  # noqa: E402
from tokengate.integrations.trainer import callback as trainer_callback  # noqa: E402
from tokengate.integrations.trainer.engines import engine_of  # noqa: E402
from tokengate.integrations.trainer.tau_steps import TauSteps  # noqa: E402

# One thread as in the processes started here.
pytestmark = [
    pytest.mark.usefixtures("one_thread", "own_accelerate"),
    # Some trainings here are without the callback.
    pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning"),
]


def values(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trained(*args, **kwargs):
    made, path = trainer(*args, **kwargs)
    made.train()
    return made, path.stacked()


# tau's own learning rate, without decay, schedule and clipping


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
    assert not calls._OPEN
    assert not hooks(made.optimizer)
    reset()
    trained(tmp_path, model, TokenGateCallback(target_sparsity=0.5), max_steps=1)


class Norms(transformers.TrainerCallback):
    """The norm of the adapters' gradients before each step."""

    def __init__(self, seen):
        self.seen = seen

    def on_pre_optimizer_step(self, args, state, control, **context):
        named = context["model"].named_parameters()
        held = [p.grad for n, p in named if p.grad is not None and not n.endswith("tau")]
        self.seen.append(torch.nn.utils.get_total_norm(held).item())


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


# The unit of lambda


def test_micro_batches(tmp_path):
    _, whole = trained(tmp_path, per_device_train_batch_size=8)
    for batch, parts in ((2, 4), (1, 8)):
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": parts}
        _, ours = trained(tmp_path, **options)
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)
    assert (whole[-1] - whole[0]).abs().max() > 0.02
    _, other = trained(tmp_path, language_model(penalty=1e-2), per_device_train_batch_size=8)
    assert (other - whole).abs().max() > 1e-3, "lambda counts"


def test_two_processes(tmp_path, processes):
    ranks = two_ranks.start(processes, runs.ranked, tmp_path)
    one, expected = trained(tmp_path, per_device_train_batch_size=4)
    two_ranks.wait_for(ranks)
    found = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1]
    ours, without = torch.tensor(found[0]["True"]), torch.tensor(found[0]["False"])
    assert (without - expected).abs().max() > 1e-4
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    logged = [entry["sparsity"] for entry in one.state.log_history if "sparsity" in entry]
    assert found[0]["sparsity True"] == pytest.approx(logged, abs=1e-9)


class Scaled(transformers.Trainer):
    """float16 with a GradScaler on the CPU, which Accelerate itself reserves for GPUs."""

    scale, growth = 2.0**12, 2000

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.native_amp = True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", self.scale, 2.0, 0.5, self.growth)


class Huge(Scaled):
    scale = 2.0**60


def test_16_bit_follows_float32(tmp_path, monkeypatch):
    def path(**options):
        reset()
        return trained(tmp_path, language_model(penalty=1e-2), **options)[1]

    expected = path()
    assert (expected[-1] - expected[0]).abs().min() > 0.02
    assert 0 < (path(bf16=True) - expected).abs().max() < 1e-3
    assert 0 < (path(kind=Scaled) - expected).abs().max() < 1e-4
    monkeypatch.setattr(tokengate, "scale_penalty", lambda model, factor: None)
    assert (path(kind=Scaled) - expected).abs().max() > 3e-3


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_skipped_steps_leave_tau_alone(tmp_path, optim):
    class States(transformers.TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_end(self, args, state, control, **context):
            every = context["optimizer"].state_dict()["state"]["tokengate"]["taus"]
            self.seen.append(copy.deepcopy(every))

    class Scales(transformers.TrainerCallback):
        def __init__(self):
            self.seen = []

        def on_step_begin(self, args, state, control, **context):
            self.seen.append(context["optimizer"].scaler.get_scale())

    states, scales = States(), Scales()
    trained(tmp_path, kind=Huge, more=[states, scales], max_steps=60, optim=optim, logging_steps=60)
    skipped = [now < before for before, now in zip(scales.seen, scales.seen[1:], strict=False)]
    assert 5 < sum(skipped) < 55
    start = taus(language_model())
    moments = 0
    for index, was_skipped in enumerate(skipped):
        now, before = states.seen[index], states.seen[index - 1] if index else None
        for layer, (name, state) in enumerate(now.items()):
            old = before[name] if before else {"tau": start[layer : layer + 1]}
            same = all(torch.equal(state[key], value) for key, value in old.items())
            assert same == was_skipped, (index, name)
            moments += len(old) == 4
            assert all(bool(value.isfinite().all()) for value in state.values())
    assert moments


def test_a_skipped_step_is_not_counted(tmp_path):
    """By an optimiser that is not fused, whose hooks are not run then."""

    class Left(transformers.TrainerCallback):
        """Positions that the schedule has counted, after steps that were taken or skipped."""

        def on_optimizer_step(self, args, state, control, **context):
            left[context["optimizer"].step_was_skipped].extend(
                layer.gate._seen.sum().item()
                for layer in tokengate.layers(context["model"]).values()
            )

    left = {True: [], False: []}
    callback = TokenGateCallback(target_sparsity=0.5)
    options = {"kind": Huge, "max_steps": 60, "optim": "adamw_torch"}
    trained(tmp_path, callback=callback, more=[Left()], **options)
    assert len(left[True]) > 5
    assert len(left[False]) > 5
    assert not any(left[True] + left[False])


# Checkpoints


def test_killed_and_resumed_bit_for_bit(tmp_path, processes):
    ours, theirs = processes.Pipe()
    process = processes.Process(target=runs.halting, args=(tmp_path / "killed", theirs))
    process.start()
    whole = resumable(tmp_path / "whole")
    whole.train()
    assert ours.poll(120)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert max(path.name for path in (tmp_path / "killed").iterdir()) == "checkpoint-9"

    resumed = resumable(tmp_path / "killed")
    loads = []
    load = torch.nn.Module.load_state_dict

    def watched(self, *args, **kwargs):
        loads.append(load(self, *args, **kwargs))
        return loads[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", watched)
        resumed.train(resume_from_checkpoint=True)
    assert [(x.missing_keys, x.unexpected_keys) for x in loads] == [([], [])]

    expected, found = values(whole.model), values(resumed.model)
    assert expected.keys() == found.keys()
    start = values(language_model("adalora", target_rank=2))
    moved = [name for name in expected if not torch.equal(expected[name], start[name])]
    assert {name.rsplit(".", 1)[1] for name in moved} == {"P", "E", "Q", "tau"}
    for name, value in expected.items():
        assert value.dtype == found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    callbacks = [
        next(c for c in made.callback_handler.callbacks if isinstance(c, TokenGateCallback))
        for made in (whole, resumed)
    ]
    assert callbacks[0].allocator.ranks == callbacks[1].allocator.ranks
    assert sum(callbacks[0].allocator.ranks.values()) == 12


@pytest.mark.parametrize("lost", ["moments", "allocator"])
def test_without_their_state_a_resumed_run_ends_elsewhere(tmp_path, monkeypatch, lost):
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **context):
            control.should_training_stop = state.global_step == 9

    resumable(tmp_path, more=[Stop()]).train()
    resumable(tmp_path / "not used")
    if lost == "moments":
        load = TauSteps.load
        monkeypatch.setattr(
            TauSteps,
            "load",
            lambda self, saved, exactly: load(
                self, {n: {"tau": x["tau"]} for n, x in saved.items()}, exactly
            ),
        )
    else:
        monkeypatch.setattr(tokengate.RankAllocator, "load_state_dict", lambda self, state: None)
    resumed = resumable(tmp_path)
    resumed.train(resume_from_checkpoint=True)
    monkeypatch.undo()
    again = resumable(tmp_path)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    expected, found = values(again.model), values(resumed.model)
    kind = "tau" if lost == "moments" else "E"
    assert any(not torch.equal(found[n], expected[n]) for n in found if n.endswith(kind))


def test_a_checkpoint_that_does_not_fit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "with", **saving)
    trained(tmp_path / "without", callback=False, **saving)
    for folder, options, message in (
        ("without", {}, "has nothing of TokenGateCallback"),
        (
            "with",
            {"callback": TokenGateCallback(target_sparsity=0.5)},
            "no state of the controller",
        ),
    ):
        made, _ = trainer(tmp_path / folder, **options, **saving)
        with pytest.raises(TokenGateError, match=message):
            made.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-4"))
        assert not hooks(made.optimizer)

    made, _ = trainer(tmp_path / "with", **saving)
    made._load_from_checkpoint = lambda folder: None
    with pytest.raises(TokenGateError, match="let the Trainer load model and optimizer from one"):
        made.train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-4"))


def hooks(optimizer):
    base = optimizer.optimizer
    return [
        *base._optimizer_step_pre_hooks.values(),
        *base._optimizer_step_post_hooks.values(),
        *base._optimizer_state_dict_pre_hooks.values(),
    ]


def test_trained_again_it_goes_on(tmp_path):
    """As the Trainer does, which keeps its optimiser: no second set of hooks, Adam's steps add."""
    made, _ = trainer(tmp_path)
    made.train()
    assert not hooks(made.optimizer)
    made.train()
    assert not hooks(made.optimizer)
    saved = made.optimizer.state_dict()["state"]["tokengate"]["taus"]
    assert {int(state["step"]) for state in saved.values()} == {16}


# AdaLoRA and the controller


def test_the_penalty_is_the_loss_s(tmp_path):
    """The same as a Trainer whose loss has it, also clipped and accumulated."""

    class Added(transformers.Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss + 0.3 * tokengate.orthogonality(self.model) / 2

    found = {}
    for kind, weight in ((transformers.Trainer, 0.3), (Added, 0.0), (transformers.Trainer, 0.0)):
        callback = TokenGateCallback(s=5e-3, orthogonality=weight)
        options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "max_steps": 6}
        made, _ = trained(tmp_path, language_model("adalora"), callback, kind, **options)
        found[kind, weight] = values(made.model)
        assert ("orthogonality" in made.state.log_history[0]) == (weight > 0)
    ours, expected = found[transformers.Trainer, 0.3], found[Added, 0.0]
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5, msg=name)
        if name.endswith(("P", "Q")):
            without = found[transformers.Trainer, 0.0][name]
            assert (without - value).abs().max() > 1e-3


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("unscaled", [False, True])
def test_the_penalty_is_not_scaled(tmp_path, optim, unscaled):
    """Under a GradScaler that nothing has asked to unscale, because nothing is clipped."""

    def unclipped(kind):
        class Unclipped(kind):
            def _clip_grad_norm(self, model):
                if unscaled:
                    self.accelerator.unscale_gradients()

            def _get_grad_norm(self, model, grad_norm=None):
                return grad_norm

        model = language_model("adalora")
        callback = TokenGateCallback(s=5e-3, orthogonality=1.0)
        reset()
        options = {"kind": Unclipped, "max_steps": 4, "optim": optim}
        return trained(tmp_path, model, callback, **options)[0].state.log_history[0]

    expected = unclipped(transformers.Trainer)["orthogonality"]
    assert unclipped(Scaled)["orthogonality"] == pytest.approx(expected, rel=1e-2)


def test_the_allocator_s_options(tmp_path):
    options = {"initial_warmup": 1, "final_warmup": 2}
    callback = TokenGateCallback(allocator=options)
    made, _ = trained(tmp_path, language_model("adalora", target_rank=1), callback)
    assert callback.allocator.step == made.state.max_steps == 8
    assert sum(callback.allocator.ranks.values()) == 6
    for name, layer in tokengate.layers(made.model).items():
        assert int((layer.modification.E != 0).sum()) == callback.allocator.ranks[name]


@pytest.mark.parametrize("warmup", [3, 0.4])
def test_a_wanted_sparsity(tmp_path, warmup):
    """tau is held for the warm-up and led afterwards; a resumed run ends alike."""
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        callback = TokenGateCallback(s=5e-3, target_sparsity=0.9, target_warmup=warmup)
        made, path = trainer(tmp_path, callback=callback, **saving)
        made.train(resume_from_checkpoint=resume)
        assert callback.sparsity_schedule.step == 8
        assert callback.sparsity_schedule.thresholds.keys() == tokengate.layers(made.model).keys()
        assert not hooks(made.optimizer)
        ends.append(values(made.model))
        if resume is None:
            assert all(torch.equal(step, path.steps[0]) for step in path.steps[:3])
            assert not torch.equal(path.steps[-1], path.steps[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# Sparsity and tau in the logs


def test_what_is_logged(tmp_path):
    class Reporter(transformers.TrainerCallback):
        def __init__(self):
            self.logs, self.recorded = [], []

        def on_log(self, args, state, control, logs=None, **context):
            self.logs.append(dict(logs))

        def on_substep_end(self, args, state, control, **context):
            layers = tokengate.layers(context["model"]).values()
            self.recorded.append(any(calls.said_of(layer, calls.RECORD) for layer in layers))

    for kind in (transformers.Trainer, TokenGateTrainer):
        before, after = Reporter(), Reporter()
        model = language_model(tau=0.5)
        options = {"eval_strategy": "steps", "eval_steps": 4, "gradient_accumulation_steps": 2}
        own = {"eval_dataset": {"some": runs.Texts(12), "more": runs.Texts(20)}}
        made, _ = trainer(tmp_path, model, kind=kind, more=[after], **options, **own)
        made.callback_handler.callbacks.insert(0, before)
        made.train()
        # Two micro-batches a step; the steps that are logged alone are counted.
        assert after.recorded == [False] * 3 + [True] + [False] * 3 + [True]
        history = made.state.log_history
        losses = [entry for entry in history if "loss" in entry]
        assert len(losses) == 2
        for entry in losses:
            assert 0 < entry["sparsity"] < 1
            assert entry["tau_min"] < entry["tau_mean"] < entry["tau_max"]
        assert losses[-1]["tau_mean"] == pytest.approx(taus(model).mean().item())
        assert {"step": 8, **after.logs[-2]} == [x for x in history if "eval_more_loss" in x][-1]
        for name in ("some", "more"):
            (*_, entry) = [x for x in history if f"eval_{name}_loss" in x]
            with tokengate.record(model) as rec, torch.no_grad():
                model.eval()
                for batch in made.get_eval_dataloader(own["eval_dataset"][name]):
                    model(**batch)
            expected = rec.report().sparsity
            assert entry[f"eval_{name}_sparsity"] == pytest.approx(expected, abs=1e-9)
            assert 0 < expected < 1
        told = [bool(entry.get("sparsity")) for entry in before.logs if "loss" in entry]
        assert told == [kind is TokenGateTrainer] * 2

        metrics = made.evaluate(own["eval_dataset"]["more"])
        predicted = made.predict(own["eval_dataset"]["more"]).metrics
        if kind is TokenGateTrainer:
            assert metrics["eval_sparsity"] == predicted["test_sparsity"] == pytest.approx(expected)
        else:
            assert "eval_sparsity" not in metrics
            assert "test_sparsity" not in predicted
        assert not calls._OPEN


def test_an_evaluation_that_failed_is_no_part_of_the_next(tmp_path):
    made, _ = trainer(tmp_path, language_model(tau=0.5), kind=TokenGateTrainer)
    expected = made.evaluate(runs.Texts(12))["eval_sparsity"]

    def fails(prediction):
        raise ArithmeticError

    made.compute_metrics = fails
    with pytest.raises(ArithmeticError):
        made.evaluate(runs.Texts(64))
    made.compute_metrics = None
    assert made.evaluate(runs.Texts(12))["eval_sparsity"] == expected
    assert made.evaluate(runs.Texts(64))["eval_sparsity"] != expected


def test_the_logged_step_s_sparsity_by_hand(tmp_path):
    """Of the batch of step 4, by the taus before it, over real positions."""
    made, _ = trainer(tmp_path, language_model(tau=0.5), logging_steps=4, max_steps=4)
    made.train()
    logged = made.state.log_history[0]["sparsity"]
    again, _ = trainer(tmp_path, language_model(tau=0.5), max_steps=4)

    class Own(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **context):
            if state.global_step == 3:
                self.recording = tokengate.record(context["model"])
                self.recorder = self.recording.__enter__()

        def on_step_end(self, args, state, control, **context):
            if state.global_step == 4:
                self.recording.__exit__(None, None, None)

    again.add_callback(own := Own())
    again.train()
    assert logged == pytest.approx(own.recorder.report().sparsity, abs=1e-12)
    assert max(m.positions for m in own.recorder.report().modules.values()) < 4 * 8


def test_by_epoch(tmp_path):
    options = {"logging_strategy": "epoch", "max_steps": -1, "num_train_epochs": 2}
    made, _ = trained(tmp_path, gradient_accumulation_steps=3, **options)
    losses = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [6, 12]
    assert all("sparsity" in entry for entry in losses)


def test_reporters_of_a_plain_trainer_are_told(tmp_path, caplog):
    made, _ = trainer(tmp_path)
    made.args.report_to = ["tensorboard"]
    made.train()
    assert [r.message for r in caplog.records if "use TokenGateTrainer" in r.message] != []
    caplog.clear()
    made, _ = trainer(tmp_path, kind=TokenGateTrainer)
    made.args.report_to = ["tensorboard"]
    made.train()
    assert not [r for r in caplog.records if "use TokenGateTrainer" in r.message]


# Wrong set-ups


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
        {"betas": (1.0, 0.9)},
        {"schedule": 1},
        {"orthogonality": -0.1},
        {"target_warmup": 1.0},
        {"target_warmup": -0.1},
        {"target_warmup": -1},
        {"target_warmup": True},
    ):
        with pytest.raises(TokenGateError):
            TokenGateCallback(**options)


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
    made, _ = trainer(tmp_path, language_model(gate=False))
    made.remove_callback(runs.Path)
    made.train()
    entry = made.state.log_history[0]
    assert entry["sparsity"] == 0
    assert "tau_mean" not in entry


# Accelerate


def accelerated(folder=None, stop=None, parts=1, scaler=None, clip=1.0, **options):
    """README's loop: 8 steps of 8 texts."""
    reset()
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=parts, **options)
    accelerator.scaler = scaler
    model = language_model()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2, s=5e-3))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, [lambda step: 1 - step / 8, lambda step: 1.0]
    )
    loader = torch.utils.data.DataLoader(runs.Texts(), batch_size=8 // parts)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if scaler:  # unscales; but computes in float32
        accelerator.native_amp, accelerator.state._mixed_precision = True, "fp16"
    if folder and not stop:
        accelerator.load_state(folder)
        loader = accelerator.skip_first_batches(loader, 3 * parts)
    path = []
    for batch in loader:
        with accelerator.accumulate(model):
            set_penalty_unit(model, accelerator)
            # The mean over a micro-batch: of equal weight here, as all have as many tokens.
            batch["labels"] = batch["input_ids"]
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            path.append(taus(model))
        if len(path) == stop:
            accelerator.save_state(folder)
            break
    return torch.stack(path), values(accelerator.unwrap_model(model))


def test_accelerate():
    expected, _ = accelerated()
    travelled = (expected[-1] - expected[0]).abs().max()
    assert travelled > 0.02
    for parts in (2, 8):
        ours, _ = accelerated(parts=parts)
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    bf16, _ = accelerated(mixed_precision="bf16", parts=2)
    assert 0 < (bf16 - expected).abs().max() < 0.05 * travelled
    scaled, _ = accelerated(scaler=torch.amp.GradScaler("cpu", 2.0**14))
    torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-6)


def test_accelerate_resumes(tmp_path):
    whole, expected = accelerated()
    first, _ = accelerated(tmp_path / "state", stop=3)
    rest, found = accelerated(tmp_path / "state")
    assert torch.equal(torch.cat([first, rest]), whole)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, None])
def test_fsdp2_s_mixed_precision_is_warned_of(monkeypatch, dtype):
    accelerator = accelerate.Accelerator(cpu=True)
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, mixed_precision_policy=torch.distributed.fsdp.MixedPrecisionPolicy(dtype)
    )
    monkeypatch.setattr(accelerator.state, "distributed_type", accelerate.DistributedType.FSDP)
    monkeypatch.setattr(accelerator.state, "fsdp_plugin", plugin, raising=False)
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        engine = engine_of(accelerator, optimizer, model, [], 0.1)
    assert engine.optimizer is optimizer
    assert engine.apart
    told = [str(w.message) for w in said if "FSDP2 computes with tau" in str(w.message)]
    assert len(told) == (dtype is not None)


@pytest.mark.parametrize(
    ("kind", "stage", "axes", "named"),
    [
        ("FSDP", None, None, "FSDP of version 1"),
        ("DEEPSPEED", 0, None, "DEEPSPEED of stage 0"),
        ("MULTI_GPU", None, {"tp_size": 2}, "MULTI_GPU with tp_size=2"),
        ("MEGATRON_LM", None, None, "MEGATRON_LM"),
    ],
)
def test_accelerate_refuses_what_is_divided_otherwise(monkeypatch, kind, stage, axes, named):
    accelerator = accelerate.Accelerator(cpu=True)
    kinds = accelerate.DistributedType
    monkeypatch.setattr(accelerator.state, "distributed_type", kinds[kind])
    if stage is not None:
        plugin = types.SimpleNamespace(zero_stage=stage)
        monkeypatch.setattr(type(accelerator.state), "deepspeed_plugin", plugin)
    if axes is not None:
        monkeypatch.setattr(
            type(accelerator), "parallelism_config", types.SimpleNamespace(**axes), raising=False
        )
    with pytest.raises(TokenGateError, match=f"under {named}, where a tau is no parameter"):
        set_penalty_unit(language_model(), accelerator)


# numbers gone wrong


class Breaks(transformers.TrainerCallback):
    """Makes one tau's gradient NaN in the third step, and that tau after the sixth."""

    def on_pre_optimizer_step(self, args, state, control, model, **context):
        if state.global_step == 2:
            next(iter(tokengate.layers(model).values())).gate.tau.grad.fill_(float("nan"))

    def on_step_end(self, args, state, control, model, **context):
        if state.global_step == 6:
            next(iter(tokengate.layers(model).values())).gate.tau.data.fill_(float("nan"))


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "sgd"])
def test_a_gradient_that_is_not_finite_is_skipped_and_logged(tmp_path, optim):
    model = language_model()
    history = tokengate.History(model)
    callback = TokenGateCallback(s=5e-3, history=history)
    options = {"max_steps": 7, "logging_steps": 1, "optim": optim, "max_grad_norm": 0.0}
    made, path = trainer(tmp_path, model, callback, more=[Breaks()], **options)
    with pytest.warns(NonFiniteWarning, match="1 of the"):
        made.train()
    moved = path.stacked().diff(dim=0)[:, 0]
    assert moved[1] == 0  # the third step's
    assert (moved[[0, 2, 3]] != 0).all()
    logs = [entry for entry in made.state.log_history if "loss" in entry]
    assert [entry.get("tau_skipped") for entry in logs] == [None, None, 1, 1, 1, 1, 1]
    assert [entry.get("tau_broken") for entry in logs] == [None] * 5 + [1, 1]
    assert all(math.isfinite(entry["tau_mean"]) for entry in logs)
    assert history.skipped == [0, 0, 1, 1, 1, 1, 1]
    assert list(history.broken.values()) == [6]
