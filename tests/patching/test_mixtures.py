"""Mixtures of experts of transformers, from small configs: what the architectures' table holds."""

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.20", reason="has the experts interface")

import architectures_text as text  # noqa: E402
from architectures import tokens  # noqa: E402
from models import away_from_initialisation  # noqa: E402

import tokengate  # noqa: E402
from tokengate.errors import TokenGateError  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::UserWarning:transformers"),
]

BOTH = ("experts.gate_up_proj", "experts.down_proj")
TOP = {"num_experts_per_tok": 2}
ROUTED = {**TOP, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16}
LOCAL = {**text.GROUPED, **TOP, "num_local_experts": 4}
NUMBERED = {**text.GROUPED, **TOP, "num_experts": 4, "pad_token_id": 0}
SIXTEEN = {"moe_intermediate_size": 16}
HEAD = {"head_dim": 8}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1}
NEMOTRON = {"layers_block_type": ["moe", "attention"], "moe_shared_expert_intermediate_size": 16}
GEMMA = {"enable_moe_block": True, "top_k_experts": 2, "global_head_dim": 8}
FAMILIES = {
    "mixtral": LOCAL,
    "qwen2_moe": {**text.QWEN2_MOE, **TOP},
    "qwen3_moe": {**text.MOE, **HEAD},
    "olmoe": NUMBERED,
    "flex_olmo": NUMBERED,
    "gpt_oss": {**LOCAL, **HEAD},  # transposed, interleaved, with biases
    "deepseek_v2": text.DEEPSEEK,
    "deepseek_v3": text.DEEPSEEK,
    "glm4_moe": {**text.GROUPED, **ROUTED, **HEAD, "first_k_dense_replace": 1},
    "granitemoe": LOCAL,
    "jamba": {**NUMBERED, **JAMBA, "expert_layer_offset": 0, "mamba_d_state": 4},
    "aria_text": {**text.GROUPED, "moe_num_experts": 4, "moe_topk": 2, "pad_token_id": 0},
    "nemotron_h": {**text.GROUPED, **ROUTED, **HEAD, **NEMOTRON},  # without a gate projection
    "ernie4_5_moe": {**text.GROUPED, **SIXTEEN, "moe_num_experts": 4, "moe_k": 2},
    "gemma4_text": {**text.GROUPED, **SIXTEEN, **HEAD, **GEMMA, "num_experts": 4},
    "llama4_text": {**text.LLAMA4, "pad_token_id": 0},  # every expert is given every position
}
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")


def build(family):
    torch.manual_seed(0)
    model = text.from_config(family, **FAMILIES[family])().eval().requires_grad_(False)
    targets = ("experts.up_proj", BOTH[1]) if family == "nemotron_h" else BOTH
    implementations = ("its own",) if family == "llama4_text" else IMPLEMENTATIONS
    return model, list(targets), implementations


def run(model, implementation):
    if implementation != "its own":
        model.set_experts_implementation(implementation)
    return text.run_padded(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family):
    model, targets, implementations = build(family)
    keys = list(model.state_dict())
    base = {name: run(model, name) for name in implementations}
    tokengate.patch(model, targets, rank=4, tau=1e-4)
    layers = tokengate.layers(model)
    for name in implementations:
        assert torch.equal(run(model, name), base[name]), "at first, it changes nothing"

    away_from_initialisation(model, 0.1)
    found = {}
    for name in implementations:
        model.zero_grad()
        with tokengate.record(model) as rec:
            changed = run(model, name)
        assert (changed - base[name]).abs().max() > 1e-4 * base[name].abs().max()
        changed.float().square().sum().backward()
        found[name] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        for owner, layer in layers.items():
            for parameter in (*layer.modification.parameters(), layer.gate.tau):
                assert parameter.grad is not None, owner
                assert parameter.grad.isfinite().all(), owner
            assert layer.modification.B.grad.any(), owner
        # Each real token is counted for each of its experts, and padding for none.
        counted = sum(module.positions for module in rec.report().modules.values())
        each = 1 if family == "llama4_text" else 2
        assert counted == 16 * each * len(layers)
    for other in list(found.values())[1:]:
        for name, gradient in next(iter(found.values())).items():
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)

    tokengate.unpatch(model)
    assert torch.equal(run(model, implementations[-1]), base[implementations[-1]])
    assert list(model.state_dict()) == keys


def kept(experts, seen):
    """How they put gate and up together, of which what goes in is kept."""
    own = experts._own_class._apply_gate

    def apply(self, out):
        seen.append(out)
        return own(self, out)

    return apply


def test_gate_and_up_apart():
    """Of concatenated and of interleaved ones; the untouched slice stays as it was."""
    for family in ("qwen3_moe", "gpt_oss"):
        model, _, _ = build(family)
        base = run(model, "eager")
        tokengate.patch(model, ["experts.gate_up_proj.up"], method="dora", rank=2)
        assert torch.equal(run(model, "eager"), base)
        away_from_initialisation(model, 0.1)
        outputs = [run(model, name) for name in IMPLEMENTATIONS]
        assert (outputs[0] - base).abs().max() > 1e-4
        for other in outputs[1:]:
            torch.testing.assert_close(other, outputs[0], rtol=1e-4, atol=1e-5)
        inner = model.model.layers[0].mlp.experts
        seen = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(inner._own_class, "_apply_gate", kept(inner, seen))
            run(model, "batched_mm")
            with tokengate.disabled(model):
                run(model, "batched_mm")
        half = slice(0, None, 2) if family == "gpt_oss" else slice(0, seen[0].shape[-1] // 2)
        assert torch.equal(seen[0][..., half], seen[len(seen) // 2][..., half])
        assert not torch.equal(seen[0], seen[len(seen) // 2])


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["gate_proj"], "means the experts"),
        (["experts.gate_up_proj", "experts.gate_up_proj.up"], "name the layer, or slices"),
        (["experts"], "name those inside it"),
    ],
)
def test_refused(targets, says):
    model, _, _ = build("qwen3_moe")
    with pytest.raises(TokenGateError, match=says):
        tokengate.patch(model, targets)
    assert not tokengate.layers(model)


def test_refused_are_experts_over_processes_and_implementations_that_are_not_known():
    model, targets, _ = build("qwen3_moe")
    model.model.layers[0].mlp.experts._is_expert_parallel = True
    with pytest.raises(TokenGateError, match="expert parallelism"):
        tokengate.patch(model, targets)
    model.model.layers[0].mlp.experts._is_expert_parallel = False
    tokengate.patch(model, targets)
    away_from_initialisation(model, 0.1)
    experts = model.model.layers[0].mlp.experts

    def another(self, states, index, weights):
        return (states @ self.gate_up_proj.sum(0).T).sum(-1, keepdim=True) * states

    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("another", another)
    experts.config._experts_implementation = "another"
    try:
        with pytest.raises(TokenGateError, match="no product of rows"):
            model(tokens())
    finally:
        del ALL_EXPERTS_FUNCTIONS._global_mapping["another"]


def test_a_dense_layers_name_beside_the_experts_own():
    """The advice to name these, too, named another projection, and was refused when followed."""
    config = transformers.Qwen3MoeConfig(
        **text.GROUPED, **TOP, **SIXTEEN, **HEAD, num_experts=4, mlp_only_layers=[0]
    )
    model = transformers.Qwen3MoeForCausalLM(config)
    with pytest.raises(TokenGateError, match=r"these, too, e.g. '[a-z.0-9]*\.gate_up_proj\.gate'"):
        tokengate.patch(model, ["gate_proj"], rank=2)
    tokengate.patch(model, ["gate_proj", "experts.gate_up_proj.gate"], rank=2)
    names = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.experts.gate_up_proj.gate"]
    assert list(tokengate.layers(model))[:2] == names


def test_what_select_names_of_experts_is_patched_and_nothing_else():
    model, targets, _ = build("qwen3_moe")
    away_from_initialisation(tokengate.patch(model, targets, rank=4, tau=0.3), 0.3)
    with tokengate.record(model) as rec:
        text.run_padded(model)
    names = tokengate.select(rec.report(), 0.4, by="random")
    assert 1 < len(names) < len(rec.report().modules) / 2
    tokengate.unpatch(model)
    tokengate.patch(model, names, rank=4)
    with tokengate.record(model) as rec:
        text.run_padded(model)
    assert list(rec.report().modules) == names
    taus = [layer.gate.tau.numel() for layer in tokengate.layers(model).values()]
    assert sum(taus) == len(names)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_each_row_by_its_own_adapter(implementation, tmp_path):
    """Of experts and of attention, in a forward and in what is generated after it."""
    model, targets, _ = build("qwen3_moe")
    model.set_experts_implementation(implementation)
    tokengate.patch(model, [*targets, "q_proj"], rank=2, gate=False)
    away_from_initialisation(model, 0.3)
    tokengate.save(model, tmp_path / "other")
    away_from_initialisation(model, 0.3)
    tokengate.load(model, tmp_path / "other", name="other")
    ids = torch.randint(5, 90, (3, 6), generator=torch.Generator().manual_seed(3))
    alone = {}
    for name in ("default", None, "other"):
        with tokengate.use(model, name), torch.no_grad():
            alone[name] = model(ids).logits, model.generate(ids, max_new_tokens=4, do_sample=False)
    names = list(alone)
    with tokengate.use(model, names), torch.no_grad():
        logits = model(ids).logits
        text_made = model.generate(ids, max_new_tokens=4, do_sample=False)
    for row, name in enumerate(names):
        torch.testing.assert_close(logits[row], alone[name][0][row], rtol=1e-5, atol=1e-5)
        assert (logits[row] - alone[names[row - 1]][0][row]).abs().max() > 1e-3
        assert torch.equal(text_made[row], alone[name][1][row])


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_compiled_in_one_graph(implementation, some):
    model, targets, _ = build("qwen3_moe")
    model.set_experts_implementation(implementation)
    targets = ["experts.1.gate_up_proj", "experts.2.down_proj"] if some else targets
    tokengate.patch(model, targets, rank=4, tau=0.1)
    away_from_initialisation(model, 0.3)
    torch.compiler.reset()
    found = {}
    for how in ("eager", "compiled"):
        run_it = torch.compile(model, fullgraph=True, backend="aot_eager")
        output = text.run_padded(model if how == "eager" else run_it)
        model.zero_grad()
        output.square().mean().backward()
        found[how] = [output, *(p.grad for p in model.parameters() if p.requires_grad)]
    assert found["eager"][1].any()
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other)
