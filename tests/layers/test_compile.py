"""torch.compile: one whole graph for any length, forward and backward, and eager mode's numbers."""

import pytest
import torch
import torch._inductor.config
from models import away_from_initialisation
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import tokengate


class Masked(nn.Module):
    """(B, T, 8) -> (B, T, 8), with the padding mask of a language model."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(8, 16, bias=False)
        self.v_proj = nn.Linear(16, 8)

    def forward(self, inputs_embeds, attention_mask=None):
        return self.v_proj(torch.tanh(self.q_proj(inputs_embeds)))


def patched(method):
    torch.manual_seed(0)
    tau = 1.0 if method == "dora" else 0.5  # some open, some closed
    model = tokengate.patch(Masked(), "all-linear", method, rank=2, tau=tau, penalty=0.3)
    away_from_initialisation(model, 0.4)
    model(batch(3)[0])  # the first forward reports layers that it missed, and is watched for it
    return model


def batch(length):
    generator = torch.Generator().manual_seed(length)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 2] = 0
    return torch.randn(2, length, 8, generator=generator), mask


def results(model, run, x, mask):
    """Output and every gradient."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    h = run(x, attention_mask=mask)
    h.square().sum().backward()
    own = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {"h": h.detach(), "x": x.grad, **own}


def same(got, wanted):
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4, msg=name)


def check(model, compiled, length):
    """Compiled equals eager, where the mask and the gate make a difference."""
    x, mask = batch(length)
    with tokengate.record(model) as rec:
        wanted = results(model, model, x, mask)
    assert {m.positions for m in rec.report().modules.values()} == {2 * length - length // 2}
    assert 0 < rec.report().token_sparsity < 1
    without = results(model, model, x, None)
    taus = [name for name in wanted if name.endswith("tau")]
    assert max(abs(wanted[name] - without[name]) for name in taus) > 1e-3
    same(results(model, compiled, x, mask), wanted)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
def test_any_length_in_one_graph(method):
    torch.compiler.reset()
    model = patched(method)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    graphs = []
    for length in (5, 6, 9, 14):
        check(model, compiled, length)
        graphs.append(counter.frame_count)
    # The second length makes the graph that serves all others.
    assert graphs == [1, 2, 2, 2]


@pytest.mark.parametrize(("dynamic", "counts"), [(True, 1), (False, 3)])
def test_dynamic_from_the_start_or_never(dynamic, counts):
    torch.compiler.reset()
    model = patched("lora")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter, dynamic=dynamic)
    graphs = set()
    for length in (5, 6, 9):
        check(model, compiled, length)
        graphs.add(counter.frame_count)
    assert len(graphs) == counts


@torch._inductor.config.patch(compile_threads=1)
def test_inductor():
    torch.compiler.reset()
    model = patched("lora")
    tokengate.scale_penalty(model, 2.0)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for length in (5, 9):
        check(model, compiled, length)
