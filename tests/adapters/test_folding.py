"""fold: what the gates decide alike is done once, and can be undone."""

import copy
import math
import pickle

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence, snapshot
from saved_adapters import refused, same, values
from torch import nn

import tokengate
from tokengate import TokenGateError

LINEAR = ["lora", "dora", "adalora"]
DATA = [torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
ELSEWHERE = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(9))


def mixed(method="lora", dtype=torch.float32, **options):
    """Layers that are open everywhere, closed everywhere, and in part, on DATA."""
    torch.manual_seed(0)
    model = Net().to(dtype)
    tokengate.patch(model, ["q_proj", "v_proj", "fc1"], method=method, **options)
    away_from_initialisation(model, 0.3)
    tokengate.calibrate(model, [x.to(dtype) for x in DATA], 0.5)
    for name, layer in tokengate.layers(model).items():
        if "q_proj" in name:
            layer.gate.tau.data.fill_(0.0)
        if "v_proj" in name:
            layer.gate.tau.data.fill_(1e4)
    return model


def outputs(model):
    model.eval()
    with torch.no_grad():
        return torch.cat([model(x.to(next(model.parameters()).dtype)) for x in DATA])


def names(model):
    return list(tokengate.layers(model))


@pytest.mark.parametrize("method", LINEAR)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_outputs_stay_and_the_layers_are_plain(method, dtype):
    model = mixed(method, dtype)
    before, base = outputs(model), outputs(tokengate.unpatch(mixed(method, dtype)))
    assert (before - base).abs().max() > 1e-2
    folding = tokengate.fold(model, [x.to(dtype) for x in DATA])
    assert folding.names("merged") == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert folding.names("dropped") == ["blocks.0.v_proj", "blocks.1.v_proj"]
    assert folding.names("kept") == names(model) == ["blocks.0.fc1", "blocks.1.fc1"]
    assert type(model.blocks[0].q_proj) is type(model.blocks[1].v_proj) is nn.Linear
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert (outputs(model) - before).abs().max() < tolerance
    assert folding.error < tolerance
    assert not torch.equal(
        model.blocks[0].q_proj.weight, mixed(method, dtype).blocks[0].q_proj.weight
    )


@pytest.mark.parametrize("method", LINEAR)
def test_the_merged_weight_is_the_references(method):
    """W0 + M's matrix, from the equations, one row at a time."""
    model = mixed(method, torch.float64)
    layer = model.blocks[0].q_proj
    W0, m = layer.weight.detach().clone(), layer.modification
    p = {name: value.detach() for name, value in m.named_parameters()}
    rows = []
    for j in range(len(W0)):
        if method == "adalora":
            rows.append(
                W0[j] + m.scale * sum(p["P"][j, r] * p["E"][r] * p["Q"][r] for r in range(m.rank))
            )
            continue
        row = W0[j] + m.scale * sum(p["B"][j, r] * p["A"][r] for r in range(len(p["A"])))
        if method == "dora":
            row = p["magnitude"][j] * row / sum(float(v) ** 2 for v in row) ** 0.5
        rows.append(row)
    assert (torch.stack(rows) - W0).abs().max() > 0.05
    tokengate.fold(model, [x.double() for x in DATA])
    assert torch.allclose(layer.weight, torch.stack(rows), atol=1e-12, rtol=0)


@pytest.mark.parametrize("way", ["undo", "unpatch"])
def test_it_is_undone_exactly(way):
    model = mixed("dora")
    outputs(model)
    patched = snapshot(model)
    base = snapshot(tokengate.unpatch(mixed("dora")).eval())["values"]
    folding = tokengate.fold(model, DATA)
    assert snapshot(model) != patched
    if way == "undo":
        folding.undo()
        assert snapshot(model) == patched
        tokengate.fold(model, DATA)  # and again
    assert snapshot(tokengate.unpatch(model))["values"] == base
    assert not any("tokengate" in key for m in model.modules() for key in vars(m))
    assert type(model.blocks[0].q_proj) is nn.Linear


def test_what_is_undone_has_its_adapters_name(tmp_path):
    tokengate.save(mixed(), tmp_path)
    model = Net()
    tokengate.load(model, tmp_path, name="french")
    before = snapshot(model)
    tokengate.fold(model, DATA).undo()
    assert snapshot(model) == before
    base = outputs(model)
    with tokengate.use(model, None):
        assert not torch.equal(outputs(model), base)
    tokengate.use(model, "french")
    assert torch.equal(outputs(model), base)


def test_disabled_is_the_base():
    model = mixed()
    base = outputs(tokengate.unpatch(mixed()))
    tokengate.fold(model, DATA)
    folded = outputs(model)
    assert not torch.equal(folded, base)
    with tokengate.disabled(model):
        assert torch.equal(outputs(model), base)
        with tokengate.disabled(model):
            assert torch.equal(outputs(model), base)
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(model), folded)


@pytest.mark.parametrize("way", ["undo", "unpatch"])
def test_what_is_undone_while_disabled_keeps_w0(way):
    model = mixed()
    before, base = outputs(model), outputs(tokengate.unpatch(mixed()))
    folding = tokengate.fold(model, DATA)
    with tokengate.disabled(model):
        folding.undo() if way == "undo" else tokengate.unpatch(model)
    assert torch.equal(outputs(model), before if way == "undo" else base)


def test_what_was_offloaded_since_is_not_unfolded_to_something_else():
    accelerate = pytest.importorskip("accelerate")
    model = tokengate.patch(Net(), ["fc1"], gate=False)
    away_from_initialisation(model)
    folding = tokengate.fold(model, DATA)
    folded = outputs(model)
    accelerate.cpu_offload(model, execution_device="cpu")

    def disable():
        with tokengate.disabled(model):
            pass

    for way in (folding.undo, lambda: tokengate.unpatch(model), disable):
        with pytest.raises(TokenGateError, match="offloaded after it was folded"):
            way()
    with torch.no_grad():
        assert torch.equal(torch.cat([model(x) for x in DATA]), folded)


def test_a_refused_unpatch_leaves_the_model_folded():
    class DistributedDataParallel(nn.Sequential):  # by whose name wrappers are found
        __module__ = "torch.nn.parallel"

    model = mixed()
    tokengate.fold(model, DATA)
    wrapped = DistributedDataParallel(model)
    before = snapshot(wrapped)
    with pytest.raises(TokenGateError, match="is wrapped by"):
        tokengate.unpatch(wrapped)
    assert snapshot(wrapped) == before


@pytest.mark.parametrize("wrap", ["DistributedDataParallel", "FSDP2", "compile"])
def test_a_wrapped_model_is_refused(wrap):
    model = mixed()
    outputs(model)
    if wrap == "compile":
        wrapped, wrapper = torch.compile(model), "torch.compile"
    else:
        name, wrapper = (wrap, wrap) if wrap[0] == "D" else ("FSDPModule", "fully_shard")
        # By whose name wrappers are found.
        kind = type(name, (nn.Sequential,), {"__module__": "torch.nn.parallel"})
        wrapped = kind(model)
    before = snapshot(wrapped)
    refused_fold(wrapped, before, f"^fold found '.*' wrapped by {wrapper}, .*wrap it then", DATA)
    tokengate.fold(model, DATA)
    assert snapshot(wrapped) != before


def test_fold_within_disabled_is_refused():
    model = mixed()
    outputs(model)
    before = snapshot(model)
    base = outputs(tokengate.unpatch(mixed()))
    with tokengate.disabled(model):
        with pytest.raises(TokenGateError, match=r"outside of tokengate\.disabled"):
            tokengate.fold(model, DATA)
        assert torch.equal(outputs(model), base)
    assert snapshot(model) == before
    with tokengate.disabled(model.blocks[1]), pytest.raises(TokenGateError, match=r"'blocks\.1\."):
        tokengate.fold(model, DATA)


def test_a_model_folded_whole_is_plain_and_still_ours():
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["fc1", "fc2"], gate=False)
    away_from_initialisation(model)
    before, base = outputs(model), outputs(tokengate.unpatch(copy.deepcopy(model)))
    tokengate.fold(model, DATA)
    assert tokengate.layers(model) == {}
    assert torch.allclose(outputs(model), before, atol=1e-5)
    with tokengate.disabled(model):
        assert torch.equal(outputs(model), base)
    assert torch.equal(outputs(tokengate.unpatch(model)), base)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_folded_and_unfolded_on_its_own(copied):
    model = mixed()
    base = outputs(tokengate.unpatch(mixed()))
    tokengate.fold(model, DATA)
    folded, twin = outputs(model), copied(model)
    assert torch.equal(outputs(twin), folded)
    assert torch.equal(outputs(tokengate.unpatch(twin)), base)
    assert torch.equal(outputs(model), folded)


def test_saved_and_loaded_it_computes_the_same(tmp_path):
    model = mixed("dora")
    tokengate.fold(model, DATA)
    folded = outputs(model)
    for place in ("plain", "disabled"):
        if place == "plain":
            tokengate.save(model, tmp_path / place)
        else:
            with tokengate.disabled(model):
                tokengate.save(model, tmp_path / place)
        torch.manual_seed(0)
        other = Net()
        tokengate.load(other, tmp_path / place)
        assert names(other) == [
            "blocks.0.q_proj", "blocks.0.fc1", "blocks.1.q_proj", "blocks.1.fc1",
        ]  # fmt: skip
        assert other.blocks[0].q_proj.gate is None
        assert other.blocks[0].fc1.gate is not None
        assert torch.allclose(outputs(other), folded, atol=1e-5)
        assert not torch.allclose(outputs(tokengate.unpatch(other)), folded, atol=1e-2)
    refused(model, tmp_path / "plain", "folded", "undo")


def test_what_was_dropped_whole_is_nothing_to_save(tmp_path):
    model = mixed()
    for layer in tokengate.layers(model).values():
        layer.gate.tau.data.fill_(1e4)
    folding = tokengate.fold(model, DATA)
    assert len(folding.names("dropped")) == 6
    with pytest.raises(TokenGateError, match="were dropped by fold"):
        tokengate.save(model, tmp_path / "a")
    folding.undo()
    tokengate.save(model, tmp_path / "a")


def test_a_report_is_as_good_as_its_data():
    model = mixed()
    model.eval()
    with tokengate.record(model) as rec:
        for x in DATA:
            model(x)
    folding = tokengate.fold(model, rec.report())
    assert folding.error is None
    assert folding.names("merged") == ["blocks.0.q_proj", "blocks.1.q_proj"]
    assert "merged" in str(folding)
    assert "closed at every position" in str(folding)


def test_what_was_not_quite_alike_is_folded_by_force_and_its_error_told():
    model = mixed()
    model.eval()
    tokengate.calibrate(model, DATA, 0.05)
    for name, each in tokengate.layers(model).items():
        if name != "blocks.0.fc1":
            each.gate.tau.data.zero_()
    with tokengate.record(model) as rec:
        for x in DATA:
            model(x)
    assert 0 < rec.report().by_module["blocks.0.fc1"] < 0.1
    before = outputs(model)
    kept = tokengate.fold(model, DATA)
    assert kept.names("kept") == ["blocks.0.fc1"]
    kept.undo()
    folding = tokengate.fold(model, DATA, force=0.9)
    assert folding.names("kept") == []
    measured = ((outputs(model) - before).norm() / before.norm()).item()
    assert measured > 1e-4
    assert folding.error == pytest.approx(measured, rel=1e-3)
    assert f"{measured:.2g}" in str(folding)


def test_of_an_output_that_is_a_dict_the_error_is_of_its_logits():
    model = mixed()
    model.register_forward_hook(lambda *call: {"mask": torch.zeros(3, 5), "logits": call[-1]})
    assert tokengate.fold(model, DATA, force=0.4).error > 1e-4


def test_what_cannot_be_merged_is_kept_and_says_why():
    torch.manual_seed(0)
    model = Net()
    model.tied = nn.Linear(8, 16)
    model.tied.weight = model.blocks[0].fc1.weight
    tokengate.patch(model, ["fc1"])
    tokengate.patch(model, ["fc2"], method="adapter")
    away_from_initialisation(model)
    before = outputs(model)
    folding = tokengate.fold(model, DATA)
    reasons = {name: each.reason for name, each in folding.layers.items()}
    assert folding.names("merged") == ["blocks.1.fc1"]
    assert "another module's" in reasons["blocks.0.fc1"]
    assert "Adapter is no matrix" in reasons["blocks.0.fc2"]
    assert torch.allclose(outputs(model), before, atol=1e-5)


def test_a_transposed_layer():
    module = pytest.importorskip("transformers.pytorch_utils", reason="needs transformers")
    torch.manual_seed(0)
    model = nn.Sequential(module.Conv1D(6, 8), nn.Tanh())
    tokengate.patch(model, ["0"], method="dora", gate=False)
    away_from_initialisation(model)
    base = model[0].weight.detach().clone()
    before = outputs(model)
    tokengate.fold(model, DATA)
    assert not torch.equal(model[0].weight, base)
    assert torch.allclose(outputs(model), before, atol=1e-6)
    assert torch.equal(tokengate.unpatch(model)[0].weight, base)


def test_sixteen_bits_merge_to_their_rounding():
    model = mixed("lora", torch.bfloat16)
    before = outputs(model)
    folding = tokengate.fold(model, [x.bfloat16() for x in DATA])
    assert model.blocks[0].q_proj.weight.dtype == torch.bfloat16
    errors = [folding.layers[name].error for name in folding.names("merged")]
    assert all(1e-5 < error < 4 * torch.finfo(torch.bfloat16).eps for error in errors)
    assert (outputs(model) - before).abs().max() < 0.1
    assert 0 < folding.error < 0.02


def refused_fold(model, before, match, *args, **options):
    with pytest.raises(TokenGateError, match=match):
        tokengate.fold(model, *args, **options)
    assert snapshot(model) == before


def test_a_merge_that_goes_wrong_leaves_everything_as_it_was(monkeypatch):
    model = mixed()
    outputs(model)
    before = snapshot(model)

    with monkeypatch.context() as patch:
        # A method that says that it is a matrix and is none.
        patch.setattr(tokengate.methods.LoRA, "factors", lambda self, x, w, linear: None)
        patch.setattr(
            tokengate.methods.LoRA,
            "forward",
            lambda self, x, w: (x @ self.A.T.to(x)) ** 2 @ self.B.T.to(x),
        )
        refused_fold(model, before, "differs from what it computes now by .* safe=False", DATA)
        folding = tokengate.fold(model, DATA, safe=False)
        assert folding.error > 0.01
        folding.undo()
    with torch.no_grad():
        model.blocks[1].q_proj.modification.B[0, 0] = float("inf")
    before = snapshot(model)
    refused_fold(model, before, "'blocks.1.q_proj' that is not finite", DATA)
    refused_fold(model, before, "'blocks.1.q_proj' that is not finite", DATA, safe=False)


def test_bad_input_is_refused():
    model = mixed()
    outputs(model)
    before = snapshot(model)

    report = tokengate.SparsityReport({})
    refused_fold(model, before, "report without 'blocks.0.q_proj'", report)
    refused_fold(model, before, "force=0.9 without batches", report, force=0.9)
    refused_fold(model, before, r"^force=1.5 is above 1: pass a share", DATA, force=1.5)
    refused_fold(model, before, r"^force=0 is not above 0", DATA, force=0)
    refused_fold(model, before, r"^force='all' is not a finite number", DATA, force="all")
    refused_fold(model, before, "safe=1 is neither", DATA, safe=1)
    refused_fold(model, before, "gone through once", iter(DATA))
    refused_fold(model, before, "pass several batches", ELSEWHERE)
    refused_fold(model, before, "fold was given no batches", [])
    with pytest.raises(TokenGateError, match="without a patched layer"):
        tokengate.fold(Net(), DATA)
    tokengate.fold(model, DATA)
    with pytest.raises(TokenGateError, match="folded already"):
        tokengate.fold(model, DATA)
    with pytest.raises(TokenGateError, match=r"'blocks.0.q_proj' is folded"):
        tokengate.patch(model, ["q_proj"])


def test_training_goes_on_with_what_is_left(tmp_path):
    model = mixed()
    tokengate.fold(model, DATA)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = ("modification.A", "modification.B", "gate.tau")
    assert trainable == {f"blocks.{i}.fc1.{part}" for i in (0, 1) for part in parts}
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.1))
    before = values(model)
    model.train()(DATA[0]).square().mean().backward()
    optimizer.step()
    after = values(model)
    assert not same(before, after)
    assert all(torch.equal(before[k], after[k]) for k in before if "fc1" not in k)


def test_quantised_weights_are_refused():
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    quantised = bitsandbytes.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
    quantised.load_state_dict(layer.state_dict(), strict=False)
    model = nn.Sequential(quantised.to("cpu"))
    tokengate.patch(model, ["0"], gate=False)
    away_from_initialisation(model)
    data = [torch.randn(2, 3, 64)]
    with pytest.raises(TokenGateError, match="quantised"):
        tokengate.fold(model, data)
    assert names(model) == ["0"]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("by_report", [False, True])
def test_a_tau_that_is_not_finite_is_refused(bad, by_report, tmp_path):
    """A NaN is open at every position, and was merged as if the gate had decided so."""
    model = mixed()
    model.blocks[0].fc1.gate.tau.data.fill_(bad)
    with tokengate.record(model) as rec:
        outputs(model)
    before = repr(snapshot(model))  # a NaN equals none
    with one_sentence("fold found", "'blocks.0.fc1.gate.tau'", "calibrate"):
        tokengate.fold(model, rec.report() if by_report else DATA)
    assert repr(snapshot(model)) == before
    with one_sentence("save found", "'blocks.0.fc1.gate.tau'", "wrote nothing"):
        tokengate.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_batches_that_make_nan_are_refused():
    """On them every gate is open."""
    model = mixed()
    outputs(model)
    before = snapshot(model)
    with one_sentence("fold found NaN in the output"):
        tokengate.fold(model, [*DATA, DATA[0] * math.nan])
    assert snapshot(model) == before


def test_infinite_logits_of_a_mask_are_no_error():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mixed()

        def forward(self, x):
            h = self.net(x)
            return torch.cat([h, torch.full_like(h, -math.inf)], -1)

    folding = tokengate.fold(Masked(), DATA)
    assert folding.names("merged")
    assert folding.error < 1e-5


def test_what_is_open_in_part_is_not_merged():
    """Open everywhere, but by less than 1: W0 + M would add more."""
    torch.manual_seed(0)
    name = "blocks.1.q_proj"
    model = away_from_initialisation(tokengate.patch(Net(), [name], rank=2, gate="firm"))
    batches = [torch.randn(2, 5, 8)]
    with tokengate.record(model.eval(), positions=True, ratios=True) as rec:
        model(batches[0])
    smallest = min(ratios.min() for ratios in rec.ratios[name])
    gate = tokengate.layers(model)[name].gate
    gate.tau.fill_(0.9 * smallest)
    before = model(batches[0])
    with tokengate.record(model) as rec:
        model(batches[0])
    assert rec.report().sparsity == 0
    for seen in (batches, rec.report()):
        folding = tokengate.fold(model, seen)
        assert "in part" in folding.layers[name].reason
        assert torch.equal(model(batches[0]), before)
        folding.undo()
    forced = tokengate.fold(model, batches, force=0.9)
    assert forced.layers[name].action == "merged"
    assert forced.error > 1e-4
    forced.undo()
    gate.tau.fill_(0.4 * smallest)  # k = 2: wholly open
    assert tokengate.fold(model, batches).layers[name].action == "merged"
    assert not gate._forward_hooks
