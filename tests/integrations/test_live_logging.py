"""What is shown live, read back from where it was written."""

import sys
import types

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence

import tokengate
from tokengate.integrations.live_logging import log_to_tensorboard, scalars, sparsities
from tokengate.reports.report import ModuleSparsity, SparsityReport

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("tensorboard", reason="the test extra is not installed")
pytest.importorskip("matplotlib", reason="the viz extra is not installed")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from torch.utils.tensorboard import SummaryWriter  # noqa: E402
from trainer_runs import Texts, language_model, trainer  # noqa: E402
from transformers.integrations import TensorBoardCallback, WandbCallback  # noqa: E402

from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerate")

PROJECTIONS = ["q_proj", "v_proj", "up_proj"]
OF_A_LOSS = {"sparsity", "tau_mean", "tau_min", "tau_max", "penalty"}
OF_A_LOSS |= {f"sparsity_{projection}" for projection in PROJECTIONS}


def written(folder):
    """The scalars as {tag: {step: value}}, and the images as {tag: {step: (height, width)}}."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    numbers = {t: {e.step: e.value for e in events.Scalars(t)} for t in tags["scalars"]}
    images = {t: {e.step: (e.height, e.width) for e in events.Images(t)} for t in tags["images"]}
    return numbers, images


def report():
    found = {"m.0.q": (0.25, 0.5), "m.0.v": (1.0, -1.0), "m.1.q": (0.75, 2.0)}
    return SparsityReport({n: ModuleSparsity(s, 1, 4, 2, tau) for n, (s, tau) in found.items()})


def patched(**options):
    return away_from_initialisation(tokengate.patch(Net(), ["q_proj", "v_proj"], **options))


def test_the_names_and_numbers():
    expected = {"sparsity": 2 / 3, "sparsity_q": 0.5, "sparsity_v": 1.0}
    assert sparsities(report()) == pytest.approx(expected)
    model = patched(penalty=0.25)
    first, *_ = tokengate.layers(model).values()
    first.gate.penalty = 1.25
    expected |= {"tau_mean": 0.5, "tau_min": -1.0, "tau_max": 2.0, "penalty": 0.5}
    assert scalars(model, report()) == pytest.approx(expected)
    broken = {"m.2.q": ModuleSparsity(0.5, 1, 4, 2, tau=float("nan"))}
    first.gate.skipped = 3
    found = scalars(model, SparsityReport(report().modules | broken))
    expected |= {"sparsity": 0.625, "tau_broken": 1, "tau_skipped": 3}
    assert found == pytest.approx(expected)


def test_what_is_not_there_has_no_name():
    uncalled = SparsityReport({"m.0.q": ModuleSparsity(float("nan"), 0, 0, 0, None)})
    assert sparsities(uncalled) == {}
    assert scalars(patched(gate=False), uncalled) == {}
    with one_sentence("patch"):
        scalars(Net(), report())


def test_a_loop_of_one_s_own(tmp_path):
    model = patched(tau=1.0, penalty=1e-3)
    with SummaryWriter(str(tmp_path)) as writer:
        reports = {}
        for step in (3, 7):
            with tokengate.record(model) as rec:
                model(torch.randn(2, 5, 8))
            reports[step] = rec.report()
            log_to_tensorboard(writer, model, reports[step], step, heatmap=step == 7)
        log_to_tensorboard(writer, model, reports[3], 7, prefix="eval")
    numbers, images = written(tmp_path)
    for step, found in reports.items():
        assert 0 < found.sparsity < 1
        for name, value in scalars(model, found).items():
            assert numbers[f"train/{name}"][step] == pytest.approx(value)
    assert numbers["train/sparsity"].keys() == {3, 7}
    assert numbers["eval/sparsity_q_proj"] == {
        7: pytest.approx(sparsities(reports[3])["sparsity_q_proj"])
    }
    assert images.keys() == {"train/sparsity_heatmap"}
    (height, width) = images["train/sparsity_heatmap"][7]
    assert min(height, width) > 200


def run(folder, kind, *callbacks, callback=None, **options):
    """A training of 8 steps that logs at 4 and 8, and evaluates at 8."""
    callback = callback or TokenGateCallback(s=5e-3, details=True)
    options |= {"eval_dataset": Texts(8), "eval_strategy": "steps", "eval_steps": 8}
    made, _ = trainer(folder, language_model(tau=0.5), callback, kind, **options)
    for each in callbacks:
        made.callback_handler.callbacks.insert(0, each)
    made.train()
    return made


@pytest.mark.parametrize("kind", [transformers.Trainer, TokenGateTrainer])
def test_the_trainer_s_tensorboard(tmp_path, kind, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    made = run(tmp_path, kind, report_to="tensorboard")
    assert any(isinstance(c, TensorBoardCallback) for c in made.callback_handler.callbacks)
    numbers, images = written(tmp_path / "events")
    assert {tag: set(steps) for tag, steps in images.items()} == {
        "train/sparsity_heatmap": {4, 8},
        "eval/sparsity_heatmap": {8},
    }
    logged = {entry["step"]: entry for entry in made.state.log_history if "loss" in entry}
    assert logged.keys() == {4, 8}
    (evaluated,) = (entry for entry in made.state.log_history if "eval_loss" in entry)
    for step, entry in logged.items():
        assert entry.keys() >= OF_A_LOSS
        assert sum(entry[f"sparsity_{p}"] for p in PROJECTIONS) / 3 == pytest.approx(
            entry["sparsity"]
        )
        assert entry["penalty"] == pytest.approx(1e-4)
        # The plain Trainer's reporters are told before a callback can add to it.
        for name in OF_A_LOSS if kind is TokenGateTrainer else ():
            assert numbers[f"train/{name}"][step] == pytest.approx(entry[name])
    own = {name for name in evaluated if "sparsity" in name}
    assert own == {"eval_sparsity", *(f"eval_sparsity_{p}" for p in PROJECTIONS)}
    assert ("eval/sparsity_q_proj" in numbers) == (kind is TokenGateTrainer)
    assert "train/loss" in numbers


def test_without_details_the_logs_are_as_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    plain = TokenGateCallback(s=5e-3)
    made = run(tmp_path, TokenGateTrainer, callback=plain, report_to="tensorboard")
    numbers, images = written(tmp_path / "events")
    assert images == {}
    own = {n for entry in made.state.log_history for n in entry if "sparsity" in n or "tau" in n}
    assert own == {"sparsity", "eval_sparsity", "tau_mean", "tau_min", "tau_max"}
    assert {tag for tag in numbers if "sparsity" in tag} == {"train/sparsity", "eval/sparsity"}


def test_an_evaluation_after_the_training_and_a_prediction(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    made = run(tmp_path, TokenGateTrainer, report_to="tensorboard")
    found = made.predict(Texts(8)).metrics
    assert "test_sparsity_q_proj" in found
    _, before = written(tmp_path / "events")
    made.evaluate(metric_key_prefix="later")
    _, after = written(tmp_path / "events")
    assert set(after) - set(before) == {"train/later_sparsity_heatmap"}


class Wandb(WandbCallback):
    """Transformers' own, with a stand-in for the library."""

    def __init__(self):
        self.told = []
        self._wandb = types.SimpleNamespace(
            log=self.told.append,
            Image=lambda pixels: ("image", pixels.shape),
            run=types.SimpleNamespace(summary={}),
        )
        self._initialized = True

    def __getattr__(self, name):
        raise AssertionError(f"not in the stand-in: {name}")

    on_train_begin = on_train_end = transformers.TrainerCallback.on_train_begin


def test_weights_and_biases(tmp_path):
    wandb = Wandb()
    run(tmp_path, TokenGateTrainer, wandb)
    seen = {(tag, told["train/global_step"]): told[tag] for told in wandb.told for tag in told}
    for step in (4, 8):
        assert {f"train/{name}" for name in OF_A_LOSS} <= {tag for tag, at in seen if at == step}
        kind, shape = seen["train/sparsity_heatmap", step]
        assert kind == "image"
        assert shape[2] == 3
    assert ("eval/sparsity_heatmap", 8) in seen
    assert ("eval/sparsity_v_proj", 8) in seen
    assert sum("train/sparsity_heatmap" in told for told in wandb.told) == 2


def test_the_trainer_tells_a_history(tmp_path):
    model = language_model(tau=0.5)
    history = tokengate.History(model)
    callback = TokenGateCallback(s=5e-3, history=history)
    made, path = trainer(tmp_path, model, callback, TokenGateTrainer, logging_steps=2)
    made.train()
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    assert history.steps == [2, 4, 6, 8] == [entry["step"] for entry in logged]
    assert history.losses == [entry["loss"] for entry in logged]
    assert history.sparsity == pytest.approx([entry["sparsity"] for entry in logged])
    assert len(set(history.sparsity)) > 1
    after_each = path.stacked()[1::2]
    for column, taus in zip(after_each.T, history.taus.values(), strict=True):
        assert taus == column.tolist()


def test_a_resumed_training_goes_on_with_its_history(tmp_path):
    def training(history, model, **options):
        callback = TokenGateCallback(s=5e-3, history=history)
        saving = {"save_strategy": "steps", "save_steps": 4, "logging_steps": 2}
        return trainer(tmp_path, model, callback, TokenGateTrainer, **saving, **options)[0]

    model = language_model(tau=0.5)
    whole = tokengate.History(model)
    training(whole, model).train()
    whole.save(tmp_path / "history.json")
    model = language_model(tau=0.5)
    again = tokengate.History.load(tmp_path / "history.json", model)
    assert again.steps == [2, 4, 6, 8]
    training(again, model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.to_dict() == whole.to_dict()


def test_refusals(monkeypatch):
    with one_sentence("details=1", "True nor False"):
        TokenGateCallback(details=1)
    with one_sentence("history", "list", "tokengate.History(model)"):
        TokenGateCallback(history=[])
    monkeypatch.setitem(sys.modules, "tokengate.integrations.plots", None)
    with pytest.raises(ModuleNotFoundError):  # of our own, which is not explained away
        TokenGateCallback(details=True)
    monkeypatch.delitem(sys.modules, "tokengate.integrations.plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with one_sentence("matplotlib", "tokengate[viz]"):
        TokenGateCallback(details=True)
