"""Steps that a GradScaler skips, and gradients that are not finite: tau stays, and it is said."""

import copy
import math

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("accelerate", reason="the transformers extra is not installed")

from trainer_runs import Huge, Scaled, language_model, taus, trained, trainer  # noqa: E402

from tokengate.errors import NonFiniteWarning  # noqa: E402
from tokengate.integrations.trainer import TokenGateCallback  # noqa: E402

# One thread as in the processes started here.
pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerate")


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


def test_a_schedule_ends_with_the_training_none_the_less(tmp_path):
    class Some(Scaled):
        scale, growth = 2.0**14, 12  # which soon is too much

    callback = TokenGateCallback(target_sparsity=0.5)
    options = {"kind": Some, "max_steps": 60, "optim": "adamw_torch"}
    trained(tmp_path, callback=callback, **options)
    schedule = callback.sparsity_schedule
    assert 40 < schedule.steps < 60
    assert not schedule._calls._steps
    assert schedule._hook.schedule is None


def test_a_skipped_step_is_not_counted(tmp_path):
    """By an optimiser that is not fused, whose hooks are not run; the target is not reached."""

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
    with pytest.warns(tokengate.errors.UnreachedSparsityWarning, match="of 60, where"):
        trained(tmp_path, callback=callback, more=[Left()], **options)
    assert len(left[True]) > 5
    assert len(left[False]) > 5
    assert not any(left[True] + left[False])


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
