"""TokenGateTrainer's checkpoints have the adapter alone, and what goes on from them is exact."""

import pathlib
import types

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("accelerate", reason="the transformers extra is not installed")
from trainer_runs import language_model, trainer  # noqa: E402

from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer  # noqa: E402
from tokengate.integrations.trainer.checkpoints import is_whole, last_checkpoint  # noqa: E402

SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8}


class Stop(transformers.TrainerCallback):
    def on_step_end(self, args, state, control, **context):
        control.should_training_stop = state.global_step == 3


def made(folder, model=None, more=(), **options):
    model = model or language_model("adalora", target_rank=2, dropout=0.2)
    options = SAVING | options
    return trainer(folder, model, kind=TokenGateTrainer, more=more, **options)[0]


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


def test_a_checkpoint_has_the_adapter_in_place_of_the_model(tmp_path):
    made(tmp_path, more=[Stop()]).train()
    folder = tmp_path / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    assert {"tokengate_config.json", "adapter_model.safetensors", "training_args.bin"} <= names
    assert not [name for name in names if name.startswith("model")]

    whole = made(tmp_path / "whole")
    whole.train()
    resumed = made(tmp_path)
    start = values(resumed.model)
    resumed.train(resume_from_checkpoint=True)
    assert not equal(values(resumed.model), start)
    assert equal(values(resumed.model), values(whole.model))
    card = tmp_path / "last" / "README.md"
    for evaluated in (False, True):
        if evaluated:
            sparsity = whole.evaluate(whole.train_dataset)["eval_sparsity"]
        whole.save_model(card.parent)
        assert ("## Which positions" in card.read_text()) == evaluated
    assert f"Sparsity {100 * sparsity:.1f} %" in card.read_text()


class Killed(BaseException):
    """As of the process: nothing is done after it."""


def killed_in_its_second_checkpoint(folder):
    """The folder has checkpoint-3, and of checkpoint-6 all but the states of random numbers."""
    ours, save = made(folder), TokenGateTrainer._save_rng_state

    def kill(self, output_dir):
        if output_dir.endswith("checkpoint-6"):
            raise Killed
        save(self, output_dir)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TokenGateTrainer, "_save_rng_state", kill)
        with pytest.raises(Killed):
            ours.train()
    names = {path.name for path in (folder / "checkpoint-6").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "trainer_state.json" not in names


def test_a_training_goes_on_from_the_last_whole_checkpoint(tmp_path):
    killed_in_its_second_checkpoint(tmp_path)
    whole = made(tmp_path / "whole")
    whole.train()
    resumed = made(tmp_path)
    with pytest.warns(UserWarning, match=r"checkpoint-6' was not saved to its end.*checkpoint-3'"):
        resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert equal(values(resumed.model), values(whole.model))
    # It has saved that one anew, so that there is nothing left to be warned of.
    assert is_whole(tmp_path / "checkpoint-6")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-8")


def test_a_state_that_is_half_written_is_none(tmp_path):
    killed_in_its_second_checkpoint(tmp_path)
    state = tmp_path / "checkpoint-3" / "trainer_state.json"
    text = state.read_text()
    state.write_text(text[: len(text) // 2])
    resumed = made(tmp_path)
    start = values(resumed.model)
    for asked, words in [(True, "found only"), (str(state.parent), "checkpoint-3' was not saved")]:
        with pytest.raises(tokengate.TokenGateError, match=words):
            resumed.train(resume_from_checkpoint=asked)
    assert equal(values(resumed.model), start)


def test_a_checkpoint_that_is_saved_again_is_not_whole_by_its_old_state(tmp_path):
    made(tmp_path, max_steps=6).train()
    assert (tmp_path / "checkpoint-6" / "trainer_state.json").exists()
    killed_in_its_second_checkpoint(tmp_path)


def test_a_checkpoint_of_a_plain_trainer_is_read_as_before(tmp_path):
    model = language_model("adalora", target_rank=2, dropout=0.2)
    trainer(tmp_path, model, more=[Stop()], **SAVING)[0].train()
    assert (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    whole, resumed = made(tmp_path / "whole"), made(tmp_path)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert equal(values(resumed.model), values(whole.model))


def test_save_model_is_read_by_load(tmp_path):
    ours = made(tmp_path, save_strategy="no")
    ours.train()
    ours.save_model(str(tmp_path / "kept"))
    other = language_model("adalora", target_rank=2)
    assert not equal(values(other), values(ours.model))
    tokengate.load(other, tmp_path / "kept")
    assert equal(values(other), values(ours.model))


@pytest.mark.parametrize("holder", ["processing_class", "data_collator"])
def test_a_tokenizer_is_kept_whoever_holds_it(tmp_path, holder):
    """As the Trainer keeps it."""

    class Words:
        def save_pretrained(self, folder):
            (pathlib.Path(folder) / "words.json").write_text("{}")

    ours = made(tmp_path)
    ours.processing_class = None
    ours.save_model(str(tmp_path / "without"))
    assert not (tmp_path / "without" / "words.json").exists()
    held = {"processing_class": Words(), "data_collator": types.SimpleNamespace(tokenizer=Words())}
    setattr(ours, holder, held[holder])
    ours.save_model(str(tmp_path / "kept"))
    assert (tmp_path / "kept" / "words.json").exists()


def test_the_best_model_is_given_back(tmp_path):
    class Scored(TokenGateTrainer):
        """The second evaluation, of step 6, is the best."""

        def evaluate(self, *args, **kwargs):
            seen.append(values(self.model))
            metrics = {"eval_loss": [3.0, 1.0, 2.0][len(seen) - 1]}
            self.log(metrics)
            self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

    seen = []
    model = language_model()
    best = trainer(
        tmp_path, model, kind=Scored, eval_strategy="steps", eval_steps=3,
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=False,
        **(SAVING | {"max_steps": 9}), eval_dataset=[{"input_ids": torch.tensor([1, 2])}],
    )[0]  # fmt: skip
    best.train()
    assert pathlib.Path(best.state.best_model_checkpoint).name == "checkpoint-6"
    assert not equal(seen[2], seen[1])
    assert equal(values(model), seen[1])


def test_running_statistics_are_kept_with_the_whole_model(tmp_path):
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)

        def forward(self, x, labels=None):
            found = self.norm(self.linear(x))
            return torch.nn.functional.cross_entropy(found, labels), found

    torch.manual_seed(0)
    model = Normed()
    start = model.norm.running_mean.clone()
    tokengate.patch(model, "linear", rank=2)
    data = [{"x": torch.randn(4), "labels": torch.tensor(i % 2)} for i in range(16)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    TokenGateTrainer(
        model, arguments, train_dataset=data, callbacks=[TokenGateCallback(s=1e-3)]
    ).train()
    assert not torch.equal(model.norm.running_mean, start)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").exists()
