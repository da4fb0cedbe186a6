"""Quantised models in the Trainer: adapters are attached to them while it is made, not later."""

import signal
import warnings

import pytest
import torch

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
pytest.importorskip("accelerate", reason="the transformers extra is not installed")
pytest.importorskip("bitsandbytes", reason="the test extra is not installed")
import quantised_llama as llama  # noqa: E402
from trainer_runs import Texts, arguments, taus, trainer  # noqa: E402

from tokengate.integrations.trainer import TokenGateCallback, TokenGateTrainer, attached  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerate")

TRAINED = {".A", ".B", "magnitude", "tau"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return llama.save_base(tmp_path_factory.mktemp("base"))


def own(model):
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) for name, value in expected.items()
    )


@pytest.mark.parametrize("kind", llama.QUANTISED)
def test_a_quantised_model_is_trained(folder, tmp_path, kind):
    if kind == "int8 of torchao":
        pytest.importorskip("torchao", reason="the test extra is not installed")
    model = llama.patched(folder, kind)
    start = own(model)
    with pytest.raises(ValueError, match="purely quantized"):
        transformers.Trainer(model, arguments(tmp_path), train_dataset=Texts())
    made, _ = trainer(tmp_path, model, kind=TokenGateTrainer)
    assert equal(own(model), start)
    made.train()
    found = own(model)
    assert not any(torch.equal(found[name], value) for name, value in start.items())
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_a_quantised_model_that_is_not_patched_is_refused_as_before(folder, tmp_path):
    with pytest.raises(ValueError, match="purely quantized"):
        trainer(tmp_path, llama.base(folder), kind=TokenGateTrainer)


def test_a_model_that_the_trainer_asks_for_is_trained(folder, tmp_path):
    made = TokenGateTrainer(
        model_init=lambda: llama.patched(folder),
        args=arguments(tmp_path, max_steps=2, logging_strategy="no"),
        train_dataset=Texts(),
        callbacks=[TokenGateCallback(s=5e-3)],
    )
    start = taus(made.model)
    made.train()
    assert not torch.equal(taus(made.model), start)
    assert not getattr(made.call_model_init(), "_hf_peft_config_loaded", False)


class Casting(transformers.Trainer):
    """As TRL's trainers begin where the base has 4 or 8 bits."""

    def __init__(self, model, *args, **kwargs):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        super().__init__(model, *args, **kwargs)


@pytest.mark.parametrize("fails", [False, True], ids=["made", "not made"])
def test_what_is_trained_is_not_rounded(folder, tmp_path, fails):
    model = llama.patched(folder)
    start, tau = own(model), tokengate.layers(model)["model.layers.0.mlp.up_proj"].gate.tau
    wrong = {"callbacks": 3} if fails else {}
    with pytest.raises(TypeError) if fails else attached(model), attached(model):
        Casting(model, arguments(tmp_path), train_dataset=Texts(), **wrong)
    assert tau.dtype == torch.float32
    assert tau.item() == pytest.approx(0.3, abs=1e-7)
    assert equal(own(model), start)
    assert "_hf_peft_config_loaded" not in vars(model)
    for parameter in model.parameters():  # the test can fail
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    assert tau.item() == 0.30078125


def test_save_pretrained_is_as_before(folder, tmp_path):
    def written(name):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are better ways
            model.save_pretrained(tmp_path / name)
        return {file.name for file in (tmp_path / name).iterdir()}

    model = llama.patched(folder)
    before = written("before")
    assert "model.safetensors" in before
    trainer(tmp_path, model, kind=TokenGateTrainer)
    assert written("after") == before
    model._hf_peft_config_loaded = True  # the test can fail
    with pytest.raises((AttributeError, ImportError, ValueError)):
        written("attached")


def test_killed_resumed_saved_and_loaded_into_a_fresh_base(folder, tmp_path, processes):
    ours, theirs = processes.Pipe()
    process = processes.Process(target=llama.halting, args=(tmp_path / "killed", folder, theirs))
    process.start()
    whole = llama.resumable(tmp_path / "whole", folder)
    start = own(whole.model)
    whole.train()
    assert ours.poll(120)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL

    resumed = llama.resumable(tmp_path / "killed", folder)
    resumed.train(resume_from_checkpoint=True)
    expected = own(whole.model)
    assert not any(torch.equal(value, start[name]) for name, value in expected.items())
    assert all(any(end in name for name in expected) for end in TRAINED)
    assert equal(own(resumed.model), expected)

    resumed.save_model(tmp_path / "adapter")
    fresh = llama.base(folder)
    batch = {"input_ids": Texts().ids[:8], "attention_mask": Texts().real[:8].long()}
    with torch.no_grad():
        plain = fresh(**batch).logits
        trained = resumed.model.eval()(**batch).logits
        tokengate.load(fresh, tmp_path / "adapter")
        loaded = fresh.eval()(**batch).logits
    assert (trained - plain).abs().max() > 1e-2
    assert torch.equal(loaded, trained)
