"""Activation checkpointing: what is computed again in backward counts once, in everything."""

import concurrent.futures
import functools

import pytest
import torch
from models import Net, away_from_initialisation
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.errors import UnenteredContextWarning

# Some of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")

METHODS = ["lora", "dora", "adalora", "adapter"]
# Whether each forward is checkpointed, and how; and whether all of it or block by block.
KINDS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "without early stop": {"use_reentrant": False, "early_stop": False},
    "of another's own": {"function": True},
}


class Again(torch.autograd.Function):
    """A checkpoint as others write it, Unsloth among them."""

    @staticmethod
    def forward(ctx, block, x):
        ctx.block, ctx.x, ctx.state = block, x.detach(), torch.get_rng_state()
        return block(x)

    @staticmethod
    def backward(ctx, gradient):
        x = ctx.x.requires_grad_()
        with torch.enable_grad(), torch.random.fork_rng():
            torch.set_rng_state(ctx.state)
            given = ctx.block(x)
        torch.autograd.backward(given, gradient)
        return None, x.grad


def checkpointed(block, x, function=False, **kind):
    """What a block gives, which its backward computes again."""
    return Again.apply(block, x) if function else checkpoint(block, x, **kind)


class Checkpointed(Net):
    """`Net` whose blocks are checkpointed as `kind` says, or not."""

    kind = None

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.kind is None else checkpointed(block, x, **self.kind)
        return self.head(x)


def patched(method, kind):
    torch.manual_seed(0)
    model = Checkpointed()
    model.kind = kind
    tau = 1.0 if method == "dora" else 0.3
    options = {"rank": 3, "dropout": 0.3, "tau": tau, "penalty": 0.2}
    tokengate.patch(model, ["q_proj", "v_proj", "fc1"], method, **options)
    tokengate.scale_penalty(model, 2.0)
    calls = []
    model.blocks[0].q_proj.register_forward_hook(lambda *_: calls.append(1))
    return away_from_initialisation(model.double(), 0.4), calls


def everything(method, kind):
    """What two forwards and one backward leave behind."""
    model, calls = patched(method, kind)
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1, s=1e-3))
    taus = [layer.gate.tau.detach().clone() for layer in tokengate.layers(model).values()]
    schedule = tokengate.SparsitySchedule(model, optimizer, 0.5, 1)
    for layer, tau in zip(tokengate.layers(model).values(), taus, strict=True):
        layer.gate.tau.data.copy_(tau)  # with which some are closed
        layer.gate.penalty = 0.2
    torch.manual_seed(1)
    inputs = [torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with tokengate.record(model, positions=True) as rec:
        loss = sum(model(x).square().sum() for x in inputs)
        if method == "adalora":
            loss = loss + tokengate.orthogonality(model)
        loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    gradients |= {f"input {i}": x.grad for i, x in enumerate(inputs)}
    tallies = {n: layer.gate._seen.clone() for n, layer in tokengate.layers(model).items()}
    optimizer.step()
    return {
        "calls": len(calls),
        "gradients": gradients,
        "tallies": tallies,
        "report": rec.report().to_dict(),
        "positions": rec.positions,
        "sparsity": schedule.sparsity,
        "thresholds": schedule.thresholds,
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_computed_again_and_counted_once(method, kind):
    plain, again = everything(method, None), everything(method, KINDS[kind])
    assert (plain["calls"], again["calls"]) == (2, 4)
    assert {round(t.sum().item(), 6) for t in plain["tallies"].values()} == {4}
    assert 0 < plain["report"]["token_sparsity"] < 1
    names = [name for name in plain["gradients"] if name.endswith("tau")]
    assert len(names) == 6
    assert all(plain["gradients"][name].abs() > 1e-3 for name in names)
    for what in ("gradients", "tallies"):
        assert set(again[what]) == set(plain[what])
        for name, value in plain[what].items():
            assert value.any()
            torch.testing.assert_close(again[what][name], value, rtol=0, atol=1e-12, msg=name)
    for what in ("report", "sparsity"):
        assert again[what] == plain[what]
    assert again["thresholds"] == pytest.approx(plain["thresholds"], rel=1e-9)
    assert min(plain["thresholds"].values()) > 0
    for name, calls in plain["positions"].items():
        assert len(again["positions"][name]) == len(calls) == 2
        assert all(map(torch.equal, again["positions"][name], calls))


def test_dropout_would_show():
    """The masks of dropout are drawn again as they were; others give other gradients."""
    kind = {"use_reentrant": False, "preserve_rng_state": False, "determinism_check": "none"}
    plain, again = everything("lora", None), everything("lora", kind)
    name = "blocks.0.v_proj.modification.A"
    assert (plain["gradients"][name] - again["gradients"][name]).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_what_runs_without_gradients_is_no_part_of_a_training_step(kind, without):
    """As `generate` and a reference model, between forwards that are learnt from."""
    model, _ = patched("lora", KINDS.get(kind))
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1, s=1e-3))
    tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    with tokengate.record(model, trained=True) as step, tokengate.record(model) as all_of_it:
        with without():
            model(torch.randn(7, 9, 8, dtype=torch.float64, requires_grad=True))
        loss = model(x).square().sum()
        with without():
            model(torch.randn(3, 1, 8, dtype=torch.float64))
        loss.backward()
    assert {m.positions for m in all_of_it.report().modules.values()} == {63 + 10 + 3}
    assert {m.positions for m in step.report().modules.values()} == {10}
    seen = [layer.gate._seen for layer in tokengate.layers(model).values()]
    assert {round(counts.sum().item(), 6) for counts in seen} == {2}


def embedded_in_backward(model, x):
    """The loss of `model(x)`, whose graph a hook makes when its gradient is there (GradCache)."""
    with torch.no_grad():
        cached = model(x).requires_grad_()
    loss = cached.square().sum()

    def embed(gradient):
        with torch.enable_grad():
            given = gradient * torch.autograd.grad(cached.square().sum(), cached)[0]
            (model(x) * given).sum().backward()

    loss.detach_().requires_grad_().register_hook(embed)
    return loss


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_a_hook_computes_in_backward_is_computed_for_the_first_time(kind):
    """As by sentence-transformers' losses that cache: it counts, and contexts hold in it."""

    def left_behind(how):
        model, _ = patched("lora", KINDS.get(kind))
        model.eval()  # without dropout, which the two draw otherwise
        optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1, s=1e-3))
        tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
        for layer in tokengate.layers(model).values():
            layer.gate.tau.data.fill_(0.3)
        torch.manual_seed(1)
        x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
        inside = torch.arange(5).expand(2, 5) > 1
        with tokengate.restrict(model, inside), tokengate.record(model, trained=True) as rec:
            how(model, x).backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        seen = [layer.gate._seen for layer in tokengate.layers(model).values()]
        return rec.report().to_dict(), gradients, seen

    at_once = left_behind(lambda model, x: model(x).square().sum())
    in_a_hook = left_behind(embedded_in_backward)
    assert {m["positions"] for m in at_once[0]["modules"].values()} == {6}
    assert in_a_hook[0] == at_once[0]
    for ours, theirs in zip(in_a_hook[1:], at_once[1:], strict=True):
        assert all(value.any() for value in theirs)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


AROUND = {
    "restrict": lambda model: tokengate.restrict(model, torch.arange(5).expand(2, 5) > 1),
    "disabled": tokengate.disabled,
    "use": lambda model: tokengate.use(model, None),
}


@pytest.mark.parametrize("within", AROUND)
def test_a_hook_computes_within_what_its_forward_was_in(within):
    """Also where backward runs in another thread, as a device's does; or it is said."""
    model, _ = patched("lora", None)
    model.eval()
    torch.manual_seed(1)
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    outputs = []

    def seen(model, x):
        outputs.append(model(x))
        return outputs[-1]

    def backward(loss):
        with concurrent.futures.ThreadPoolExecutor(1) as other:
            other.submit(loss.backward).result()

    free = model(x)
    around = functools.partial(AROUND[within], model)
    with around(), around():
        backward(embedded_in_backward(functools.partial(seen, model), x))
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], free)
    with around():
        with around():
            loss = embedded_in_backward(model, x)
        with pytest.warns(UnenteredContextWarning, match=f"a hook .* tokengate.{within}, .* block"):
            loss.backward()  # in one of two
    embedded_in_backward(lambda x: within_its_own(model, around, x), x).backward()
    embedded_in_backward(model, x).backward()
    with around(), torch.no_grad():
        model(x)  # of an evaluation
    model(x).sum().backward()


def test_a_hook_computes_without_what_was_around_another_model():
    """As a teacher, whose answers come of its base; and one in force does not stand for its own."""
    model, other = patched("lora", None)[0].eval(), patched("lora", None)[0]
    x = torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    with tokengate.disabled(other):
        loss = embedded_in_backward(model, x)
    loss.backward()
    with tokengate.disabled(model):
        loss = embedded_in_backward(model, x)
    with tokengate.disabled(other), pytest.warns(UnenteredContextWarning, match="has ended"):
        loss.backward()


def within_its_own(model, around, x):
    with around():
        return model(x)


def test_lambda_would_show(monkeypatch):
    """Counted again, a position pulls and is tallied twice."""
    from tokengate.gates import base, deciding
    from tokengate.reports import recording

    for module in (base, deciding):
        monkeypatch.setattr(module, "is_learnt_from", lambda: True)
    monkeypatch.setattr(recording, "is_computed_again", lambda: False)
    again = everything("lora", KINDS["not reentrant"])
    assert {round(t.sum().item(), 6) for t in again["tallies"].values()} == {8}
    assert again["report"] != everything("lora", None)["report"]
