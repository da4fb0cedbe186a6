"""Several adapters on experts: each row, or each region, of a batch by its own."""

import numpy as np
import pytest
import reference
import torch
from expert_methods import METHODS, modify
from mixtures import Experts, Mixture

import tokengate
from tokengate.gates.score_counts import no_counts

LENGTH, NAMES = 4, ["default", None, "second", "default"]


def make(way="grouped", methods=("lora", "lora"), gate="threshold", some=None):
    """Two adapters of experts' own, with taus of their own."""
    torch.manual_seed(0)
    model = Mixture(Experts(4, 6, 5, way=way).double())
    targets = ["experts.w"] if some is None else [f"experts.{e}.w" for e in some]

    def add(to, method):
        options = {} if gate is False else {"penalty": 0.3}
        tokengate.patch(
            to, targets, method, rank=2, scale=0.5, gate=gate,
            experts={"experts.w": "eoi"}, **options, **METHODS[method],
        )  # fmt: skip
        for name, p in to.named_parameters():
            if p.requires_grad:
                more = torch.randn_like(p)
                p.data += 0.1 * more.abs() if name.endswith("tau") else 0.4 * more
        return to

    return add, model, methods


def both(tmp_path, **options):
    add, model, methods = make(**options)
    other = Mixture(Experts(4, 6, 5).double())
    other.experts.load_state_dict({"w": model.experts.w, "b": model.experts.b})
    add(model, methods[0])
    torch.manual_seed(7)
    tokengate.save(add(other, methods[1]), tmp_path / "second")
    tokengate.load(model, tmp_path / "second", name="second")
    return model


def batch():
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(4 * LENGTH, 4, generator=generator).topk(2, -1).indices
    x = torch.randn(4, LENGTH, 5, dtype=torch.double, generator=generator)
    mask = torch.ones(4, LENGTH)
    mask[0, 2:] = mask[2, :1] = 0
    return x, index, mask


@pytest.mark.parametrize("methods", [("lora", "dora"), ("adapter", "lora"), ("dora", "adalora")])
@pytest.mark.parametrize("way", ["linear", "in_order", "batched", "grouped"])
def test_rows_equal_a_loop_over_experts_and_tokens(way, methods, tmp_path):
    model, (x, index, mask) = both(tmp_path, way=way, methods=methods), batch()
    (layer,) = tokengate.layers(model).values()
    x.requires_grad_()
    with tokengate.use(model, NAMES), tokengate.record(model) as rec:
        h = model(x, index, attention_mask=mask)
        grad = torch.randn(h.shape, dtype=torch.double, generator=torch.Generator().manual_seed(3))
        h.backward(grad)
    W, b = model.experts.w.detach().numpy(), model.experts.b.detach().numpy()
    found, wanted_x, opened = np.zeros(h.shape), np.zeros((16, 5)), np.zeros((16, 2), dtype=bool)
    for name, method in zip([*("default", "second"), None], [*methods, "lora"], strict=True):
        rows = np.repeat([own == name for own in NAMES], LENGTH)
        modification, gate = layer.adapter(name or "default")
        parameters = {n: p.detach().numpy() for n, p in modification.named_parameters()}
        some = range(4) if name else ()
        wanted = reference.experts(
            x.detach().flatten(0, 1).numpy(), index.numpy(), W, b, parameters,
            modify(method, METHODS[method], parameters, W, some), gate.tau.detach().numpy(), 0.3,
            grad.numpy() * rows[:, None, None], mask.flatten().numpy() * rows,
        )  # fmt: skip
        found[rows], wanted_x[rows] = wanted["h"][rows], wanted["x"][rows]
        opened[rows] = wanted["S"][rows] if name else False
        if name is not None:
            for key, p in modification.named_parameters():
                np.testing.assert_allclose(p.grad, wanted[key], atol=1e-10, err_msg=f"{name} {key}")
                assert wanted[key].any()
            np.testing.assert_allclose(gate.tau.grad, wanted["tau"], atol=1e-10)
    np.testing.assert_allclose(h.detach().numpy(), found, atol=1e-10)
    np.testing.assert_allclose(x.grad.flatten(0, 1).numpy(), wanted_x, atol=1e-10)
    real = mask.flatten().bool().numpy()
    for e in range(4):
        of_e = (index.numpy() == e) & real[:, None]
        module = rec.report().modules[f"experts.{e}.w"]
        assert (module.positions, module.modified) == (of_e.sum(), (of_e & opened).sum())


@pytest.mark.parametrize("gate", ["threshold", "sigmoid", False])
@pytest.mark.parametrize("way", ["linear", "grouped"])
def test_rows_and_regions_are_what_each_adapter_does_alone(way, gate, tmp_path):
    model, (x, index, mask) = both(tmp_path, way=way, gate=gate, some=(0, 2)), batch()
    model.eval()
    alone = {}
    for name in ("default", "second", None):
        with tokengate.use(model, name):
            alone[name] = model(x, index, attention_mask=mask).unflatten(0, (4, LENGTH))
    assert len({float(h.detach().sum()) for h in alone.values()}) == 3
    with tokengate.use(model, NAMES):
        h = model(x, index, attention_mask=mask).unflatten(0, (4, LENGTH))
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(h[row], alone[name][row], rtol=1e-12, atol=1e-12)
    assert torch.equal(h[1], alone[None][1])

    left, right = torch.zeros(2, 4, LENGTH, dtype=torch.bool)
    left[:, :3], right[:, 2:] = True, True
    with tokengate.use(model, {"default": left, "second": right}):
        h = model(x, index, attention_mask=mask).unflatten(0, (4, LENGTH))
    torch.testing.assert_close(h[:, :2], alone["default"][:, :2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(h[:, 3:], alone["second"][:, 3:], rtol=1e-12, atol=1e-12)
    added = alone["default"] + alone["second"] - alone[None]
    torch.testing.assert_close(h[:, 2], added[:, 2], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("several", [True, False], ids=["several experts", "one by one"])
@pytest.mark.parametrize("way", ["linear", "grouped"])
def test_scores_are_counted_of_each_adapter_s_own_rows(way, several, tmp_path):
    model, (x, index, mask) = both(tmp_path, way=way, some=None if several else (1,)), batch()
    (layer,) = tokengate.layers(model).values()
    gates = {name: layer.adapter(name)[1] for name in ("default", "second")}
    left, right = torch.zeros(2, 4, LENGTH, dtype=torch.bool)
    left[:, :2], right[:, 3:] = True, True
    found = []
    for apart in (False, True):
        for gate in gates.values():
            gate._seen = no_counts(x.device)
        if apart:
            for name, inside in (("default", left), ("second", right)):
                with tokengate.use(model, name), tokengate.restrict(model, inside):
                    model(x, index, attention_mask=mask)
        else:
            with tokengate.use(model, {"default": left, "second": right}):
                model(x, index, attention_mask=mask)
        found.append([gate._seen for gate in gates.values()])
    for seen, expected in zip(*found, strict=True):
        assert seen.sum() > 0
        torch.testing.assert_close(seen, expected, rtol=0, atol=1e-8)


def test_refused_where_nobody_knows_the_rows(tmp_path):
    model, (x, index, mask) = both(tmp_path), batch()
    with (
        tokengate.use(model, ["default", "second"]),
        pytest.raises(tokengate.TokenGateError, match=r"adapters for 2 rows.* 16 positions"),
    ):
        model(x, index, attention_mask=mask)
    flat = model.experts
    with (
        tokengate.use(model, NAMES),
        pytest.raises(tokengate.TokenGateError, match="rows of unknown length"),
    ):
        flat(x.flatten(0, 1), index)


def test_patched_within_a_use_of_rows_they_say_so():
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.mixture = torch.nn.Linear(5, 5), Mixture(Experts(4, 6, 5))

        def forward(self, inputs_embeds, index):
            return self.mixture(self.fc(inputs_embeds), index)

    model, (x, index, _) = tokengate.patch(Both(), ["fc"], rank=2), batch()
    with tokengate.use(model, ["default", None, "default", None]):
        tokengate.patch(model, ["experts.w"], experts={"w": "eoi"}, rank=2)
        with pytest.raises(tokengate.TokenGateError, match="enter it anew"):
            model(x.float(), index)
    with tokengate.use(model, ["default", None, "default", None]):
        model(x.float(), index)


def test_computed_again_in_backward_it_has_the_same_rows(tmp_path):
    model, (x, index, mask) = both(tmp_path).train(), batch()

    def gradients(checkpointed):
        model.zero_grad()
        states = x.clone().requires_grad_()
        with tokengate.use(model, NAMES):
            if checkpointed:
                run = torch.utils.checkpoint.checkpoint
                h = run(lambda s: model(s, index, attention_mask=mask), states, use_reentrant=False)
            else:
                h = model(states, index, attention_mask=mask)
        h.square().sum().backward()
        return [states.grad, *(p.grad for p in model.parameters() if p.grad is not None)]

    plain, again = gradients(False), gradients(True)
    assert len(plain) == len(again) > 6
    for one, other in zip(plain, again, strict=True):
        torch.testing.assert_close(one, other)


def test_the_second_of_two_stands_where_the_first_did(tmp_path):
    model, (x, index, mask) = both(tmp_path, some=(1, 3)), batch()
    tokengate.use(model, "second")
    with torch.no_grad():
        expected = model(x, index, attention_mask=mask)
        tokengate.unpatch(model, name="default")
        assert torch.equal(model(x, index, attention_mask=mask), expected)
    (layer,) = tokengate.layers(model).values()
    assert not layer.adapters
    assert layer.experts == (1, 3)
    tokengate.unpatch(model)
    assert [name for name, _ in model.named_parameters()] == ["experts.w", "experts.b"]
