"""Whoever calls a forward, and however: what it is called with reaches the layers inside."""

import copy
import inspect
import io
import pickle
import types
from abc import ABC

import pytest
import torch
from models import away_from_initialisation
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.errors import UnreachedLayerWarning
from tokengate.layers import calls

IDS = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 3, 4, 5]])
MASK = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]])
REAL = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden_states, attention_mask=None):
        return hidden_states + self.fc(hidden_states)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(16, 8), Block()

    def forward(self, input_ids, attention_mask=None):
        return {"states": self.block.forward(self.embed(input_ids))}


class Model(nn.Module):
    """As a causal language model is made; `encode` is a way in that is no forward."""

    def __init__(self):
        super().__init__()
        self.model, self.head = Inner(), nn.Linear(8, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.model(input_ids, attention_mask)["states"])

    def encode(self, ids, mask):
        return self.model.forward(ids, attention_mask=mask)["states"]


def patched():
    torch.manual_seed(0)
    return tokengate.patch(Model(), ["fc", "head"], rank=2, penalty=0.5)


CALLS = {
    "module": lambda m: m(IDS, MASK),
    "forward": lambda m: m.forward(IDS, MASK),
    "forward by keyword": lambda m: m.forward(input_ids=IDS, attention_mask=MASK),
    "forward of the class": lambda m: type(m).forward(m, IDS, MASK),
    "head by hand": lambda m: m.head(m.model(IDS, MASK)["states"]),
    "head by hand after forward": lambda m: m.head(m.model.forward(IDS, MASK)["states"]),
    "head by hand, flat": lambda m: m.head(m.model(IDS, MASK)["states"].view(-1, 8)),
    "method": lambda m: m.head(m.encode(IDS, MASK)),
}


def positions(model, call):
    with tokengate.record(model) as rec:
        call(model)
    return {name: module.positions for name, module in rec.report().modules.items()}


def taus(model, call):
    model.zero_grad()
    call(model).sum().backward()
    return [layer.gate.tau.grad.item() for layer in tokengate.layers(model).values()]


@pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))
def test_padding_counts_in_nothing(call):
    model = away_from_initialisation(patched())
    assert positions(model, lambda m: m(IDS)) == {"model.block.fc": 10, "head": 10}
    assert positions(model, call) == {"model.block.fc": REAL, "head": REAL}
    assert taus(model, call) == taus(model, CALLS["module"]) != taus(model, lambda m: m(IDS))


@pytest.mark.parametrize("call", list(CALLS.values()), ids=list(CALLS))
def test_a_region_reaches_them_too(call):
    model = patched()
    region = torch.tensor([[1, 0, 0, 0, 1], [1, 0, 0, 0, 0]])
    for where, inside in ((region, 2), (tokengate.after([5]), 2)):
        with tokengate.restrict(model, where):
            assert positions(model, call) == {"model.block.fc": inside, "head": inside}


class Several(Model):
    """Its mask is of one of its parts, as that of a model of text and images."""

    def forward(self, input_ids, pixel_values=None, attention_mask=None):
        return super().forward(input_ids, attention_mask)


def test_a_head_of_a_part_that_alone_has_the_mask():
    model = tokengate.patch(Several(), ["fc", "head"], rank=2)
    for call in (model, model.forward):
        found = positions(model, lambda m, call=call: call(IDS, attention_mask=MASK))
        assert found == {"model.block.fc": REAL, "head": REAL}


def test_what_is_left_belongs_to_one_output():
    model = patched()
    other = 1 - MASK
    first, second = model.model(IDS, MASK)["states"], model.model(IDS, other)["states"]
    assert positions(model, lambda m: m.head(first))["head"] == REAL
    assert positions(model, lambda m: m.head(second))["head"] == 10 - REAL
    assert positions(model, lambda m: m.head(first.clone()))["head"] == 10
    assert positions(model, lambda m: m.head(first[:, 1:]))["head"] == 8
    assert not calls._THREAD.running
    saved = io.BytesIO()
    torch.save(first, saved)
    saved.seek(0)
    torch.load(saved, weights_only=True)


@pytest.mark.parametrize("call", ["forward", "method"])
def test_compiled_whole(call):
    torch.compiler.reset()
    model = away_from_initialisation(patched())
    wanted = taus(model, CALLS[call])
    compiled = torch.compile(lambda: CALLS[call](model), fullgraph=True, backend="aot_eager")
    assert taus(model, lambda _: compiled()) == pytest.approx(wanted, rel=1e-6)
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("call", ["forward", "head by hand"])
def test_checkpointed(call, reentrant):
    model = away_from_initialisation(patched())
    wanted = taus(model, CALLS[call])
    forward = model.model.block.forward
    model.model.block.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    model.model.embed.weight.requires_grad_(True)
    assert taus(model, CALLS[call]) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_followed_for_themselves(copied):
    model = patched()
    twin = copied(model)
    tokengate.unpatch(model)
    for call in CALLS.values():
        assert positions(twin, call) == {"model.block.fc": REAL, "head": REAL}
    tokengate.unpatch(twin)
    assert type(twin) is Model
    assert type(twin.model.block) is Block


class CalledOtherwise(Model):
    def __call__(self, ids, *, more=None):
        return super().__call__(ids)


def test_a_followed_module_looks_like_its_own_class():
    model = patched()
    assert isinstance(model, Model)
    for module, own in ((model, Model), (model.model, Inner), (model.model.block, Block)):
        assert type(module) is not own
        assert str(type(module)) == str(own)
        assert type(module).__doc__ == own.__doc__
        assert inspect.signature(module.forward) == inspect.signature(own().forward)
    assert type(model.model.embed) is nn.Embedding
    own_call = tokengate.patch(CalledOtherwise(), rank=2, targets=["head"])
    assert inspect.signature(own_call) == inspect.signature(CalledOtherwise())
    tokengate.unpatch(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in Model().modules()]
    assert not any("tokengate" in key for m in model.modules() for key in vars(m))


class WithState(Model):
    """Keeps what cannot be pickled out of its state, as a LightningModule its trainer."""

    def __init__(self):
        super().__init__()
        self.trainer = None

    def __getstate__(self):
        return {**self.__dict__, "trainer": None}


class First(ABC):  # noqa: B024
    """A first base without a layout of its own."""

    __slots__ = ()


class SecondIsModule(First, nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden_states, attention_mask=None):
        return self.fc(hidden_states)


REGISTERED = []


class Registering(nn.Module):
    """Keeps a list of what is written below it, each with a name."""

    def __init_subclass__(cls, *, called, **options):
        super().__init_subclass__(**options)
        REGISTERED.append(called)


class Registered(Registering, called="one"):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, hidden_states, attention_mask=None):
        return self.fc(hidden_states)


def test_what_a_class_says_of_its_copies_holds():
    model = tokengate.patch(WithState(), ["fc"], rank=2)
    model.trainer = (each for each in ())
    twin = pickle.loads(pickle.dumps(model))
    assert twin.trainer is None
    assert positions(twin, CALLS["forward"]) == {"model.block.fc": REAL}


@pytest.mark.parametrize("kind", [SecondIsModule, Registered])
def test_classes_that_are_made_otherwise(kind):
    model = tokengate.patch(kind(), ["fc"], rank=2)
    x = torch.randn(2, 5, 8)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert positions(each, lambda m: m(x, MASK)) == {"fc": REAL}
        assert positions(each, lambda m: m.forward(x, MASK)) == {"fc": REAL}
    assert type(tokengate.unpatch(model)) is kind
    assert REGISTERED == ["one"]


@pytest.mark.parametrize("before", [False, True])
def test_a_forward_of_the_users_own_before_that_of_the_class(before):
    """As Accelerate's, TRL's and Liger's, which may not run that of the class at all."""

    def other(self, input_ids, attention_mask=None):
        states = self.model.block.fc(self.model.embed(input_ids))
        return self.head(states)

    torch.manual_seed(0)
    model = Model()
    if before:
        model.forward = types.MethodType(other, model)
    tokengate.patch(model, ["head", "fc"], rank=2)
    if not before:
        model.forward = types.MethodType(other, model)
    assert positions(model, lambda m: m(IDS, MASK)) == {"model.block.fc": REAL, "head": REAL}
    assert positions(model, lambda m: m(IDS)) == {"model.block.fc": 10, "head": 10}
    forward = model.forward
    tokengate.unpatch(model)
    assert model.forward == forward


def test_what_was_compiled_in_place_runs_on_after_unpatch():
    """`module.compile()` keeps the method that it found, and so that of the class given here."""
    torch.manual_seed(0)
    model = Model()
    base = model(IDS, MASK)
    away_from_initialisation(tokengate.patch(model, ["fc", "head"], rank=2, gate=False), 0.3)
    for module in (model, model.model.block):
        module.compile(backend="eager")
    assert not torch.allclose(model(IDS, MASK), base)
    tokengate.unpatch(model)
    assert torch.equal(model(IDS, MASK), base)


def test_an_interrupted_forward_leaves_nothing_behind():
    model = patched()

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.head.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.forward(IDS, MASK)
    assert not calls._THREAD.running
    assert not calls.RUNNING
    hook.remove()
    assert positions(model, lambda m: m(IDS)) == {"model.block.fc": 10, "head": 10}


class Towers(nn.Module):
    """As CLIP: of its two ways in that are no forward, the second passes a layer by."""

    def __init__(self):
        super().__init__()
        self.text, self.image = Block(), Block()

    def forward(self, text, image):
        return self.encode_text(text) @ self.encode_image(image).mT

    def encode_text(self, text):
        return self.text(text)

    def encode_image(self, image):
        return self.image.forward(image)


class Passing(Block):
    def forward(self, hidden_states, attention_mask=None):
        return nn.functional.linear(hidden_states, getattr(self, "fc").weight)  # noqa: B009


def test_unreached_layers_are_named_whoever_calls():
    x = torch.randn(2, 5, 8)
    model = Towers()
    model.image = Passing()
    tokengate.patch(model, ["fc"], rank=2)
    model.encode_text(x)  # a warning would be an error here: all of that tower is reached
    with pytest.warns(UnreachedLayerWarning, match="first forward of this Passing, 'fc' of Pass"):
        model.encode_image(x)
    model.encode_image(x)  # once
    for call in (lambda m: m.forward(x, x), lambda m: m(x, x)):
        twin = Towers()
        twin.image = Passing()
        tokengate.patch(twin, ["fc"], rank=2)
        with pytest.warns(UnreachedLayerWarning, match=r"this Towers, 'image\.fc' of Passing was"):
            call(twin)
        call(twin)


def test_a_lost_layer_is_named_whoever_calls():
    model = patched()
    model.head = nn.Linear(8, 4)
    with pytest.warns(UnreachedLayerWarning, match=r"'head' of this Model was patched, and"):
        model.forward(IDS, MASK)


class Interrupted(nn.Module):
    """Fails between two graphs."""

    fails = True

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x, attention_mask=None):
        y = self.fc(x)
        torch._dynamo.graph_break()
        if self.fails:
            raise KeyboardInterrupt
        return y


def test_what_an_interruption_left_of_compiled_code_is_forgotten():
    torch.compiler.reset()
    model = tokengate.patch(Interrupted(), "all-linear", rank=2)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[1, 1, 0], [1, 0, 0]])
    with pytest.raises(KeyboardInterrupt):
        torch.compile(model, backend="eager")(x, attention_mask=mask)
    assert calls.running()
    model.fails = False
    with tokengate.record(model) as rec:
        model(x)
    assert rec.report().modules["fc"].positions == 6  # and not 3, as that mask says
    assert not calls.running()
