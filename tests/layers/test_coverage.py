"""What is patched is called and trained, or the user is told."""

import copy
import pickle
import warnings

import pytest
import torch
from models import Net, snapshot
from torch import nn
from torch.nn import functional as F

import tokengate
from tokengate.errors import UnreachedLayerWarning
from tokengate.layers import coverage
from tokengate.linears.owners import reads_weight, returns_tuple


class Reader(nn.Module):
    """Reads `b`'s weight through a name that its source does not show, and calls `a`."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(self.a(x), getattr(self, "b").weight)  # noqa: B009


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.text, self.vision = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, image=None):
        return self.text(x) if image is None else self.text(x) + self.vision(image)


class LastLayerUnused(nn.Module):
    """As in LLaVA: the last layer runs, and the logits do not depend on it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        first = self.layers[0](x)
        last = self.layers[1](first)
        return {"logits": first, "hidden": (last,)}


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.out = nn.Linear(4, 4)

    def forward(self, x):
        return self.out(self.experts[0](x))  # no token for the other


class OnlyInTraining(nn.Module):
    """The fast path of an evaluation without gradients leaves the layer out."""

    def __init__(self, gradients):
        super().__init__()
        self.layer, self.gradients = nn.Linear(4, 4), gradients

    def forward(self, x):
        fast = not self.training and not (self.gradients and torch.is_grad_enabled())
        return F.linear(x, getattr(self, "layer").weight) if fast else self.layer(x)  # noqa: B009


def watched(model):
    return not model.__dict__[coverage.SEEN]


def test_a_layer_that_is_never_called_is_reported_once():
    model = tokengate.patch(Reader(), "all-linear")
    x = torch.randn(2, 4)
    with pytest.warns(
        UnreachedLayerWarning,
        match=r"first forward of this Reader, 'b' of Reader was patched but never called: either",
    ) as caught:
        model(x)
    assert [each.filename for each in caught] == [__file__]
    assert "\n" not in str(caught[0].message)
    assert str(caught[0].message).endswith(".")
    model(x)  # a second warning would be an error here
    assert not watched(model)


def test_nothing_is_said_where_all_is_reached():
    model = tokengate.patch(Net(), "all-linear")
    assert watched(model)
    model(torch.randn(2, 5, 8))
    assert not watched(model)


def test_calls_before_the_first_whole_forward_count():
    model = tokengate.patch(Branches(), "all-linear")
    model.vision(torch.randn(2, 4))
    assert watched(model)
    model(torch.randn(2, 4))  # a warning would be an error here
    assert not watched(model)


def test_a_branch_that_did_not_run_is_named_with_that_reason():
    model = tokengate.patch(Branches(), "all-linear")
    with pytest.warns(UnreachedLayerWarning, match="'vision' of Branches .* another br"):
        model(torch.randn(2, 4))


def test_many_names_are_cut():
    model = nn.ModuleDict({f"l{i}": nn.Linear(2, 2) for i in range(8)})
    model.forward = lambda x: x
    tokengate.patch(model, "all-linear")
    with pytest.warns(UnreachedLayerWarning, match=r"'l4' and 3 more of ModuleDict were"):
        model(torch.randn(1, 2))


def test_an_expert_without_a_token_is_no_fault():
    model = tokengate.patch(Mixture(), "all-linear")
    x = torch.randn(2, 4)
    model(x)
    tokengate.verify(model, x)
    layer = tokengate.patch(nn.Linear(3, 3), "all-linear", tau=0.5)
    layer(torch.randn(0, 3)).sum().backward()  # what an expert without a token is given, in others
    assert layer.gate.tau.grad.item() == 0


def test_disabled_and_recorded_forwards_count():
    model = tokengate.patch(Net(), "all-linear")
    with tokengate.disabled(model):
        model(torch.randn(2, 5, 8))
    assert not watched(model)


def test_copies_report_for_themselves_and_unpatch_takes_it_back():
    model = Reader()
    before = snapshot(model)
    hooks = dict(model._forward_hooks)
    tokengate.patch(model, ["b"])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.warns(UnreachedLayerWarning):
            other(torch.randn(2, 4))
    tokengate.unpatch(model)
    assert snapshot(model) == before
    assert dict(model._forward_hooks) == hooks
    model(torch.randn(2, 4))


def test_the_users_hooks_stay():
    model, calls = Net(), []
    model.register_forward_hook(lambda *_: calls.append(1))
    tokengate.patch(model, ["q_proj"])
    model(torch.randn(2, 5, 8))
    model(torch.randn(2, 5, 8))
    assert calls == [1, 1]
    tokengate.unpatch(model)
    model(torch.randn(2, 5, 8))
    assert calls == [1, 1, 1]


def test_a_compiled_model_has_no_graph_break_and_no_report():
    torch.compiler.reset()
    model = tokengate.patch(Reader(), ["b"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(2, 4))
    with pytest.warns(UnreachedLayerWarning):
        model(torch.randn(2, 4))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Reader, "in evaluation without gradients, 'b' of Reader was patched but never called"),
        (lambda: OnlyInTraining(False), "in evaluation without gradients, 'layer' of OnlyInTr"),
        (
            LastLayerUnused,
            "in evaluation, 'layers.1.modification.A', 'layers.1.modification.B', 'layers.1.gate.t"
            "au' got no gradient: .* exclude it",
        ),
    ],
)
def test_verify_raises(make, message):
    model = tokengate.patch(make(), "all-linear")
    with pytest.raises(tokengate.TokenGateError, match=message) as error:
        tokengate.verify(model, torch.randn(2, 4))
    assert str(error.value).endswith(".")
    assert "\n" not in str(error.value)


def test_verify_passes_arguments_on():
    model = tokengate.patch(Branches(), "all-linear")
    x = torch.randn(2, 4)
    tokengate.verify(model, x, image=x)
    with pytest.raises(tokengate.TokenGateError, match="'vision' of Branches"):
        tokengate.verify(model, x)


def test_verify_leaves_everything_as_it_was():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    tokengate.patch(model, ["0", "3"], dropout=0.5)
    model[1].eval()
    x = torch.randn(8, 4)
    model(x).sum().backward()
    before, state = snapshot(model), torch.get_rng_state()
    gradients = {n: (p.grad, None if p.grad is None else p.grad.clone()) for n, p in
                 model.named_parameters()}  # fmt: skip
    assert any(g is not None for g, _ in gradients.values())
    tokengate.verify(model, x)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradients[name][0]
        assert parameter.grad is None or torch.equal(parameter.grad, gradients[name][1])
    model.train()
    model(torch.randn(8, 4))
    assert snapshot(model) != before  # the batch norm's statistics could have changed


class Averaging(nn.Module):
    """Whose forward puts another tensor in its buffer's place."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        return self.fc(x)


def test_verify_gives_buffers_back_that_a_forward_replaces():
    model, x = tokengate.patch(Averaging(), ["fc"]), torch.randn(8, 4)
    before = model.mean
    tokengate.verify(model, x)
    assert model.mean is before
    assert not model.mean.any()
    model(x)
    assert model.mean.any(), "it can fail"


def test_verify_needs_a_patched_model():
    with pytest.raises(tokengate.TokenGateError, match="verify was asked of a Net without"):
        tokengate.verify(Net(), torch.randn(2, 8))


class ReadsAndCalls(nn.Module):
    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(4, 4)

    def forward(self, x):
        return self.wo(x.to(self.wo.weight.dtype)) + self.wo.weight.sum()


class ReadsOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(4, 4)

    def forward(self, x):
        return F.linear(x, self.wo.weight)


class InheritsIt(ReadsOnly):
    pass


class AsksOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.wo = nn.Linear(4, 4)
        nn.init.zeros_(self.wo.weight)

    def forward(self, x):
        return [f(x.to(self.wo.weight.device)) for f in self.children()][0]  # noqa: RUF015


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores, scores.argmax(-1)


def test_what_the_source_says():
    assert not reads_weight(ReadsAndCalls(), "wo")
    assert reads_weight(ReadsOnly(), "wo")
    assert reads_weight(InheritsIt(), "wo")
    assert not reads_weight(AsksOnly(), "wo")
    assert reads_weight(nn.MultiheadAttention(4, 2), "out_proj")
    assert returns_tuple(Router)
    assert not returns_tuple(nn.Linear)


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (
            ReadsOnly,
            "wo",
            "whose owner '0' is a ReadsOnly, which reads the weight itself",
        ),
        (lambda: nn.Sequential(Router(4, 4), nn.Linear(4, 4)), "0", "is a Router and returns a tu"),
        (
            lambda: nn.ModuleDict({"w": nn.Linear(4, 4, dtype=torch.complex64)}),
            "w",
            r"'0\.w', whose weight is complex",
        ),
    ],
)
def test_refused_at_patch_time_and_left_out_of_all_linear(make, target, message):
    model = nn.ModuleList([make(), nn.Linear(2, 2)])
    before = snapshot(model)
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.patch(model, [f"0.{target}"])
    assert snapshot(model) == before
    assert f"0.{target}" not in tokengate.layers(tokengate.patch(model, "all-linear"))


def test_a_tied_head_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.embed(ids))

    model = Tied()
    with pytest.raises(tokengate.TokenGateError, match="'head', whose weight is tied to the embed"):
        tokengate.patch(model, ["head"])
    model.head.weight = nn.Parameter(model.embed.weight.detach().clone())
    tokengate.patch(model, ["head"])


def test_several_calls_in_one_forward_count_each():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(4, 4)

        def forward(self, x, relative):
            return self.proj(x) + self.proj(relative).mean(-2, keepdim=True)

    model = tokengate.patch(Twice(), ["proj"], tau=0.5)
    with tokengate.record(model) as rec:
        model(torch.randn(2, 3, 4), torch.randn(1, 5, 4))
    assert rec.report().modules["proj"].positions == 2 * 3 + 5


@pytest.mark.filterwarnings("ignore:SGD leaves out")
def test_an_optimizer_may_be_given_other_parameters_between_its_steps():
    """As those of other layers in turn: as many as before, beside a layer that stays frozen."""
    model = tokengate.patch(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), ["*"])
    first, second, third = (list(layer.modification.parameters()) for layer in model)
    optimizer = torch.optim.SGD([*first, *second], lr=0.1)
    for p in first:
        p.requires_grad_(False)
    moved = [p.detach().clone() for p in third]
    for params in ([*first, *second], [*first, *third]):
        optimizer.param_groups[0]["params"] = params
        model(torch.randn(3, 4)).square().sum().backward()
        optimizer.step()
    assert any(not torch.equal(p, before) for p, before in zip(third, moved, strict=True))


def test_warnings_are_of_their_own_class():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnreachedLayerWarning)
        assert tokengate.patch(Reader(), ["b"])(torch.randn(2, 4)).shape == (2, 4)
    assert issubclass(UnreachedLayerWarning, UserWarning)
