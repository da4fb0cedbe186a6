"""Whatever is done in whatever order, the model computes what the equations say, and leaks nothing.

The shadow beside the model is plain numbers: the base's weights, and of each adapter each layer's
method, parameters and tau. Its outputs are those of reference.py, one position after the other.
"""

import functools
import gc
import pathlib
import shutil
import tempfile
import warnings

import numpy as np
import pytest
import reference
import torch
from drawing import many
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import tokengate
from tokengate.errors import UnreachedSparsityWarning

WIDTH = 4
DATA = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
NAMES = ["default", "b", "c"]
PLACES = ["one", "two"]


class Small(nn.Module):
    """`(B, T, 4) -> (B, T, 4)`, of three layers."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v = nn.Linear(WIDTH, WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.o(torch.tanh(self.q(x)) * self.v(x)) + x


def shadow_layer(layer, x, W, b):
    """One layer's outputs for x, `(N, 4)`, by the equations; `layer` is None or a shadow's part."""
    if layer is None:
        return x @ W.T + (0 if b is None else b)
    p, scale = layer["parameters"], layer["scale"]
    further = {"dora": {"W0": W}, "adapter": {"activation": "relu"}}.get(layer["method"], {})
    modify = functools.partial(getattr(reference, layer["method"]), p=p, scale=scale, **further)
    return reference.layer(x, W, b, p, modify, layer["tau"], 0.0, np.zeros((len(x), len(W))))["h"]


def shadow_forward(base, adapter, x):
    def call(name, value):
        bias = base.get(f"{name}.bias")
        return shadow_layer((adapter or {}).get(name), value, base[f"{name}.weight"], bias)

    rows = x.reshape(-1, WIDTH).numpy()
    return call("o", np.tanh(call("q", rows)) * call("v", rows)) + rows


def parts_of(model):
    """The adapter in use, as numbers."""
    return {
        name: {
            "method": type(layer.modification).__name__.lower(),
            "scale": layer.modification.scale,
            "parameters": {
                n: p.detach().numpy().copy() for n, p in layer.modification.named_parameters()
            },
            "tau": None if layer.gate is None else layer.gate.tau.item(),
        }
        for name, layer in tokengate.layers(model).items()
    }


def inventory(model):
    """What a model is made of: classes, attributes, parameters, buffers and hooks."""
    return {
        name: (
            type(module),
            sorted(module.__dict__),
            sorted(module._parameters),
            sorted(module._buffers),
            sorted(module._modules),
            [
                len(getattr(module, kind))
                for kind in sorted(vars(module))
                if kind.endswith("_hooks")
            ],
        )
        for name, module in model.named_modules()
    }


class AnyOrder(RuleBasedStateMachine):
    """patch, train, save, load, use, disable, fold, calibrate and unpatch."""

    def __init__(self):
        super().__init__()
        self.place = pathlib.Path(tempfile.mkdtemp())
        torch.manual_seed(0)
        self.model = Small().double()
        self.base = {n: p.detach().numpy().copy() for n, p in self.model.named_parameters()}
        self.objects = {n: id(p) for n, p in self.model.named_parameters()}
        self.plain = inventory(self.model)
        # By name; which of them is in use; and what is merged or dropped, and was so before.
        self.adapters, self.in_use, self.unfolded = {}, None, None
        self.saved = {}

    def teardown(self):
        shutil.rmtree(self.place)

    def patched(self):
        return bool(self.adapters)

    def can_train(self):
        return (
            bool(self.adapters) and self.in_use is not None and bool(tokengate.layers(self.model))
        )

    @property
    def adapter(self):
        return self.adapters.get(self.in_use)

    @initialize()
    def seed(self):
        self.seeds = iter(range(10**6))

    @precondition(lambda self: not self.adapters)
    @rule(
        method=st.sampled_from(["lora", "dora", "adalora", "adapter"]),
        names=st.sets(st.sampled_from(["q", "v", "o"]), min_size=1),
        gate=st.booleans(),
    )
    def patch(self, method, names, gate):
        tokengate.patch(self.model, sorted(names), method=method, rank=2, gate=gate)
        self.adapters, self.in_use = {"default": parts_of(self.model)}, "default"

    @precondition(lambda self: self.can_train())
    @rule(lr=st.floats(0.05, 0.5))
    def train(self, lr):
        torch.manual_seed(next(self.seeds))
        optimizer = torch.optim.Adam(tokengate.param_groups(self.model, lr=lr, s=0.1))
        for _ in range(2):
            optimizer.zero_grad()
            self.model(torch.randn(2, 5, WIDTH, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        self.model.zero_grad(set_to_none=True)
        # What is folded is trained no more, and merged once for all.
        self.adapters[self.in_use] = {**self.adapter, **parts_of(self.model)}
        if self.unfolded is not None:
            self.unfolded = {**self.unfolded, **parts_of(self.model)}

    @precondition(lambda self: self.can_train())
    @rule(sparsity=st.floats(0.1, 0.9))
    def calibrate(self, sparsity):
        if all(layer.gate is None for layer in tokengate.layers(self.model).values()):
            return
        first = {"lora": "B", "dora": "B", "adalora": "E", "adapter": "U"}
        parts = parts_of(self.model).values()
        if not any(part["parameters"][first[part["method"]]].any() for part in parts):
            with pytest.raises(tokengate.TokenGateError, match="before training"):
                tokengate.calibrate(self.model, [DATA], sparsity)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnreachedSparsityWarning)  # an adapter may be 0 at many
            tokengate.calibrate(self.model, [DATA], sparsity)
        self.adapters[self.in_use] = {**self.adapter, **parts_of(self.model)}
        if self.unfolded is not None:
            self.unfolded = {**self.unfolded, **parts_of(self.model)}

    @precondition(lambda self: self.can_train() and self.unfolded is None)
    @rule(place=st.sampled_from(PLACES))
    def save(self, place):
        tokengate.save(self.model, self.place / place)
        self.saved[place] = self.adapter

    @precondition(lambda self: self.saved and not self.adapters)
    @rule(place=st.sampled_from(PLACES), name=st.sampled_from(NAMES))
    def load_first(self, place, name):
        if place in self.saved:
            tokengate.load(self.model, self.place / place, name=name)
            self.adapters, self.in_use = {name: self.saved[place]}, name

    @precondition(lambda self: self.saved and self.adapters and self.unfolded is None)
    @rule(place=st.sampled_from(PLACES), name=st.sampled_from(NAMES))
    def load_another(self, place, name):
        if place not in self.saved:
            return
        fits = name not in self.adapters or (
            {n: (p["method"], p["tau"] is None) for n, p in self.adapters[name].items()}
            == {n: (p["method"], p["tau"] is None) for n, p in self.saved[place].items()}
        )
        if fits:
            tokengate.load(self.model, self.place / place, name=name)
            self.adapters[name] = self.saved[place]
        else:
            try:
                tokengate.load(self.model, self.place / place, name=name)
            except tokengate.TokenGateError:
                return
            raise AssertionError("an adapter was loaded into another's place")

    @precondition(lambda self: self.adapters and self.unfolded is None)
    @rule(name=st.sampled_from([*NAMES, None]))
    def use(self, name):
        if name is None or name in self.adapters:
            tokengate.use(self.model, name)
            self.in_use = name

    @precondition(lambda self: self.adapters and self.unfolded is None)
    @rule(draw=st.data())
    def use_rows(self, draw):
        names = draw.draw(st.lists(st.sampled_from([*self.adapters, None]), min_size=2, max_size=2))
        with tokengate.use(self.model, names):
            found = self.outputs()
        expected = np.concatenate([
            shadow_forward(self.base, self.adapters.get(name), DATA[i : i + 1])
            for i, name in enumerate(names)
        ])  # fmt: skip
        assert np.allclose(found, expected, rtol=0, atol=1e-9)

    @precondition(lambda self: self.adapters)
    @rule()
    def disable(self):
        with tokengate.disabled(self.model):
            assert np.allclose(
                self.outputs(), shadow_forward(self.base, None, DATA), rtol=0, atol=1e-12
            )

    @precondition(lambda self: self.can_train() and len(self.adapters) == 1 and not self.unfolded)
    @rule()
    def fold(self):
        self.folding = tokengate.fold(self.model, [DATA])
        self.unfolded = self.adapter
        kept = dict(self.adapter)
        for name in self.folding.names("merged"):
            kept[name] = {**kept[name], "tau": None}
        for name in self.folding.names("dropped"):
            del kept[name]
        self.adapters = {self.in_use: kept}

    @precondition(lambda self: self.unfolded is not None)
    @rule()
    def undo(self):
        self.folding.undo()
        self.adapters, self.unfolded = {self.in_use: self.unfolded}, None

    @precondition(lambda self: self.adapters.keys() - {self.in_use})
    @rule(draw=st.data())
    def unpatch_one(self, draw):
        name = draw.draw(st.sampled_from(sorted(self.adapters.keys() - {self.in_use})))
        if len(self.adapters) > 1:
            tokengate.unpatch(self.model, name=name)
            del self.adapters[name]

    @precondition(lambda self: self.adapters)
    @rule()
    def unpatch(self):
        tokengate.unpatch(self.model)
        self.adapters, self.in_use, self.unfolded = {}, None, None
        assert {n: p.detach().numpy().tolist() for n, p in self.model.named_parameters()} == {
            n: value.tolist() for n, value in self.base.items()
        }
        assert {n: id(p) for n, p in self.model.named_parameters()} == self.objects
        assert all(p.requires_grad for p in self.model.parameters())
        assert inventory(self.model) == self.plain
        gc.collect()

    def outputs(self):
        with torch.no_grad():
            return self.model(DATA).reshape(-1, WIDTH).numpy()

    @invariant()
    def it_computes_what_the_equations_say(self):
        expected = shadow_forward(self.base, self.adapter, DATA)
        assert np.allclose(self.outputs(), expected, rtol=0, atol=1e-9)

    @invariant()
    def nothing_but_the_adapters_is_there(self):
        layers = sum(len(parts) for parts in self.adapters.values())
        folded = 0
        if self.unfolded is not None:
            folded = len(self.unfolded) - len(tokengate.layers(self.model))
            layers = len(tokengate.layers(self.model))
        assert folded >= 0
        modifications = [m for m in self.model.modules() if isinstance(m, tokengate.Modification)]
        assert len(modifications) == layers
        base = [n for n, _ in self.model.named_parameters() if n in self.objects]
        assert sorted(base) == sorted(self.objects)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(
    max_examples=many(40),
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
