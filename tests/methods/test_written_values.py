"""A forward sees every value that was written before it, in whatever way PyTorch is told of it."""

import subprocess
import sys

import numpy as np
import pytest
import reference
import torch
from models import away_from_initialisation
from torch import distributed, nn

import tokengate

METHODS = ["lora", "dora", "adalora", "adapter"]


def patched(method):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    tokengate.patch(layer, "all-linear", method, rank=3, tau=0.4)
    return away_from_initialisation(layer)


def from_the_equations(layer, x):
    """h of the reference's loops, `(N, 5)`."""
    modification = layer.modification
    own = {n: p.detach().double().numpy() for n, p in modification.named_parameters()}
    name = type(modification).__name__.lower()
    W0, b = layer.weight.detach().double(), layer.bias.detach().double()
    further = {"dora": {"W0": W0.numpy()}, "adapter": {"activation": "relu"}}.get(name, {})
    w = x.double() @ W0.T
    rows = zip(x.double().numpy(), w.numpy(), strict=True)
    m = [getattr(reference, name)(*row, own, modification.scale, **further)[0] for row in rows]
    h, _ = reference.gate_forward(w.numpy(), np.array(m), layer.gate.tau.item())
    return torch.tensor(h) + b


def check(found, layer, x):
    wanted = from_the_equations(layer, x)
    torch.testing.assert_close(found.detach().double(), wanted, rtol=1e-5, atol=1e-5)


def parameters(layer):
    """What is trained, but for tau, and what is frozen."""
    return [*layer.modification.parameters(), layer.weight]


def data_copy(layer):  # every EMA's copy_to and restore
    for p in parameters(layer):
        p.data.copy_(p * 0.5)


def data_minus_gradient(layer):
    for p in parameters(layer):
        p.data -= 0.1 * torch.ones_like(p)


def data_of_another(layer):
    for p in parameters(layer):
        p.data = p.data * 0.5


def numpy_view(layer):
    for p in parameters(layer):
        p.detach().numpy()[:] *= 0.5


def signs_alone(layer):  # which leaves the norms of W0's rows
    layer.weight.data.neg_()


def rows_in_another_order(layer):
    for p in parameters(layer):
        p.data.copy_(p.data.flip(0).clone())


def one_element(layer):
    layer.weight.data[1, 2] += 0.5
    next(layer.modification.parameters()).data.view(-1)[1] += 0.5


def in_inference_mode(layer):
    with torch.inference_mode():
        for p in parameters(layer):
            p.mul_(0.5)


def past_the_version(layer):  # as FSDP and DeepSpeed write
    for p in parameters(layer):
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(p):
            p.mul_(0.5)


def assigned(layer):
    layer.load_state_dict({n: t * 0.5 for n, t in layer.state_dict().items()}, assign=True)


def as_one_vector(layer):
    nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(parameters(layer)) * 0.5, parameters(layer)
    )


def averaged_and_copied_back(layer):
    averaged = torch.optim.swa_utils.AveragedModel(
        layer, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    averaged.update_parameters(layer)
    for p in layer.modification.parameters():
        p.data.mul_(3)
    averaged.update_parameters(layer)
    for own, average in zip(layer.parameters(), averaged.module.parameters(), strict=True):
        own.data.copy_(average.data)


def foreach(layer):
    torch._foreach_mul_([p.data for p in parameters(layer)], 0.5)


WRITES = [
    data_copy,
    data_minus_gradient,
    data_of_another,
    numpy_view,
    signs_alone,
    rows_in_another_order,
    one_element,
    in_inference_mode,
    past_the_version,
    assigned,
    as_one_vector,
    averaged_and_copied_back,
    foreach,
]


def check_seen(layer, write, mode):
    x = torch.randn(7, 6)
    with mode():
        before = layer(x)
        check(before, layer, x)
    write(layer)
    with mode():
        after = layer(x)
    assert not torch.allclose(before, after, atol=1e-3)
    check(after, layer, x)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_what_is_written_is_seen(method, write, mode, training):
    check_seen(patched(method).train(training), write, mode)


def test_values_that_an_average_writes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))
    tokengate.patch(model, "all-linear", rank=2).eval()
    own = [p for layer in tokengate.layers(model).values() for p in layer.modification.parameters()]
    for p in own:
        nn.init.constant_(p, 0.3)
    torch.manual_seed(1)
    x = torch.randn(3, 8)
    with torch.no_grad():
        model(x)
        for p in own:
            p.data.copy_(p * 0.5)
        # With the old B and the new A it was (-.2395, -.2502).
        right = torch.tensor([-0.1029, -0.2686])
        torch.testing.assert_close(model(x)[0], right, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_of_the_model_for_averages(method):
    """As timm's ModelEmaV3 and torch's AveragedModel have it, which is evaluated in between."""
    layer = patched(method)
    utils = pytest.importorskip("timm.utils")
    averages = utils.ModelEmaV3(layer, decay=0.5)
    x = torch.randn(7, 6)
    with torch.no_grad():
        for _ in range(3):
            before = averages.module(x)
            data_copy(layer)
            averages.update(layer)
            after = averages.module(x)
            assert not torch.allclose(before, after, atol=1e-3)
            check(after, averages.module, x)


def run_beside(program, *arguments):
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)])


@pytest.mark.parametrize("method", METHODS)
def test_shared_memory_that_another_process_writes(method, tmp_path):
    layer, path = patched(method).eval(), str(tmp_path / "values")
    sizes = [p.numel() for p in parameters(layer)]
    shared = torch.from_file(path, shared=True, size=sum(sizes))
    for p, part in zip(parameters(layer), shared.split(sizes), strict=True):
        p.data = part.copy_(p.detach().flatten()).view(p.shape)

    def write(_):
        program = "import sys, numpy; numpy.memmap(sys.argv[1], 'float32', 'r+')[:] *= 0.5"
        assert run_beside(program, path).wait(60) == 0

    check_seen(layer, write, torch.no_grad)


SENDER = """
import sys, torch
from torch import distributed
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=2)
torch.manual_seed(3)
for size in sys.argv[2:]:
    distributed.broadcast(torch.randn(int(size)) * 0.4, 0)
distributed.destroy_process_group()
"""


def test_what_another_rank_broadcasts(tmp_path):
    layers = [patched(method).eval() for method in METHODS]
    receiving = [p for layer in layers for p in parameters(layer)]
    x = torch.randn(7, 6)
    with torch.no_grad():
        before = [layer(x) for layer in layers]
    store = tmp_path / "store"
    with run_beside(SENDER, store, *[p.numel() for p in receiving]) as sender:
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=1, world_size=2)
        try:
            for p in receiving:
                distributed.broadcast(p.data, 0)
        finally:
            distributed.destroy_process_group()
        assert sender.wait(60) == 0
    with torch.no_grad():
        for layer, earlier in zip(layers, before, strict=True):
            assert not torch.allclose(layer(x), earlier, atol=1e-3)
            check(layer(x), layer, x)


# tau is moved by hand, too.
@pytest.mark.filterwarnings("ignore:SGD leaves out:tokengate.errors.LeftOutWarning")
@pytest.mark.parametrize("method", METHODS)
def test_training_by_hand_through_data(method):
    """p.data -= lr p.grad for 20 steps, as against an optimiser, which tells PyTorch of its own."""
    by_hand, by_optimizer = patched(method), patched(method)
    optimizer = torch.optim.SGD(by_optimizer.modification.parameters(), lr=0.05)
    x = torch.randn(7, 6)
    first = by_hand(x)
    for _ in range(20):
        for layer in (by_hand, by_optimizer):
            layer.zero_grad()
            layer(x).square().mean().backward()
        optimizer.step()
        for p in by_hand.modification.parameters():
            p.data -= 0.05 * p.grad
    assert not torch.allclose(by_hand(x), first, atol=1e-3)
    torch.testing.assert_close(by_hand(x), by_optimizer(x))
    check(by_hand(x), by_hand, x)
