"""Sparsity and tau in the Trainer's logs."""

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("accelerate", reason="the transformers extra is not installed")

import trainer_runs as runs  # noqa: E402
from trainer_runs import language_model, taus, trained, trainer  # noqa: E402

from tokengate.integrations.trainer import TokenGateTrainer  # noqa: E402
from tokengate.layers import calls  # noqa: E402

# One thread as in the processes started here.
pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerate")


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
        assert not calls.OPEN


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
