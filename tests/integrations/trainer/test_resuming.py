"""What is killed and resumed ends bit for bit as what was not."""

import signal

import pytest
import torch

import tokengate
from tokengate import TokenGateError

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("accelerate", reason="the transformers extra is not installed")

import trainer_runs as runs  # noqa: E402
from trainer_runs import (  # noqa: E402
    hooks,
    language_model,
    resumable,
    trained,
    trainer,
    values,
)

from tokengate.integrations.trainer import TokenGateCallback  # noqa: E402
from tokengate.integrations.trainer.tau_steps import TauSteps  # noqa: E402

# One thread as in the processes started here.
pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerate")


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


@pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")  # without the callback
def test_a_checkpoint_that_does_not_fit(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 4}
    trained(tmp_path / "with", **saving)
    trained(tmp_path / "without", callback=False, **saving)
    for folder, options, message in (
        ("without", {}, "has nothing of TokenGateCallback"),
        (
            "with",
            {"callback": TokenGateCallback(target_sparsity=0.5)},
            "no state of the sparsity_schedule",
        ),
    ):
        made, _ = trainer(tmp_path / folder, **options, **saving)
        with pytest.raises(TokenGateError, match=message):
            made.train(resume_from_checkpoint=str(tmp_path / folder / "checkpoint-4"))
        assert not hooks(made.optimizer)

    for model, message in (
        (language_model(scale=3.0), r"LoRA\(rank=4, scale=0.5\) in the .* scale=3\)"),
        (language_model("adapter"), r"is LoRA.* and Adapter"),
    ):
        made, _ = trainer(tmp_path / "with", model, **saving)
        with pytest.raises(TokenGateError, match=f"'model.layers.0.*{message}"):
            made.train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-4"))
    # The same by other words, but for dropout.
    made, _ = trainer(tmp_path / "with", language_model(dropout=0.1, alpha=2), **saving)
    made.train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-4"))

    made, _ = trainer(tmp_path / "with", **saving)
    made._load_from_checkpoint = lambda folder: None
    with pytest.raises(TokenGateError, match="let the Trainer load model and optimizer from one"):
        made.train(resume_from_checkpoint=str(tmp_path / "with" / "checkpoint-4"))


def test_trained_again_it_goes_on(tmp_path):
    """As the Trainer does, which keeps its optimiser: no second set of hooks, Adam's steps add."""
    made, _ = trainer(tmp_path)
    made.train()
    assert not hooks(made.optimizer)
    made.train()
    assert not hooks(made.optimizer)
    saved = made.optimizer.state_dict()["state"]["tokengate"]["taus"]
    assert {int(state["step"]) for state in saved.values()} == {16}
