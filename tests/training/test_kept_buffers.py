"""What is run on a user's behalf leaves buffers as they were, whatever forwards change."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate.layers.batches import evaluating, keeping_state


class Counting(nn.Module):
    """Whose forwards change buffers in evaluation, too."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("again", self.calls)  # tied
        self.register_buffer("replaced", torch.zeros(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("variance", torch.ones(8))
        self.register_buffer("unused", None)

    def forward(self, x):
        hidden = self.first(x)
        self.calls += 1
        self.replaced = self.replaced + hidden.detach().abs().flatten(0, -2).mean(0)
        F.batch_norm(hidden.detach().flatten(0, -2), self.mean, self.variance, training=True)
        return self.last(hidden.tanh())


def patched():
    torch.manual_seed(0)
    model = tokengate.patch(Counting(), "all-linear", rank=2)
    with torch.no_grad():
        for layer in tokengate.layers(model).values():
            layer.modification.B.normal_()
    return model


def loss(model, batch):
    return model(batch).square().mean()


BATCHES = [torch.randn(4, 5, 6) for _ in range(2)]
RUNS = {
    "calibrate": lambda model, folder: tokengate.calibrate(model, BATCHES),
    "drift": lambda model, folder: tokengate.drift(model, BATCHES),
    "export_changes": lambda model, folder: tokengate.export_changes(model, BATCHES, folder / "x"),
    "fisher_scores": lambda model, folder: tokengate.fisher_scores(model, BATCHES, loss),
    "fold": lambda model, folder: tokengate.fold(model, BATCHES),
    "modification_norms": lambda model, folder: tokengate.modification_norms(model, BATCHES),
    "suggest": lambda model, folder: tokengate.suggest(model, BATCHES, loss=loss),
    "verify": lambda model, folder: tokengate.verify(model, BATCHES[0]),
}


@pytest.mark.parametrize("run", RUNS)
def test_buffers_are_as_before(run, tmp_path):
    model = patched()
    model(BATCHES[0])
    before = dict(model.named_buffers(remove_duplicate=False))
    values = {name: buffer.clone() for name, buffer in before.items()}
    RUNS[run](model, tmp_path)
    after = dict(model.named_buffers(remove_duplicate=False))
    assert all(after[name] is buffer for name, buffer in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
    model(BATCHES[1])
    after = dict(model.named_buffers())
    assert not any(torch.equal(after[name], values[name]) for name in after), "it can fail"


def test_a_cache_stays_beside_what_says_what_it_is_of():
    """As rotary embeddings are, which are made anew for longer texts."""

    class Caching(nn.Linear):
        length = 0

        def forward(self, x):
            if x.shape[-2] > self.length:
                self.length = x.shape[-2]
                self.register_buffer("cache", torch.ones(self.length, 1), persistent=False)
            return super().forward(x) + self.cache[: x.shape[-2]]

    model = tokengate.patch(nn.Sequential(Caching(6, 6), nn.Linear(6, 6)), ["1"])
    long = torch.randn(2, 40, 6)
    model(long[:, :2])
    for run in (tokengate.verify, lambda model, x: tokengate.drift(model, [x], measure="cosine")):
        run(model, long)
    assert model(long).shape == (2, 40, 6)


def test_a_buffer_that_the_first_call_makes():
    """No state_dict has it yet, and what is run on a user's behalf is not the first call."""

    class Beginning(nn.Linear):
        def __init__(self):
            super().__init__(6, 6)
            self.register_buffer("mean", None)

        def forward(self, x):
            if self.mean is None:
                self.mean = x.mean()
            return super().forward(x - self.mean)

    runs = (
        lambda model, x: tokengate.patch(model, ["1"]),  # asks classes of others what they give
        tokengate.verify,
        lambda model, x: tokengate.drift(model, [x], measure="cosine"),
    )
    model = nn.Sequential(Beginning(), nn.Linear(6, 6))
    for run in runs:
        run(model, torch.randn(2, 3, 6))
        assert model[0].mean is None
    model(torch.randn(2, 3, 6))
    assert model[0].mean is not None


def test_what_is_unchanged_is_not_written_to():
    """A backward may wait for it; its numbers may be none; its dtype may know no comparison."""
    model = nn.Linear(2, 2)
    for dtype in (torch.float32, torch.float8_e4m3fn, torch.bool, torch.complex64):
        model.register_buffer(str(dtype).split(".")[1], torch.ones(3, 2).T.to(dtype))
    model.register_buffer("conjugate", torch.ones(2, dtype=torch.complex64).conj())
    model.register_buffer("imaginary", model.conjugate.imag)
    model.register_buffer("nan", torch.tensor(torch.nan))
    model.register_buffer("absent", torch.ones(2, device="meta"))
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with torch.inference_mode():
        model.register_buffer("of_inference", torch.tensor(torch.nan))
    versions = [b._version for b in model.buffers() if not b.is_inference()]
    with evaluating(model):
        pass
    assert [b._version for b in model.buffers() if not b.is_inference()] == versions
    with torch.inference_mode(), evaluating(model):
        model.of_inference.zero_()
    assert model.of_inference.isnan()


def test_large_buffers_are_not_copied():
    """As quantised weights are kept in buffers."""
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(300, 300, dtype=torch.uint8))
    for context, value in ((evaluating(model), 1), (keeping_state(model, most=10**5), 0)):
        with context:
            model.weight.fill_(1)
        assert model.weight.eq(value).all()
        model.weight.zero_()


def test_a_sharded_buffer(tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = nn.Module()
        mesh = init_device_mesh("cpu", (1,))
        model.register_buffer("mean", distribute_tensor(torch.zeros(4), mesh, [Shard(0)]))
        with evaluating(model):
            model.mean += 1
        assert not model.mean.full_tensor().any()
    finally:
        torch.distributed.destroy_process_group()
