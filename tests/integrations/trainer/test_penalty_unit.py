"""Lambda is in the unit of a whole step: micro-batches, two ranks, 16 bit, Accelerate."""

import json
import types
import warnings

import pytest
import torch

import tokengate
from tokengate import TokenGateError

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")
accelerate = pytest.importorskip("accelerate", reason="the transformers extra is not installed")

import trainer_runs as runs  # noqa: E402
import two_ranks  # noqa: E402
from accelerate_state import reset  # noqa: E402
from trainer_runs import Scaled, language_model, taus, trained, values  # noqa: E402

from tokengate.integrations.trainer import set_penalty_unit  # noqa: E402
from tokengate.integrations.trainer.engines import engine_of  # noqa: E402
from tokengate.training import scale_penalty  # noqa: E402

# One thread as in the processes started here.
pytestmark = pytest.mark.usefixtures("one_thread", "own_accelerate")


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


def test_16_bit_follows_float32(tmp_path, monkeypatch):
    def path(**options):
        reset()
        return trained(tmp_path, language_model(penalty=1e-2), **options)[1]

    expected = path()
    assert (expected[-1] - expected[0]).abs().min() > 0.02
    assert 0 < (path(bf16=True) - expected).abs().max() < 1e-3
    assert 0 < (path(kind=Scaled) - expected).abs().max() < 1e-4
    monkeypatch.setattr(scale_penalty, "scale_penalty", lambda model, factor: None)
    assert (path(kind=Scaled) - expected).abs().max() > 3e-3


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
