"""AdaLoRA's penalty and allocator, and a wanted sparsity, as options of the callback."""

import warnings

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("accelerate", reason="the transformers extra is not installed")

from accelerate_state import reset  # noqa: E402
from trainer_runs import (  # noqa: E402
    Scaled,
    Texts,
    hooks,
    language_model,
    trained,
    trainer,
    values,
)

from tokengate.integrations.trainer import TokenGateCallback  # noqa: E402

# One thread as in the processes started here.
pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerate")


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
    assert callback.allocator.steps == made.state.max_steps == 8
    assert sum(callback.allocator.ranks.values()) == 6
    for name, layer in tokengate.layers(made.model).items():
        assert int((layer.modification.E != 0).sum()) == callback.allocator.ranks[name]


@pytest.mark.parametrize("warmup", [3, 0.4])
def test_a_wanted_sparsity(tmp_path, warmup):
    """tau is held for the warm-up and led afterwards; a resumed run ends alike."""
    saving = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8}
    ends = []
    for resume in (None, str(tmp_path / "checkpoint-4")):
        callback = TokenGateCallback(target_sparsity=0.9, target_warmup=warmup)
        made, path = trainer(tmp_path, callback=callback, **saving)
        made.train(resume_from_checkpoint=resume)
        assert callback.sparsity_schedule.steps == 8
        assert callback.sparsity_schedule.thresholds.keys() == tokengate.layers(made.model).keys()
        assert not hooks(made.optimizer)
        ends.append(values(made.model))
        if resume is None:
            assert all(torch.equal(step, path.steps[0]) for step in path.steps[:3])
            assert not torch.equal(path.steps[-1], path.steps[0])
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.mark.parametrize("settle", [None, True, False])
def test_whether_the_model_is_called_again_in_the_end(tmp_path, settle):
    callback = TokenGateCallback(target_sparsity=0.9, settle=settle)
    made, _ = trainer(tmp_path, callback=callback, max_steps=8)
    trained = []
    made.model.register_forward_hook(lambda model, *_: trained.append(model.training))
    made.train()
    assert trained.count(False) == (0 if settle is False else trained.count(True))


@pytest.mark.parametrize("how", ["stopped", "best"])
def test_a_model_from_before_the_target_is_told_of(tmp_path, how):
    class Ends(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= how == "stopped" and state.global_step == 2

    class Best(transformers.Trainer):
        def evaluate(self, *args, **kwargs):
            found = {"eval_first": -self.state.global_step}
            self.log(found)
            return found

    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "first", **saving}
    callback = TokenGateCallback(target_sparsity=0.9)
    options = {"eval_dataset": Texts(4), **(best if how == "best" else {})}
    made, _ = trainer(tmp_path, None, callback, Best, [Ends()], **options)
    with pytest.warns(tokengate.errors.UnreachedSparsityWarning, match="90%.*step 2 of 8") as told:
        made.train()
    assert sum("step 2 of 8, where" in str(each.message) for each in told) == 1
    with tokengate.record(made.model.eval()) as rec, torch.no_grad():
        made.model(torch.randint(1, 32, (64, 8)))
    assert rec.report().sparsity < 0.87


def test_what_is_stopped_after_the_target_is_settled(tmp_path):
    """As in the last step: the model is called again, in evaluation, with what it was given."""

    class Stops(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= state.global_step == 20

    for settle in (True, False):
        callback = TokenGateCallback(target_sparsity=0.6, settle=settle)
        made, _ = trainer(tmp_path, None, callback, more=[Stops()], max_steps=25)
        trained = []
        made.model.register_forward_hook(lambda model, *_, to=trained: to.append(model.training))
        made.train()
        assert made.state.global_step == 20
        assert trained.count(False) == (trained.count(True) if settle else 0)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.6])
def test_a_best_checkpoint_that_closes_another_share_is_told_of(tmp_path, share, several):
    """It has the thresholds that were followed up to it, whose share its evaluation counts."""

    class Best(transformers.Trainer):
        def evaluate(self, *args, **kwargs):
            return super().evaluate(*args, **kwargs) | {"eval_first": -self.state.global_step}

    class Follows(transformers.TrainerCallback):
        """Thresholds that close this share, by bisection."""

        def on_step_end(self, args, state, control, model, **_):
            every = [Texts()[i] for i in range(64)]
            batch = {key: torch.stack([each[key] for each in every]) for key in every[0]}
            low, high = 0.0, 64.0
            for _ in range(30 if state.global_step == 20 else 0):
                middle = (low + high) / 2
                for layer in tokengate.layers(model).values():
                    layer.gate.tau.data.fill_(middle)
                with torch.no_grad(), tokengate.record(model) as rec:
                    model(**batch)
                low, high = (middle, high) if rec.report().sparsity < share else (low, middle)

    best = {"load_best_model_at_end": True, "metric_for_best_model": "first", "save_steps": 20}
    asked = {"eval_strategy": "steps", "eval_steps": 20, "save_strategy": "steps", "max_steps": 25}
    callback = TokenGateCallback(target_sparsity=0.6)
    data = {"a": Texts(), "b": Texts()} if several else Texts()
    made, _ = trainer(
        tmp_path, None, False, Best, [Follows(), callback], eval_dataset=data, **asked, **best
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", tokengate.errors.UnreachedSparsityWarning)
        made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-20")
    told = [str(each.message) for each in caught if "the model is that of" in str(each.message)]
    assert ["step 20 of 25, which closed 50%" in each for each in told] == [True] * (share == 0.5)
