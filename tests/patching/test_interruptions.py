"""Ctrl-C at any line of what changes a model leaves it as it was, or changed whole."""

import contextlib
import copy
import sys

import pytest
import torch
from models import away_from_initialisation, snapshot
from torch import nn

import tokengate
from tokengate import Slices
from tokengate.layers import changing, using

# One batch: fold unfolds and folds again for each, by the same lines.
DATA = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))]


class Small(nn.Module):
    """`(..., 8) -> (..., 4)`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(8, 12)
        self.fc = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.head(torch.tanh(self.fc(q * k) + v))


def patch(model):
    tokengate.patch(
        model, ["fc", "qkv.q", "qkv.v"], "dora", rank=2, train=["head"],
        slices={"qkv": Slices(q=4, k=4, v=4)},
    )  # fmt: skip


def patched():
    """Open everywhere, and the slice v closed everywhere."""
    model = Small().eval()
    patch(model)
    away_from_initialisation(model, 0.3)
    model.qkv.v.gate.tau.data.fill_(1e6)
    return model


def state(model):
    """What a model computes, and is made of."""
    with torch.no_grad():
        output = model(DATA[0]).tolist()  # first: it takes its hook off
    found = snapshot(model)
    del found["attributes"]  # a place for names may be left
    modules = [(n, m) for n, m in model.named_modules() if not n.endswith("adapters")]
    return {
        **found,
        "output": output,
        "modules": [(n, type(m)) for n, m in modules],
        "hooks": [
            (n, kind, len(getattr(m, kind)))
            for n, m in modules
            for kind in sorted(vars(m))
            if kind.endswith("_hooks")
        ],
    }


class Interrupted(contextlib.AbstractContextManager):
    """Raises KeyboardInterrupt at line event number `at` within the functions of these names."""

    def __init__(self, names, at):
        self.names, self.left, self.happened = names, at, False

    def _global(self, frame, event, argument):
        code = frame.f_code
        if code.co_name in self.names and "/tokengate/" in code.co_filename:
            return self._local
        return None

    def _local(self, frame, event, argument):
        if event == "line" and not self.happened:
            if self.left == 0:
                self.happened = True
                raise KeyboardInterrupt
            self.left -= 1
        return self._local

    def __enter__(self):
        self.before = sys.gettrace()
        sys.settrace(self._global)
        return self

    def __exit__(self, *error):
        sys.settrace(self.before)
        # Some lines' events come between the end of a `with` block and its exit, where Python hears
        # no signal. A lock stays held then, for which the threads of other tests wait for ever.
        for lock in (changing._CHANGING, using._SWITCHING):
            while lock._is_owned():
                lock.release()


def at_every_line(make, act, names, finish=None):
    """`act(model)` interrupted at each line in turn is done whole or not at all."""
    model = make()
    before = state(model)
    act(model)
    after = state(model)
    assert before != after
    for at in range(2000):
        model = make()
        before = state(model)
        with Interrupted(names, at) as interrupted, contextlib.suppress(KeyboardInterrupt):
            act(model)
        if not interrupted.happened:
            assert at > 3 * len(names)
            return
        found = state(model)
        assert found == before or same_but_objects(found, after), (at, names)
        if finish is not None:
            finish(model)
    raise AssertionError("it never ends")


def same_but_objects(found, wanted):
    def plain(each):
        parameters = {n: flags for n, (_, *flags) in each["parameters"].items()}
        return {**each, "parameters": parameters}

    return plain(found) == plain(wanted)


def gives_the_base_back(model):
    with contextlib.suppress(tokengate.TokenGateError):  # not patched
        tokengate.unpatch(model)
    base = Small().eval()
    assert list(model.state_dict()) == list(base.state_dict())
    for name in ("fc", "qkv"):
        assert torch.equal(getattr(model, name).weight, getattr(base, name).weight)
        assert type(getattr(model, name)) is nn.Linear
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any("tokengate" in key for m in model.modules() for key in vars(m))
    assert all(p.requires_grad for p in model.parameters())


ATTACHING = {"put_on", "attach", "swap", "become", "reroute"}
DETACHING = {"take_off", "detach", "swap_back", "become", "reroute"}


def test_patch():
    def act(model):
        torch.manual_seed(1)
        patch(model)

    names = {*ATTACHING, "install", "_freeze_all_but", "rename", "settle_fast_paths", "watch"}
    at_every_line(
        lambda: Small().eval(), act, {*names, "follow", "unfollow"},
        finish=gives_the_base_back,
    )  # fmt: skip


def test_unpatch():
    names = {*DETACHING, "_unpatch", "unfold", "unfollow"}
    at_every_line(patched, tokengate.unpatch, names, finish=gives_the_base_back)


FOLDING = {"fold_layers", "put", "_write", "_read", "write_rows", "write", "_settle"}


def test_fold():
    at_every_line(
        patched, lambda model: tokengate.fold(model, DATA),
        {*FOLDING, *DETACHING, "unfolded", "_reattach", "put_on", "attach", "as_folded"},
        finish=gives_the_base_back,
    )  # fmt: skip


@pytest.mark.parametrize("way", ["undo", "unpatch"])
def test_what_is_folded_is_unfolded(way):
    def act(model):
        model.folding.undo() if way == "undo" else tokengate.unpatch(model)

    def make():
        model = patched()
        model.__dict__["folding"] = tokengate.fold(model, DATA)
        return model

    names = {*FOLDING, *ATTACHING, "undo", "unfold", "_reattach", "_unpatch", "unpatch"}
    names |= {"all_or_nothing", "unchanged_if_interrupted"}
    at_every_line(make, act, names, finish=gives_the_base_back)


def test_disabled():
    model = patched()
    tokengate.fold(model, DATA)
    before = state(model)
    names = {*FOLDING, "settle_fast_paths", "disabled"}
    for at in range(1000):
        with (
            Interrupted(names, at) as interrupted,
            contextlib.suppress(KeyboardInterrupt),
            tokengate.disabled(model),
        ):
            interrupted.happened = True  # what gives back is not interrupted, too
        if interrupted.left:
            break
        assert state(model) == before
    assert at > 10


@pytest.fixture
def folders(tmp_path):
    torch.manual_seed(3)
    for name in ("one", "two"):
        model = patched()
        away_from_initialisation(model)
        with torch.no_grad():
            model.head.weight.mul_(2)
        tokengate.save(model, tmp_path / name)
    return tmp_path


FILLING = {"_fill", "_fill_one", "fill", "fill_extras"}
FILLING |= {"_add", "_replace", "install", "add_adapter"}
USING = {"put_in_use", "adapters_of", "put_away", "settle", "_set_trained", "join"}
USING |= {"_begin", "_end", "hold", "let_go", "_for_good", "_switch"}


@pytest.mark.parametrize("into", ["the base", "a patched model"])
def test_load(folders, into):
    make = patched if into == "a patched model" else lambda: Small().eval()

    def finish(model):
        if into == "the base":
            gives_the_base_back(model)

    at_every_line(
        make, lambda model: tokengate.load(model, folders / "one"),
        {*FILLING, *ATTACHING, *USING}, finish=finish,
    )  # fmt: skip


def several(folders):
    model = Small().eval()
    torch.manual_seed(4)
    tokengate.patch(model, ["fc"], rank=2)
    away_from_initialisation(model)
    tokengate.save(model, folders / "a")
    away_from_initialisation(model)
    model.fc.modification.A.requires_grad_(False)
    tokengate.load(model, folders / "a", name="b")
    return model


def test_load_another(folders):
    def act(model):
        tokengate.load(model, folders / "a", name="c")

    at_every_line(lambda: several(folders), act, {*FILLING, *USING, "load_saved"})


def test_one_of_several_is_taken_out(folders):
    other = tokengate.patch(Small().eval(), ["fc", "qkv.q"], slices={"qkv": Slices(q=4, k=4, v=4)})
    tokengate.save(other, folders / "c")

    def make():
        model = several(folders)
        tokengate.load(model, folders / "c", name="c")
        tokengate.use(model, "b")
        return model

    names = {*DETACHING, "_take_out", "remove_adapter", "follow", "unfollow", "rest"}
    for name in ("c", "default"):
        at_every_line(make, lambda model, name=name: tokengate.unpatch(model, name=name), names)


@pytest.mark.parametrize("name", ["b", None])
def test_use(folders, name):
    first = several(folders)

    def make():
        return copy.deepcopy(first)

    def act(model):
        tokengate.use(model, name)._for_good()  # else it is when the object goes

    at_every_line(make, act, {*USING, "__init__"})


def test_use_within_a_context(folders):
    model = several(folders)
    before = state(model)
    for at in range(1000):
        with (
            Interrupted(USING, at) as interrupted,
            contextlib.suppress(KeyboardInterrupt),
            tokengate.use(model, "b"),
        ):
            pass
        assert state(model) == before
        if not interrupted.happened:
            break
    assert at > 20
