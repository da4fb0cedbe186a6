"""What is around experts: files, contexts, padding, checkpoints, budgets, folding."""

import copy

import pytest
import torch
from mixtures import Experts, Mixture

import tokengate
from tokengate.errors import LeftOutWarning

AXES = {"experts.w": "eoi"}


def away(model):
    """From the initial values, where M(x) is 0."""
    for name, p in model.named_parameters():
        if p.requires_grad and not name.endswith("tau"):
            p.data += 0.5 * torch.randn_like(p)
    return model


def make(way="grouped", **options):
    torch.manual_seed(0)
    model = Mixture(Experts(4, 6, 5, way=way))
    tokengate.patch(model, ["experts.w"], rank=2, tau=0.1, experts=AXES, **options)
    return away(model)


def inputs(top=2, shown=3):
    """Two samples of four positions; the last expert gets none of them."""
    generator = torch.Generator().manual_seed(1)
    index = torch.rand(8, shown, generator=generator).topk(top, -1).indices
    return torch.randn(2, 4, 5, generator=generator), index


def test_saved_and_loaded(tmp_path):
    for method in ("lora", "dora", "adalora", "adapter"):
        model = make(method=method)
        x, index = inputs()
        tokengate.save(model, tmp_path / method)
        fresh = Mixture(Experts(4, 6, 5, way="grouped"))
        fresh.experts.load_state_dict({"w": model.experts.w, "b": model.experts.b})
        assert not torch.equal(fresh(x, index), model(x, index))
        tokengate.load(fresh, tmp_path / method)
        assert torch.equal(fresh(x, index), model(x, index))
        tokengate.load(model, tmp_path / method, name="another")
        with tokengate.use(model, "another"):
            assert torch.equal(fresh(x, index), model(x, index))
    (layer,) = tokengate.layers(fresh).values()
    assert layer.gate.tau.shape == (4,)
    other = Mixture(Experts(5, 6, 5))
    with pytest.raises(tokengate.TokenGateError, match="shape"):
        tokengate.load(other, tmp_path / "lora")


@pytest.mark.parametrize("way", ["linear", "batched", "grouped"])
def test_restricted_is_the_base_outside(way):
    model, (x, index) = make(way), inputs()
    inside = torch.zeros(2, 4, dtype=torch.bool)
    inside[:, 2:] = True
    with tokengate.disabled(model):
        base = model(x, index)
    with tokengate.restrict(model, inside), tokengate.record(model) as rec:
        h = model(x, index)
    rows = inside.flatten()
    assert torch.equal(h[~rows], base[~rows])
    assert torch.equal(h[rows], model(x, index)[rows])
    assert not torch.equal(h[rows], base[rows])
    assert sum(m.positions for m in rec.report().modules.values()) == 2 * rows.sum()


def test_an_expert_without_tokens_has_a_gradient_of_zero_and_no_warning():
    model, (x, index) = make(), inputs()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.1))
    model(x, index).sum().backward()
    (layer,) = tokengate.layers(model).values()
    for parameter in (*layer.modification.parameters(), layer.gate.tau):
        assert parameter.grad[:3].any()
        assert not parameter.grad[3].any()
    optimizer.step()
    tokengate.verify(model, x, index)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_gradients_are_those_without(reentrant):
    model, (x, index) = make().train(), inputs()
    mask = torch.ones(2, 4)
    mask[0, :2] = 0

    def gradients():
        model.zero_grad()
        states = x.clone().requires_grad_()
        model(states, index, attention_mask=mask).square().sum().backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    plain = gradients()
    forward = type(model.experts).forward

    def again(self, *args):
        run = torch.utils.checkpoint.checkpoint
        return run(lambda *a: forward(self, *a), *args, use_reentrant=reentrant)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(type(model.experts), "forward", again)
        found = gradients()
    for one, other in zip(plain, found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_budget_over_experts():
    model, (x, index) = make(method="adalora", target_rank=1), inputs()
    optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=0.05))
    allocator = tokengate.RankAllocator(
        model, optimizer, total_steps=10, initial_warmup=1, final_warmup=3
    )
    assert allocator.budget == 8
    for _ in range(10):
        optimizer.zero_grad()
        loss = model(x, index).square().sum() + 0.1 * tokengate.orthogonality(model)
        loss.backward()
        optimizer.step()
    (mask,) = allocator.masks.values()
    assert mask.shape == (4, 2)
    assert mask.sum() == allocator.budget == 4
    (layer,) = tokengate.layers(model).values()
    assert torch.equal(layer.modification.E != 0, mask)


@pytest.mark.parametrize("method", ["lora", "dora", "adalora"])
def test_folded_without_gates_and_back(method):
    model, (x, index) = plain(method), inputs()
    h = model(x, index)
    folding = tokengate.fold(model, [(x, index)])
    assert folding.names("merged") == [f"experts.{e}.w" for e in range(4)]
    assert type(model.experts) is Experts
    torch.testing.assert_close(model(x, index), h)
    folding.undo()
    assert torch.equal(model(x, index), h)
    with pytest.warns(
        tokengate.errors.StillGatedWarning, match=r"'experts.3.w' \(no position was seen"
    ):
        tokengate.merge_and_unload(make(), [inputs()])


def plain(method):
    torch.manual_seed(0)
    model = Mixture(Experts(4, 6, 5, way="grouped"))
    tokengate.patch(model, ["experts.w"], method, rank=2, gate=False, experts=AXES)
    return away(model)


def test_calibrated_and_recorded_by_expert():
    model, (x, index) = make(), inputs()
    taus = tokengate.calibrate(model, [(x, index)], 0.5)
    assert list(taus) == [f"experts.{e}.w" for e in range(4)]
    (layer,) = tokengate.layers(model).values()
    assert len(set(layer.gate.tau.tolist())) == 4
    with tokengate.record(model, positions=True, ratios=True) as rec:
        model(x, index)
    report = rec.report()
    assert 0.3 < report.token_sparsity < 0.7
    assert report.modules["experts.3.w"].positions == 0
    assert report.modules["experts.0.w"].tau == pytest.approx(layer.gate.tau[0].item())
    assert len(tokengate.History(model).taus) == 4


def test_copies_compute_the_same():
    model, (x, index) = make(), inputs()
    assert torch.equal(copy.deepcopy(model)(x, index), model(x, index))


@pytest.mark.parametrize(
    ("experts", "says"),
    [
        ({"experts.w": "oie"}, "pass 'eoi' or 'eio'"),
        ({"experts.v": "eoi"}, "matches no 3-D parameter"),
        ("eoi", "pass a dict"),
    ],
)
def test_descriptions_that_do_not_fit_are_refused(experts, says):
    with pytest.raises(tokengate.TokenGateError, match=says):
        tokengate.patch(Mixture(Experts(4, 6, 5)), ["experts.w"], experts=experts)


def test_a_wrong_description_is_seen_when_it_runs():
    model, (x, index) = Mixture(Experts(4, 6, 5, way="linear")), inputs()
    tokengate.patch(model, ["experts.w"], experts={"experts.w": "eio"})
    with pytest.raises(tokengate.TokenGateError, match="no product of rows"):
        model(x, index)


class Written(Experts):
    """The same code, with its product written in another way."""

    def __init__(self, product):
        super().__init__(4, 6, 5, bias=False)
        self.product = product

    def linear(self, states, index):
        out = states.new_zeros(*index.shape, self.outputs)
        for e in range(len(self.w)):
            place, token = torch.where((index == e).T)
            out = out.index_put((token, place), self.product(states[token], self.w[e]))
        return out


def test_arguments_by_name_and_what_is_no_product():
    def written(product):
        torch.manual_seed(0)
        model = Mixture(Written(product))
        tokengate.patch(model, ["experts.w"], rank=2, tau=0.1, experts=AXES)
        return away(model)(*inputs())

    linear = torch.nn.functional.linear
    wanted = written(linear)
    assert torch.equal(written(lambda x, w: linear(x, weight=w)), wanted)
    assert torch.equal(written(lambda x, w: linear(input=x, weight=w, bias=None)), wanted)
    for name, product in (
        ("einsum", lambda x, w: torch.einsum("nk,ok->no", x, w)),
        ("stack", lambda x, w: linear(x, torch.stack([w])[0])),
    ):
        with pytest.raises(tokengate.TokenGateError, match=f"'w' in '{name}'"):
            written(product)


class All(Experts):
    """Every expert sees every position, so that a compiler can make one graph of the loop."""

    def linear(self, states, index):
        return torch.stack([torch.nn.functional.linear(states, self._of(e)) for e in range(4)], 1)


def test_a_loop_over_experts_is_compiled_in_one_graph():
    torch.manual_seed(0)
    model, (x, index) = Mixture(All(4, 6, 5, bias=False)), inputs()
    tokengate.patch(model, ["experts.w"], rank=2, tau=0.1, experts=AXES)
    away(model)
    torch.compiler.reset()
    found = []
    for run in (model, torch.compile(model, fullgraph=True, backend="eager")):
        model.zero_grad()
        output = run(x, index)
        output.square().mean().backward()
        found.append([output, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(grad.any() for grad in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_table_is_of_all_experts_and_a_picture_of_each():
    plots = pytest.importorskip("tokengate.integrations.plots", reason="needs matplotlib")
    model, (x, index) = make(), inputs()
    with tokengate.record(model) as rec:
        model(x, index)
    report = rec.report()
    assert len(report.modules) == 4
    assert report.table.columns == ["w"]
    assert report.table.values[0][0] == pytest.approx(report.sparsity)
    (image,) = plots.experts(report).axes[0].get_images()
    shares = image.get_array()
    assert shares.shape == (1, 4)
    assert shares.mask.tolist() == [[False, False, False, True]]
    first = report.modules["experts.0.w"]
    assert shares[0, 0] == pytest.approx(100 * first.modified / first.positions)
    with pytest.raises(tokengate.TokenGateError, match="without an expert"):
        plots.experts(tokengate.SparsityReport({}))


@pytest.mark.parametrize("way", ["linear", "in_order", "batched", "grouped"])
def test_each_row_is_at_its_own_position_in_whatever_order_an_expert_has_them(way):
    model, (x, _) = make(way), inputs()
    index = torch.tensor([[0, 1], [1, 0], [2, 0], [0, 2], [1, 2], [2, 1], [0, 1], [1, 0]])
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]])
    with tokengate.record(model, positions=True) as rec:
        model(x, index, attention_mask=mask)
    with tokengate.disabled(model):
        base = model(x, index)
    changed = (model(x, index) != base).any(-1)
    for e in range(3):
        (found,) = rec.positions[f"experts.{e}.w"]
        wanted = ((index == e) & changed).any(-1).view(2, 4)
        assert torch.equal(found & mask.bool(), wanted & mask.bool())
    assert changed.any()
    assert not changed.all()


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most elements of a tensor that is made, and is no view of one that is there."""

    def __init__(self, model):
        super().__init__()
        self.there = {p.untyped_storage()._cdata for p in model.parameters()}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            made = isinstance(tensor, torch.Tensor)
            if made and tensor.untyped_storage()._cdata not in self.there:
                self.most = max(self.most, tensor.numel())
        return result


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "adapter"])
@pytest.mark.parametrize("way", ["linear", "grouped"])
def test_nothing_is_made_of_the_size_of_an_expert(way, method):
    torch.manual_seed(0)
    # Above what DoRA takes for a small W0.
    model = Mixture(Experts(16, 136, 136, way=way, bias=False))
    tokengate.patch(model, ["experts.w"], method, rank=1, tau=0.1, experts=AXES)
    away(model)
    index = torch.rand(6, 16).topk(2, -1).indices
    with Largest(model) as made:
        model(torch.randn(2, 3, 136), index).square().sum().backward()
    assert 0 < made.most < 136 * 136
    with Largest(model) as made:
        model.experts.w @ torch.ones(136, 136)
    assert made.most >= 136 * 136, "it can fail"


def test_a_base_made_trainable_is_told_of():
    """A weight that is a view of the parameter is not what the optimiser holds."""
    for axes, part in (("eio", ""), ("eoi", ".one")):
        model = Mixture(Experts(4, 6, 5, axes, way="grouped"))
        slices = tokengate.Slices(one=3, two=3) if part else None
        given = None if slices is None else {"experts.w": slices}
        tokengate.patch(
            model, [f"experts.w{part}"], rank=2, experts={"experts.w": axes}, slices=given
        )
        optimizer = torch.optim.AdamW(tokengate.param_groups(model, lr=1e-3))
        model.requires_grad_(True)
        optimizer.add_param_group({"params": [model.experts.w]})
        x, index = inputs()
        model(x, index).square().mean().backward()
        optimizer.step()
        with pytest.warns(LeftOutWarning, match="moves W0 of 'experts.w"):
            optimizer.step()
