"""What only a GPU can show: kernels as they are compiled, graphs, a host that never waits."""

import contextlib
import copy
import warnings

import pytest
import torch
from models import away_from_initialisation
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate.errors import KernelsWarning
from tokengate.kernels import fused

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
    # What versions that were not seen warn of is no failure of these.
    pytest.mark.filterwarnings("default"),
]
METHODS = ["lora", "dora", "adalora", "adapter"]
# Together more elements than 32 bits count.
ROWS, WIDTH = 75_000, 28_672
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 6e-3}


def layer_of(method, k, d, dtype=torch.float32, bias=False, **options):
    torch.manual_seed(0)
    layer = nn.Linear(k, d, bias=bias).to(DEVICE, dtype)
    tokengate.patch(layer, "all-linear", method, **options)
    away_from_initialisation(layer, 0.05)
    return layer


def close_some(layer, x):
    """A tau within the widest gap of the middle of all r; whether it is wide enough to be safe."""
    with torch.no_grad():
        w = F.linear(x, layer.weight)
        m = layer.modification.factors(x, w, layer).product(w)
        r = (m.float().norm(dim=-1) / w.float().norm(dim=-1)).flatten().sort().values
        middle = r[len(r) // 4 : -len(r) // 4]
        at = int((middle[1:] - middle[:-1]).argmax())
        layer.gate.tau.fill_(middle[at : at + 2].mean())


def results(layer, x, grad):
    x = x.clone().requires_grad_()
    h = layer(x)
    h.backward(grad)
    found = {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    return {"h": h.detach(), "x": x.grad, **found}


@contextlib.contextmanager
def no_wait():
    """An error where the host waits for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_kernels_take_it():
    warnings.simplefilter("error", KernelsWarning)  # which says why they do not
    assert fused.kernels_for(torch.ones(1, device=DEVICE)) is not None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "shape", "k", "d", "rank"),
    [
        (torch.float32, (2, 33), 96, 200, 16),
        (torch.bfloat16, (700,), 256, 1000, 128),
        (torch.float16, (1, 1), 130, 77, 5),
        (torch.bfloat16, (40,), 64, 64, 384),
        (torch.float32, (9,), 3, 1, 1),
    ],
)
def test_equals_pytorch_s_operations(method, dtype, shape, k, d, rank, monkeypatch):
    layer = layer_of(method, k, d, dtype, bias=True, rank=rank)
    x = torch.randn(*shape, k, device=DEVICE).to(dtype)
    grad = torch.randn(*shape, d, device=DEVICE).to(dtype)
    if x[..., 0].numel() > 8:
        close_some(layer, x)
    found = results(layer, x, grad)
    with monkeypatch.context() as patch:
        patch.setattr(fused, "_on", lambda device: None)
        wanted = results(layer, x, grad)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        size = value.abs().max().item() + 1e-3
        torch.testing.assert_close(
            found[name], value, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.fixture
def memory():
    if torch.cuda.mem_get_info()[0] < 26 * 2**30:
        pytest.skip("this takes 26 GiB of a GPU")
    yield
    torch.cuda.empty_cache()


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_more_elements_than_32_bits_count(method):
    """The last positions are what they are alone."""
    layer = layer_of(method, 16, WIDTH, torch.bfloat16, rank=16, penalty=0.0)
    x = torch.randn(ROWS, 16, device=DEVICE, dtype=torch.bfloat16)
    last = x[-40:].clone()
    close_some(layer, last)
    grad = torch.randn(40, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    wanted = results(layer, last, grad)
    whole = torch.zeros(ROWS, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    whole[-40:] = grad
    found = results(layer, x, whole)
    for name, value in wanted.items():
        each = found[name][-40:] if name in ("h", "x") else found[name]
        size = value.abs().max().item() + 1e-3
        torch.testing.assert_close(
            each, value, rtol=4e-2, atol=4e-2 * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )  # fmt: skip


@pytest.mark.usefixtures("memory")
def test_more_elements_than_32_bits_count_are_dropped():
    x = torch.ones(ROWS, WIDTH, device=DEVICE, dtype=torch.bfloat16)
    thinned = fused.kernels_for(x).thin(x, torch.tensor(3, device=DEVICE), 0.25)
    first, last = thinned[:40], thinned[-40:]
    assert not torch.equal(first, last)
    for some in (first, last):
        assert abs((some == 0).float().mean().item() - 0.25) < 0.02


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs here")
@pytest.mark.parametrize("method", METHODS)
def test_on_another_gpu_than_the_current_one(method):
    layer = layer_of(method, 64, 96, rank=16, tau=0.05)
    x, grad = torch.randn(9, 64, device=DEVICE), torch.randn(9, 96, device=DEVICE)
    wanted = results(layer, x, grad)
    found = results(layer.to("cuda:1"), x.to("cuda:1"), grad.to("cuda:1"))
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].to(DEVICE), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_no_position_at_all(method):
    layer = layer_of(method, 64, 96, rank=16, dropout=0.1)
    found = results(layer, torch.randn(0, 64, device=DEVICE), torch.randn(0, 96, device=DEVICE))
    assert found["h"].shape == (0, 96)
    assert not any(value.any() for value in found.values())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_computed_again_decides_as_before(method):
    """Of the same input the same bits, whatever ran in between."""
    layer = layer_of(method, 256, 1000, torch.bfloat16, rank=16)
    x = torch.randn(700, 256, device=DEVICE, dtype=torch.bfloat16)
    close_some(layer, x)
    first = layer(x)
    layer(x[:5])
    assert torch.equal(layer(x), first)
    with torch.no_grad():
        assert torch.equal(layer(x), first)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_host_waits_for_nothing(method, dropout):
    layer = layer_of(method, 64, 96, torch.bfloat16, rank=16, dropout=dropout).train()
    x = torch.randn(2, 40, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(2, 40, 96, device=DEVICE, dtype=torch.bfloat16)
    layer(x).backward(grad)  # compiles
    with no_wait():
        layer(x).backward(grad)
    layer.eval()
    with torch.no_grad():
        layer(x)
        with no_wait():
            layer(x)
    with pytest.raises(RuntimeError), no_wait():
        x.sum().item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seen", [torch.float32, torch.bfloat16])
def test_one_position_in_a_graph(method, seen):
    """A token that is generated, as a CUDA graph replays it."""
    layer = layer_of(method, 64, 96, seen, rank=16, tau=0.05).eval()
    x = torch.randn(1, 1, 64, device=DEVICE, dtype=seen)
    stream = torch.cuda.Stream()
    with torch.no_grad():
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            h = layer(x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            graph.replay()
            wanted = layer(x.clone())
            torch.testing.assert_close(h, wanted)


def test_a_step_in_a_graph_drops_others_each_time():
    layer = layer_of("lora", 64, 96, rank=16, dropout=0.3).train()
    x = torch.randn(40, 64, device=DEVICE)
    grad = torch.randn(40, 96, device=DEVICE)

    def step():
        layer.zero_grad(set_to_none=False)
        h = layer(x)
        h.backward(grad)
        return h

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        h = step()
    graph.replay()
    first = h.detach().clone()
    graph.replay()
    assert not torch.equal(h.detach(), first)
    # <dL/dA, A> is <G, M(x)> of what was dropped in this replay.
    m = layer.modification
    inner = (grad * (h.detach() - x @ layer.weight.T)).sum()
    torch.testing.assert_close((m.A.grad * m.A).sum(), inner, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_compiled_in_one_graph(method):
    layer = layer_of(method, 64, 96, rank=16, tau=0.05).eval()
    x = torch.randn(2, 8, 64, device=DEVICE)
    torch.compiler.reset()
    with torch.no_grad():
        wanted = layer(x)
        found = torch.compile(layer, fullgraph=True)(x)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_static_cache_gives_the_same_tokens(method):
    transformers = pytest.importorskip("transformers", reason="the extra is not installed")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(DEVICE).eval()
    plain = copy.deepcopy(model)
    tokengate.patch(model, ["q_proj", "v_proj", "down_proj"], method, rank=8)
    away_from_initialisation(model, 0.2)
    ids = torch.randint(1, 64, (1, 7), device=DEVICE)
    tokengate.calibrate(model, [{"input_ids": ids}], sparsity=0.5)
    options = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(ids, **options)
    assert not torch.equal(wanted, plain.generate(ids, **options))
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, wanted)


@pytest.fixture
def one_rank(tmp_path):
    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("method", METHODS)
def test_sharded_over_one_rank(method):
    from torch.distributed.fsdp import fully_shard

    whole = nn.Sequential(layer_of(method, 64, 96, rank=16, tau=0.05))
    sharded = copy.deepcopy(whole)
    fully_shard(sharded[0])
    fully_shard(sharded)
    x = torch.randn(2, 8, 64, device=DEVICE)
    for model in (whole, sharded):
        model(x).square().sum().backward()
    for one, other in zip(whole.parameters(), sharded.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(other.grad.full_tensor(), one.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_within_autocast(method):
    layer = layer_of(method, 64, 96, rank=16)
    x = torch.randn(2, 40, 64, device=DEVICE)
    exact = layer(x)
    with torch.autocast(DEVICE, torch.bfloat16):
        h = layer(x)
    assert h.dtype == torch.bfloat16
    h.float().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.requires_grad)
    torch.testing.assert_close(h.float(), exact, rtol=0.1, atol=0.1)


def test_a_grad_scaler_scales_tau_s_gradient_too():
    layer = layer_of("lora", 64, 96, torch.float16, rank=16, penalty=0.5)
    x = torch.randn(2, 40, 64, device=DEVICE, dtype=torch.float16)
    optimizer = torch.optim.SGD(tokengate.param_groups(layer, lr=1e-3), lr=1e-3)
    found = []
    for scale in (1.0, 1024.0):
        scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
        tokengate.scale_penalty(layer, scale)
        scaler.scale(layer(x).float().mean()).backward()
        scaler.unscale_(optimizer)
        found.append(layer.gate.tau.grad.clone())
        layer.zero_grad()
    assert found[0].any()
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("gate", ["threshold", "firm", "fisher"])
def test_a_schedule_leads_without_waiting_and_settles(gate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16)).to(DEVICE)
    tokengate.patch(model, "all-linear", rank=8, gate=gate)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-2))
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, 40)
    x = torch.randn(41, 16, 30, 32, device=DEVICE)
    for step in range(40):
        with no_wait() if 2 <= step < 39 else contextlib.nullcontext():
            optimizer.zero_grad()
            (model(x[step]) - 1).square().mean().backward()
            optimizer.step()
    assert all(threshold > 0 for threshold in schedule.thresholds.values())
    with torch.no_grad(), tokengate.record(model.eval()) as rec:
        model(x[40])
    assert abs(rec.report().sparsity - 0.5) < 0.05
