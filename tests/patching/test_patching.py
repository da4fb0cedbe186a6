"""patch, unpatch, disabled: what is changed, what is left alone, and back again."""

import copy
import math
import pickle
import re
import sys
import types

import pytest
import torch
from models import Net, away_from_initialisation, snapshot
from torch import nn
from torch.distributed import fsdp

import tokengate
from tokengate.errors import UnenteredContextWarning
from tokengate.layers import GatedLinear


def test_parameter_names():
    model = tokengate.patch(Net(), ["q_proj", "blocks.1.v_proj"], rank=2, train=["head"])
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {
        "blocks.0.q_proj.modification.A": (2, 8),
        "blocks.0.q_proj.modification.B": (8, 2),
        "blocks.0.q_proj.gate.tau": (1,),
        "blocks.1.q_proj.modification.A": (2, 8),
        "blocks.1.q_proj.modification.B": (8, 2),
        "blocks.1.q_proj.gate.tau": (1,),
        "blocks.1.v_proj.modification.A": (2, 8),
        "blocks.1.v_proj.modification.B": (8, 2),
        "blocks.1.v_proj.gate.tau": (1,),
        "head.weight": (3, 8),
        "head.bias": (3,),
    }
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in Net().named_parameters() if not n.startswith("head")}
    assert set(Net().state_dict()) < set(model.state_dict())
    assert list(tokengate.layers(model)) == [
        "blocks.0.q_proj",
        "blocks.1.q_proj",
        "blocks.1.v_proj",
    ]


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_unpatch_gives_everything_back(targets):
    model = Net()
    model.blocks[0].norm.requires_grad_(False)
    model.blocks[1].eval()
    before, x = snapshot(model), torch.randn(2, 5, 8)
    base = model(x)
    keys = list(model.state_dict())
    assert tokengate.patch(model, targets, train=["blocks.0.norm"]) is model
    away_from_initialisation(model)
    assert not torch.equal(model(x), base)
    assert snapshot(model) != before
    assert tokengate.unpatch(model) is model
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), base)


def test_the_objects_stay_the_same_objects():
    model = Net()
    layer, weight = model.blocks[0].q_proj, model.blocks[0].q_proj.weight
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    tokengate.patch(model, ["q_proj"])
    assert model.blocks[0].q_proj is layer
    assert layer.weight is weight
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, GatedLinear)
    model(torch.randn(2, 8))
    assert calls == [1]


def test_disabled_is_the_base_and_restores_what_was():
    model = Net()
    x = torch.randn(2, 5, 8)
    base = model(x)
    away_from_initialisation(tokengate.patch(model, ["q_proj"]))
    before, changed = snapshot(model), model(x)
    assert not torch.equal(changed, base)
    with tokengate.disabled(model):
        assert torch.equal(model(x), base)
        with tokengate.disabled(model.blocks[0]):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), changed)
    with pytest.raises(KeyError), tokengate.disabled(model):
        raise KeyError
    assert snapshot(model) == before


def test_a_second_method_on_other_layers_keeps_the_first_trainable():
    model = Net()
    before = snapshot(model)
    tokengate.patch(model, ["q_proj"], train=["head"])
    tokengate.patch(model, ["v_proj"], rank=3, gate=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "blocks.0.q_proj.modification.A" in trainable
    assert "blocks.0.q_proj.gate.tau" in trainable
    assert "blocks.0.v_proj.modification.A" in trainable
    assert "head.weight" in trainable
    assert len(trainable) == 2 * 3 + 2 * 2 + 2
    tokengate.unpatch(model)
    assert snapshot(model) == before


def test_patching_a_part_and_then_the_whole_freezes_the_whole():
    model = Net()
    before = snapshot(model)
    tokengate.patch(model.blocks[0], ["q_proj"])
    assert model.head.weight.requires_grad
    tokengate.patch(model, ["blocks.1.q_proj"])
    assert not model.head.weight.requires_grad
    assert model.blocks[0].q_proj.gate.tau.requires_grad
    tokengate.unpatch(model.blocks[1])
    assert list(tokengate.layers(model)) == ["blocks.0.q_proj"]
    tokengate.unpatch(model)
    assert snapshot(model) == before


def test_a_root_whose_layers_were_unpatched_apart_can_still_be_restored():
    model = Net()
    before = snapshot(model)
    tokengate.patch(model, ["blocks.0.q_proj"])
    tokengate.unpatch(model.blocks[0])
    assert not model.head.weight.requires_grad
    tokengate.unpatch(model)
    assert snapshot(model) == before


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_deepcopy_and_pickle(monkeypatch):
    # pytest imports this file under a name that pickle cannot find.
    monkeypatch.setitem(sys.modules, "patching_classes", types.SimpleNamespace(Twice=Twice))
    monkeypatch.setattr(Twice, "__module__", "patching_classes")
    model = nn.Sequential(Twice(4, 4), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    base = model(x)
    away_from_initialisation(tokengate.patch(model, "all-linear"))
    assert isinstance(model[0], Twice)
    with tokengate.disabled(model):
        assert torch.equal(model(x), base)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0] is not model[0]
        assert torch.equal(other(x), model(x))
        assert torch.equal(tokengate.unpatch(other)(x), base)
        assert type(other[0]) is Twice
    assert list(tokengate.layers(model)) == ["0", "1"]


def test_a_shared_layer_is_patched_once():
    model = Net()
    model.blocks[1].q_proj = model.blocks[0].q_proj
    tokengate.patch(model, ["blocks.1.q_proj"])
    assert list(tokengate.layers(model)) == ["blocks.0.q_proj"]
    away_from_initialisation(model)
    x = torch.randn(2, 5, 8)
    with tokengate.record(model) as rec:
        model(x)
    assert rec.report().modules["blocks.0.q_proj"].positions == 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("when", ["before", "after"])
def test_trainable_parameters_stay_float32(dtype, when):
    model = Net()
    if when == "before":
        model.to(dtype)
    tokengate.patch(model, ["q_proj"], tau=0.1)
    tau = model.blocks[0].q_proj.gate.tau
    if when == "after":
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        model.to(dtype)
        assert tau.grad.dtype == torch.float32
    assert model.blocks[0].q_proj.gate.tau is tau
    assert tau.item() == pytest.approx(0.1, rel=1e-7)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else dtype), name
    out = model(torch.randn(2, 5, 8, dtype=dtype))
    assert out.dtype == dtype
    out.float().square().sum().backward()
    assert tau.grad.dtype == torch.float32


def test_double_is_followed():
    model = tokengate.patch(Net(), ["q_proj"]).double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert {p.dtype for p in model.float().parameters()} == {torch.float32}
    assert tokengate.patch(Net().double(), ["q_proj"]).blocks[0].q_proj.gate.tau.dtype == (
        torch.float64
    )


def test_autocast():
    model = away_from_initialisation(tokengate.patch(Net(), "all-linear", rank=2))
    x = torch.randn(2, 5, 8)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out.float(), exact)
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    out.float().sum().backward()


def test_meta_device():
    with torch.device("meta"):
        model = Net()
    tokengate.patch(model, ["q_proj"])
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert "penalty" in repr(model)


def test_compiles_without_a_graph_break():
    model = away_from_initialisation(tokengate.patch(Net(), "all-linear", tau=0.5, rank=2))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 8)
    eager, got = model(x), compiled(x)
    torch.testing.assert_close(got, eager)
    eager.square().sum().backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    got.square().sum().backward()
    assert wanted
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-4)


class OwnGate(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.gate = nn.Identity()


def hooked():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: x
    return nn.Sequential(layer)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (Net, {"targets": ["q_prj"]}, "target 'q_prj' matches no module .* q_proj"),
        (Net, {"targets": ["proj"]}, "target 'proj' matches no module"),
        (Net, {"targets": ["q_proj", "k_proj"]}, "target 'k_proj' matches no module"),
        (Net, {"targets": ["*.k_proj"]}, r"target '\*.k_proj' matches no module"),
        (Net, {"targets": ["norm"]}, "'blocks.0.norm', which is a LayerNorm, not a linear layer"),
        (Net, {"targets": ["0"]}, "'blocks.0', which is a Block, .* e.g. 'q_proj'"),
        (Net, {"targets": []}, r"targets=\[\] names no layer"),
        (Net, {"targets": [3]}, r"targets=\[3\] is not a list of names"),
        (Net, {"targets": 3}, "targets=3 is not a list of names"),
        (Net, {"targets": [""]}, r"targets=\[''\] is not a list of names"),
        (Net, {"targets": lambda n, m: False}, "callable given as targets= chose no module"),
        (
            Net,
            {"targets": ["q_proj"], "exclude": ["q_proj"]},
            "matches only what exclude= leaves out",
        ),
        (Net, {"targets": ["q_proj"], "exclude": ["hed"]}, "exclude 'hed' matches no module"),
        (
            Net,
            {"targets": ["q_proj"], "train": ["hed"]},
            "train 'hed' matches no parameter .* head",
        ),
        (Net, {"targets": ["head"], "train": ["head"]}, "'head' is both a target and named by tr"),
        (Net, {"targets": ["q_proj"], "method": "lroa"}, "unknown method 'lroa' .*'lora'"),
        (Net, {"targets": ["q_proj"], "method": nn.Linear}, "unknown method <class"),
        (Net, {"targets": ["q_proj"], "rank": -1}, "rank=-1 is not"),
        (
            Net,
            {"targets": ["q_proj"], "gate": "False"},
            "unknown gate 'False': choose one",
        ),
        (Net, {"targets": ["q_proj"], "tau": 10**400}, "tau=1000.* is not a finite number"),
        (Net, {"targets": {"fc1": 8}}, r"is a dict.*pass its keys as a list, targets=\['fc1'\]"),
        (Net, {"targets": ["fc1"], "exclude": {"fc2": 0}}, "exclude={'fc2': 0} is a dict"),
        (Net, {"targets": ["fc1"], "train": {"head": 1e-3}}, "train={'head': 0.001} is a dict"),
        (Net, {"targets": nn.Linear}, "targets=<class .* is not a list of names"),
        (Net, {"targets": nn.Linear(2, 2)}, "targets=Linear.* is not a list of names"),
        (Net, {"targets": [re.compile(b"x")]}, "is not a list of names"),
        (Net, {"targets": ["q_proj"], "rnak": 1}, "unknown option 'rnak'"),
        (Net, {"targets": ["q_proj"], "scale": math.inf}, "scale=inf is not"),
        (Net, {"targets": ["q_proj"], "tau": math.nan}, "tau=nan is not"),
        (Net, {"targets": ["q_proj"], "penalty": -1.0}, "penalty=-1.0 is negative"),
        (hooked, {"targets": ["0"]}, "whose forward was replaced on the instance"),
        (lambda: nn.Sequential(OwnGate()), {"targets": ["0"]}, "its own attribute .* `gate`"),
        (nn.ReLU, {"targets": "all-linear"}, "asked of a ReLU, which has no linear layer"),
        (
            lambda: nn.MultiheadAttention(8, 2),
            {"targets": ["out_proj"]},
            "nn.MultiheadAttention, which reads the weight itself instead of calling",
        ),
        (
            lambda: nn.Sequential(nn.LazyLinear(3)),
            {"targets": ["0"]},
            "'0.weight', which has no values yet: run the model once",
        ),
        (
            lambda: nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(3)),
            {"targets": ["0"]},
            "'1.weight', which has no values yet: run the model once",
        ),
        (lambda: nn.DataParallel(Net()), {"targets": ["q_proj"]}, "DataParallel already"),
        (lambda: torch.compile(Net()), {"targets": ["q_proj"]}, "torch.compile already"),
        (
            lambda: tokengate.patch(Net(), ["q_proj"]),
            {"targets": ["q_proj"]},
            "which is patched already",
        ),
        (
            lambda: tokengate.patch(Net(), ["q_proj"]),
            {"targets": "all-linear"},
            "which is patched already",
        ),
    ],
)
def test_bad_input_leaves_the_model_untouched(make, arguments, message):
    model = make()
    lazy = any(nn.parameter.is_lazy(p) for p in model.parameters())
    before = None if lazy else snapshot(model)
    with pytest.raises(tokengate.TokenGateError, match=message) as error:
        tokengate.patch(model, **arguments)
    sentence = str(error.value)
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert lazy or snapshot(model) == before


def test_a_snapshot_can_differ():
    model = Net()
    before = snapshot(model)
    tokengate.patch(model, ["q_proj"])
    assert snapshot(model) != before


def test_refused_after_fully_shard(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.parallel.DistributedDataParallel(Net())
        with pytest.raises(tokengate.TokenGateError, match="DistributedDataParallel already"):
            tokengate.patch(model, ["q_proj"])
        model = Net()
        fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        with pytest.raises(tokengate.TokenGateError, match="fully_shard already"):
            tokengate.patch(model, ["q_proj"])
    finally:
        torch.distributed.destroy_process_group()


def test_refused_under_inference_mode():
    model = Net()
    before = snapshot(model)
    with (
        torch.inference_mode(),
        pytest.raises(tokengate.TokenGateError, match=r"under torch\.inference_mode"),
    ):
        tokengate.patch(model, ["q_proj"])
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "call",
    [
        tokengate.unpatch,
        lambda model: tokengate.disabled(model).__enter__(),
        lambda model: tokengate.record(model).__enter__(),
    ],
    ids=["unpatch", "disabled", "record"],
)
def test_what_needs_a_patched_model_says_so(call):
    with pytest.raises(tokengate.TokenGateError, match="of a Net without a patched layer"):
        call(Net())


def test_patch_wants_a_module():
    with pytest.raises(tokengate.TokenGateError, match="patch was given a list"):
        tokengate.patch([1], ["q_proj"])


def test_a_part_of_a_patched_model_may_be_patched_again():
    model = tokengate.patch(Net(), ["q_proj"])
    tokengate.patch(model.blocks[0], ["v_proj"])
    for layer in tokengate.layers(model).values():
        assert all(p.requires_grad for p in layer.modification.parameters())
        assert layer.gate.tau.requires_grad


def test_a_copy_made_while_disabled_or_recorded_is_an_ordinary_one():
    model = away_from_initialisation(tokengate.patch(Net(), ["q_proj"]))
    x = torch.randn(2, 3, 8)
    with tokengate.disabled(model), tokengate.record(model):
        with pytest.warns(UnenteredContextWarning, match="within tokengate.disabled, which its"):
            other = copy.deepcopy(model)
        assert not torch.equal(model(x), other(x))
    assert torch.equal(model(x), other(x))
    assert sorted(other.blocks[0].q_proj.__dict__) == sorted(model.blocks[0].q_proj.__dict__)


@pytest.mark.parametrize("call", [tokengate.layers, tokengate.unpatch])
def test_what_is_no_module_is_refused(call):
    with pytest.raises(tokengate.TokenGateError, match=r"pass a torch\.nn\.Module"):
        call(3)
