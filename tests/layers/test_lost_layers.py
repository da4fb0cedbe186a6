"""A patched layer that is replaced, or that no gradient reaches, is named by what comes next."""

import copy
import pickle
import warnings

import pytest
import torch
from models import Net, away_from_initialisation, one_sentence
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.errors import UnreachedLayerWarning
from tokengate.layers import patched

# Some of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
HEAD = "'head'"


def replaced():
    """A model whose head was patched, and then replaced."""
    model = tokengate.patch(Net(), ["fc1", "head"], rank=2)
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=0.1))
    model(X).sum().backward()
    optimizer.step()
    model.head = nn.Linear(model.head.in_features, model.head.out_features)
    return model, optimizer


def silent(action):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return action()


NEXT = {
    "forward": lambda model, optimizer, folder: model(X),
    "step": lambda model, optimizer, folder: optimizer.step(),
    "record": lambda model, optimizer, folder: tokengate.record(model).__enter__(),
}
REFUSE = {
    "verify": lambda model, optimizer, folder: tokengate.verify(model, X),
    "save": lambda model, optimizer, folder: tokengate.save(model, folder / "new"),
}


@pytest.mark.parametrize("then", NEXT)
def test_whoever_comes_next_names_it_once(then, tmp_path):
    model, optimizer = replaced()
    said = f"{HEAD} of this Net was patched.*a Linear st"
    with pytest.warns(UnreachedLayerWarning, match=said) as told:
        NEXT[then](model, optimizer, tmp_path)
    assert told[0].filename == __file__
    silent(lambda: NEXT[then](model, optimizer, tmp_path))


@pytest.mark.parametrize("then", REFUSE)
def test_what_would_lose_it_refuses(then, tmp_path):
    model, optimizer = replaced()
    with one_sentence(f"{then} found that {HEAD}", "patch what is there now"):
        REFUSE[then](model, optimizer, tmp_path)
    assert not list(tmp_path.iterdir())
    tokengate.patch(model, ["head"], rank=2)
    silent(lambda: REFUSE[then](model, optimizer, tmp_path))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_remembers_too(copied):
    model = copied(tokengate.patch(Net(), ["fc1", "head"], rank=2))
    silent(lambda: model(X))
    model.head = nn.Linear(8, 3)
    with pytest.warns(UnreachedLayerWarning, match=HEAD):
        model(X)


class Fuses(nn.Module):
    """As diffusers' attention: its projections stay where they are, and are called no more."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_v = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        fused = hasattr(self, "to_qv")
        q, v = self.to_qv(x).chunk(2, -1) if fused else (self.to_q(x), self.to_v(x))
        return q.tanh() * v

    def fuse(self):
        self.to_qv = nn.Linear(8, 16)
        self.to_qv.weight.data = torch.cat([self.to_q.weight.data, self.to_v.weight.data])


def test_what_is_fused_beside_its_layers_is_told_of_at_the_next_forward():
    model = tokengate.patch(nn.Sequential(Fuses(), Fuses()), ["to_q"], rank=2)
    silent(lambda: model(X))
    model[0].norm = nn.LayerNorm(8)  # which takes nothing away
    silent(lambda: model(X))
    model[1].fuse()
    with pytest.warns(UnreachedLayerWarning, match=r"'1\.to_q' of Fuses was patched but never"):
        model(X)
    silent(lambda: model(X))
    del model[1].to_qv
    silent(lambda: model(X))


def test_what_is_taken_back_is_not_lost():
    model = tokengate.patch(Net(), ["fc1", "head"], rank=2, gate=False)
    away_from_initialisation(model)
    silent(lambda: model(X))
    folding = tokengate.fold(model, [X])
    silent(lambda: model(X))
    folding.undo()
    tokengate.unpatch(model.blocks[0])
    silent(lambda: model(X))
    silent(lambda: tokengate.verify(model, X))
    model.head = nn.Linear(8, 3)
    tokengate.unpatch(model)
    silent(lambda: model(X))
    assert not any("tokengate" in key for module in model.modules() for key in vars(module))


def test_a_moved_layer_is_not_lost():
    model = tokengate.patch(Net(), ["fc1"], rank=2)

    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

        def forward(self, x):
            return self.module(x)

    model.blocks[0].v_proj = Wrapper(model.blocks[0].v_proj)
    silent(lambda: model(X))


def test_known_ways_of_losing_layers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=30,
    )  # fmt: skip
    model = tokengate.patch(transformers.LlamaForCausalLM(config), ["q_proj", "lm_head"], rank=2)
    assert len(tokengate.layers(model)) == 2
    model.resize_token_embeddings(40)
    assert len(tokengate.layers(model)) == 1
    with pytest.warns(UnreachedLayerWarning, match="'lm_head'.*resize_token_embeddings"):
        model(torch.ones(1, 3, dtype=torch.long))
    with one_sentence("'lm_head'"):
        tokengate.save(model, tmp_path / "a")
    timm = pytest.importorskip("timm", reason="needs timm")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=5)
    tokengate.patch(model, ["fc1", "head"], rank=2)
    model.reset_classifier(7)
    with pytest.warns(UnreachedLayerWarning, match="'head'"):
        model(torch.randn(1, 3, 32, 32))


class Bypassed(nn.Module):
    """Whose head is read, not called, in training."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.body(x).tanh()
        return F.linear(h, self.head.weight) if self.training else self.head(h)


@pytest.mark.parametrize("how", ["past the root", "evaluated first"])
def test_the_first_step_names_what_training_bypasses(how):
    model = tokengate.patch(Bypassed(), "all-linear", rank=2)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    if how == "evaluated first":
        model.eval()
        silent(lambda: model(X))
        loss = model.train()(X).sum()
    else:
        loss = F.linear(model.body(X).tanh(), model.head.weight).sum()
    loss.backward()
    assert model.head.modification.B.grad is None
    with pytest.warns(UnreachedLayerWarning, match=f"first step of this AdamW, {HEAD}") as told:
        optimizer.step()
    assert told[0].filename == __file__
    loss = model.body(X).sum()
    loss.backward()
    silent(optimizer.step)


def test_a_model_that_is_trained_whole_is_not_spoken_of():
    model = tokengate.patch(Net(), "all-linear", rank=2)
    other = tokengate.patch(Net(), "all-linear", rank=2)  # is not trained, and not the optimizer's
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))

    def step():
        model(X).sum().backward()
        optimizer.step()

    silent(step)
    assert len(tokengate.layers(other)) > 0


def test_what_is_frozen_on_purpose_is_looked_at_once_it_is_trained():
    model = tokengate.patch(Bypassed(), "all-linear", rank=2)
    with pytest.warns(UnreachedLayerWarning, match=HEAD):  # at the first forward
        model(X)
    found = tokengate.layers(model).values()
    own = [p for layer in found for p in (*layer.modification.parameters(), layer.gate.tau)]
    free = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([*own, free], lr=1e-3)
    for parameter in own:
        parameter.requires_grad_(False)
    (free * model(X).sum()).backward()
    silent(optimizer.step)
    for parameter in own:
        parameter.requires_grad_(True)
    (free * model(X).sum()).backward()
    with pytest.warns(UnreachedLayerWarning, match=HEAD):
        optimizer.step()


def test_a_replaced_block_is_missed_and_a_known_loss_is_not_searched_for_again(monkeypatch):
    model = tokengate.patch(Net(), ["fc1"], rank=2)
    silent(lambda: model(X))
    model.blocks[1] = Net().blocks[1]
    with pytest.warns(UnreachedLayerWarning, match="'blocks.1.fc1'"):
        model(X)
    monkeypatch.setattr(patched, "_look", None)
    silent(lambda: model(X))


@pytest.mark.parametrize("how", ["module", "in place"])
def test_a_block_that_is_compiled_is_not_taken_for_unreached(how):
    model = tokengate.patch(Net(), ["fc1"], rank=2)
    if how == "module":
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    else:
        model.blocks[0].compile(backend="eager")
    silent(lambda: model(X))


def test_a_step_without_gradients_tells_nothing_and_a_closure_has_them_after_it():
    model = tokengate.patch(Bypassed(), "all-linear", rank=2)
    optimizer = torch.optim.SGD(tokengate.param_groups(model, lr=1e-3))
    silent(optimizer.step)

    def closure():
        loss = model(X).sum()
        loss.backward()
        return loss

    with pytest.warns(UnreachedLayerWarning, match=HEAD):
        optimizer.step(closure)


def test_reentrant_checkpointing_without_gradients_is_named():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(checkpoint(self.block, x, use_reentrant=True))

    model = tokengate.patch(Checkpointed(), "all-linear", rank=2)
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that no input requires a gradient
        model(X).sum().backward()
    with pytest.warns(UnreachedLayerWarning, match="'block' got no gradient.*use_reentrant=False"):
        optimizer.step()
    with (
        pytest.warns(UserWarning, match="None of the inputs"),
        one_sentence("block.modification.A", "use_reentrant=False"),
    ):
        tokengate.verify(model, X)
