"""AdaLoRA's budget, step by step, and everything a set-up can get wrong."""

import pytest
import torch
from models import Net, away_from_initialisation

import tokengate
from tokengate.errors import UnreachedLayerWarning

# Some of the optimisers here move tau by another rule than its own.
pytestmark = pytest.mark.filterwarnings("ignore::tokengate.errors.OtherRuleWarning")


def adalora(targets=("q_proj", "v_proj"), **options):
    model = tokengate.patch(Net(), list(targets), "adalora", **{"rank": 4, **options})
    return away_from_initialisation(model)


def optimizer_of(model, kind=torch.optim.AdamW, lr=0.01):
    return kind(tokengate.param_groups(model, lr=lr, s=1e-3))


def train(model, optimizer, steps, seed=0):
    """Steps on batches that depend on `seed` and their number only."""
    for step in range(steps):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1000 * seed + step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_schedule_by_hand():
    model = adalora(rank=4, target_rank=1)  # 4 layers: from 16 to 4
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(
        model, optimizer, total_steps=12, initial_warmup=2, final_warmup=4, interval=2
    )
    budgets, kept = [], []
    for step in range(12):
        train(model, optimizer, 1, seed=step)
        budgets.append(allocator.budget)
        kept.append(sum(allocator.ranks.values()))
    # t = 3 .. 7: 4 + 12 (1 - (t - 2) / 6)^3 = 10.94, 7.55, 5.5, 4.44, 4.05
    assert budgets == [16, 16, 10, 7, 5, 4, 4, 4, 4, 4, 4, 4]
    # Allocated at t = 4, 6 and 8.
    assert kept == [16, 16, 16, 7, 7, 4, 4, 4, 4, 4, 4, 4]


def test_scores_by_hand():
    """Two steps of one layer of rank 2, written out."""
    model = adalora(["blocks.0.q_proj"], rank=2, target_rank=1)
    m = model.blocks[0].q_proj.modification
    optimizer = torch.optim.SGD([m.P, m.E, m.Q], lr=0.1)
    allocator = tokengate.RankAllocator(
        model, optimizer, total_steps=4, initial_warmup=1, final_warmup=1, beta1=0.6, beta2=0.7
    )
    smoothed = {n: torch.zeros_like(p) for n, p in m.named_parameters()}
    uncertain = {n: torch.zeros_like(p) for n, p in m.named_parameters()}
    for step in (1, 2):
        gradients = {n: torch.randn_like(p) for n, p in m.named_parameters()}
        for name, parameter in m.named_parameters():
            parameter.grad = gradients[name].clone()
            now = ((parameter.detach() - 0.1 * parameter.grad) * parameter.grad).abs()
            smoothed[name] = 0.6 * smoothed[name] + 0.4 * now
            uncertain[name] = 0.7 * uncertain[name] + 0.3 * (now - smoothed[name]).abs()
        optimizer.step()
        assert allocator.masks["blocks.0.q_proj"].all() == (step == 1)
    s = {n: smoothed[n] * uncertain[n] for n in smoothed}
    scores = [float(s["E"][i] + s["P"][:, i].mean() + s["Q"][i, :].mean()) for i in range(2)]
    assert allocator.masks["blocks.0.q_proj"].tolist() == [
        scores[0] > scores[1],
        scores[1] > scores[0],
    ]
    assert (m.E == 0).tolist() == [scores[0] < scores[1], scores[1] < scores[0]]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_what_is_pruned_stays_zero_and_the_rest_is_trained(kind):
    model = adalora(target_rank=1)
    optimizer = optimizer_of(model, kind)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=10, final_warmup=3)
    for step in range(14):
        before = {n: e.modification.E.clone() for n, e in tokengate.layers(model).items()}
        train(model, optimizer, 1, seed=step)
        for name, layer in tokengate.layers(model).items():
            kept, E = allocator.masks[name], layer.modification.E
            assert (E[~kept] == 0).all()
            assert (E[kept] != before[name][kept]).all()
    assert sum(allocator.ranks.values()) == 4
    assert allocator.steps == 14


def test_without_it_a_pruned_value_would_grow_again():
    model = adalora()
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=3, final_warmup=1)
    train(model, optimizer, 3)
    allocator.detach()
    pruned = {n: ~mask for n, mask in allocator.masks.items()}
    train(model, optimizer, 1)
    grown = [layer.modification.E[pruned[n]] for n, layer in tokengate.layers(model).items()]
    assert torch.cat(grown).any()
    assert allocator.steps == 3


def test_between_two_allocations_a_pruned_value_may_come_back():
    model = adalora()
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(
        model, optimizer, total_steps=20, initial_warmup=0, final_warmup=2, interval=3
    )
    train(model, optimizer, 3)
    name = min(allocator.ranks, key=allocator.ranks.get)
    E, pruned = model.get_submodule(name).modification.E, ~allocator.masks[name]
    assert pruned.any()
    assert not E[pruned].any()
    train(model, optimizer, 1)
    assert E[pruned].all()


class Rewriting(torch.optim.SGD):
    """An optimiser that leaves its gradients normalised, as some do."""

    def step(self, closure=None):
        loss = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.zero_()
        return loss


def test_gradients_are_read_before_the_step():
    ranks = []
    for kind in (torch.optim.SGD, Rewriting):
        torch.manual_seed(0)
        model = adalora()
        optimizer = optimizer_of(model, kind)
        allocator = tokengate.RankAllocator(model, optimizer, total_steps=10)
        train(model, optimizer, 10)
        ranks.append({n: mask.tolist() for n, mask in allocator.masks.items()})
        assert allocator.steps == 10  # though torch announces the second kind's steps twice
    assert ranks[0] == ranks[1]
    assert len({tuple(mask) for mask in ranks[0].values()}) > 1


@pytest.mark.parametrize("by_keyword", [True, False])
def test_a_closure_is_the_same(by_keyword):
    results = []
    for closure in (False, True):
        torch.manual_seed(0)
        model = adalora()
        optimizer = optimizer_of(model, torch.optim.SGD)
        allocator = tokengate.RankAllocator(model, optimizer, total_steps=8)
        for step in range(8):

            def loss(step=step, model=model, optimizer=optimizer):
                x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))
                optimizer.zero_grad()
                value = model(x).square().mean()
                value.backward()
                return value

            if closure:
                out = optimizer.step(closure=loss) if by_keyword else optimizer.step(loss)
                assert out.item() > 0
            else:
                loss()
                optimizer.step()
        results.append((allocator.ranks, values(model)))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name])


@pytest.mark.parametrize("cut", [1, 4, 6, 9, 11])
def test_resumes_exactly(cut, tmp_path):
    def start():
        torch.manual_seed(0)
        model = adalora()
        optimizer = optimizer_of(model)
        return model, optimizer, tokengate.RankAllocator(model, optimizer, total_steps=10)

    whole, optimizer, straight = start()
    for step in range(12):
        train(whole, optimizer, 1, seed=step)
    model, optimizer, allocator = start()
    for step in range(cut):
        train(model, optimizer, 1, seed=step)
    states = (model.state_dict(), optimizer.state_dict(), allocator.state_dict())
    torch.save(states, tmp_path / "states.pt")
    states = torch.load(tmp_path / "states.pt", weights_only=True)
    model, optimizer, resumed = start()
    for part, state in zip((model, optimizer, resumed), states, strict=True):
        part.load_state_dict(state)
    assert values(model).keys() == values(whole).keys()
    for step in range(cut, 12):
        train(model, optimizer, 1, seed=step)
    assert resumed.ranks == straight.ranks
    assert resumed.steps == straight.steps == 12
    for name, value in values(whole).items():
        assert torch.equal(value, values(model)[name]), name


def test_a_state_is_a_copy():
    model = adalora()
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=10)
    train(model, optimizer, 2)
    state = allocator.state_dict()
    before = state["sensitivity"]["blocks.0.q_proj"]["P"].clone()
    train(model, optimizer, 1)
    assert torch.equal(state["sensitivity"]["blocks.0.q_proj"]["P"], before)
    allocator.load_state_dict(state)
    train(model, optimizer, 1)
    assert torch.equal(state["sensitivity"]["blocks.0.q_proj"]["P"], before)


def test_a_final_rank_equal_to_the_initial_one_prunes_nothing():
    model = adalora(target_rank=4)
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=6)
    train(model, optimizer, 6)
    assert set(allocator.ranks.values()) == {4}


def test_a_budget_of_zero():
    model = adalora(target_rank={"blocks.0.*": 0, "*": 1})
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=6)
    train(model, optimizer, 7)
    assert sum(allocator.ranks.values()) == 2
    assert 0 in allocator.ranks.values()
    model = adalora(target_rank=0)
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=6)
    train(model, optimizer, 7)
    assert set(allocator.ranks.values()) == {0}
    x = torch.randn(2, 5, 8)
    with tokengate.disabled(model):
        base = model(x)
    assert torch.equal(model(x), base)


def test_the_budget_is_global():
    model = adalora(target_rank=2)
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=10)
    train(model, optimizer, 10)
    assert sum(allocator.ranks.values()) == 8
    assert len(set(allocator.ranks.values())) > 1


def test_ties_do_not_prune_beyond_the_budget():
    model = adalora(target_rank=2)
    parameters = [p for layer in tokengate.layers(model).values() for p in
                  layer.modification.parameters()]  # fmt: skip
    optimizer = torch.optim.SGD(parameters, lr=0.0)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=3)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.zeros_like(p)  # every score is 0
        optimizer.step()
    assert sum(allocator.ranks.values()) == 8


def test_a_layer_that_is_reached_now_and_then():
    model = adalora()
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=10, initial_warmup=3)
    for step in range(10):
        optimizer.zero_grad()
        x = torch.randn(2, 5, 8)
        (model.blocks[0](x) if step % 2 else model(x)).square().mean().backward()
        optimizer.step()
    assert sum(allocator.ranks.values()) == 8


@pytest.mark.parametrize("penalty", [0.0, 0.1])
def test_a_layer_that_is_never_reached(penalty):
    model = adalora()
    optimizer = optimizer_of(model)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=10, initial_warmup=2)

    def backward():
        optimizer.zero_grad()
        loss = model.blocks[0](torch.randn(2, 5, 8)).square().mean()
        # It gives P and Q a gradient everywhere.
        (loss + penalty * tokengate.orthogonality(model)).backward()

    for _ in range(2):
        backward()
        optimizer.step()
    backward()
    before = values(model)
    with pytest.raises(tokengate.TokenGateError, match=r"'blocks\.1\.q_proj' has had no gradient"):
        optimizer.step()
    assert allocator.steps == 2
    for name, value in values(model).items():
        assert torch.equal(value, before[name])


def test_a_step_without_any_gradient():
    model = adalora()
    optimizer = optimizer_of(model)
    tokengate.RankAllocator(model, optimizer, total_steps=10)
    with pytest.raises(tokengate.TokenGateError, match="no gradient was seen at step 1 in any of"):
        optimizer.step()
    tokengate.orthogonality(model).backward()
    with pytest.raises(tokengate.TokenGateError, match="no gradient was seen at step 1 in any of"):
        optimizer.step()


def test_a_layer_that_is_never_reached_before_the_only_allocation():
    model = adalora()
    optimizer = optimizer_of(model)
    tokengate.RankAllocator(model, optimizer, total_steps=4, interval=100, final_warmup=1)
    for step in range(3):
        optimizer.zero_grad()
        model.blocks[0](torch.randn(2, 5, 8)).square().mean().backward()
        if step == 0:
            with pytest.warns(UnreachedLayerWarning, match=r"'blocks\.1\.q_proj'"):
                optimizer.step()
        elif step == 1:
            optimizer.step()
    with pytest.raises(tokengate.TokenGateError, match=r"'blocks\.1\.q_proj' has had no gradient"):
        optimizer.step()


def test_a_gradient_that_is_not_finite_does_not_take_the_budget():
    model = adalora()
    optimizer = optimizer_of(model, torch.optim.SGD, lr=0.0)
    allocator = tokengate.RankAllocator(model, optimizer, total_steps=10)
    for step in range(10):
        optimizer.zero_grad()
        model(torch.randn(2, 5, 8)).square().mean().backward()
        if step == 0:
            model.blocks[0].q_proj.modification.P.grad[0] = torch.nan
        # The parameters are left alone, so that only the importance could be broken.
        model.blocks[0].q_proj.modification.P.grad.nan_to_num_() if step else None
        state = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer.step()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not name.endswith(".E"):
                    parameter.copy_(state[name])
    assert allocator.ranks["blocks.0.q_proj"] < 4
    assert sum(allocator.ranks.values()) == 8


def test_one_allocator_for_each_layer():
    model = adalora()
    optimizer = optimizer_of(model)
    first = tokengate.RankAllocator(model, optimizer, total_steps=10)
    with pytest.raises(tokengate.TokenGateError, match="has a RankAllocator for these layers alre"):
        tokengate.RankAllocator(model, optimizer, total_steps=10)
    first.detach()
    tokengate.RankAllocator(model, optimizer, total_steps=10)


@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler(fused):
    """A fused optimiser is stepped on scaled gradients, and on infinite ones as well."""
    results = []
    for scaled in (False, True):
        torch.manual_seed(0)
        model = adalora()
        groups = tokengate.param_groups(model, lr=0.01)
        optimizer = torch.optim.AdamW(groups, fused=fused)
        allocator = tokengate.RankAllocator(model, optimizer, total_steps=8)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaled)
        for step in range(8):
            x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(step))
            if scaled and step == 3:  # a step that is skipped, and then comes again
                optimizer.zero_grad()
                scaler.scale(model(x * torch.inf).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                assert allocator.steps == 3
            optimizer.zero_grad()
            scaler.scale(model(x).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert allocator.steps == 8
        results.append({n: mask.tolist() for n, mask in allocator.masks.items()})
    assert results[0] == results[1]
    assert not all(all(mask) for mask in results[0].values())


def frozen(model):
    model.blocks[1].q_proj.modification.E.requires_grad_(False)
    return optimizer_of(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps=0 is not a whole number >= 1"),
        ({"total_steps": 2.5}, "total_steps=2.5 is not"),
        (
            {"total_steps": 10, "initial_warmup": 6, "final_warmup": 4},
            "total_steps=10 leaves no step between initial_warmup=6 and final_warmup=4",
        ),
        ({"total_steps": 10, "initial_warmup": 12}, "total_steps=10 leaves no step"),
        ({"total_steps": 1}, "total_steps=1 leaves no step"),
        ({"total_steps": 2, "initial_warmup": 0, "final_warmup": 1}, "total_steps=2 leaves no st"),
        ({"total_steps": 10, "final_warmup": -1}, "final_warmup=-1 is not a whole number >= 0"),
        ({"total_steps": 10, "initial_warmup": "2"}, "initial_warmup='2' is not"),
        ({"total_steps": 10, "interval": 0}, "interval=0 is not a whole number >= 1"),
        ({"total_steps": 10, "beta1": 1.0}, r"beta1=1.0 is not in \[0, 1\)"),
        ({"total_steps": 10, "beta2": -0.1}, "beta2=-0.1 is not in"),
    ],
)
def test_bad_numbers(options, message):
    model = adalora()
    with pytest.raises(tokengate.TokenGateError, match=message) as error:
        tokengate.RankAllocator(model, optimizer_of(model), **options)
    assert str(error.value).endswith(".")


@pytest.mark.parametrize(
    ("make", "optimizer", "message"),
    [
        (Net, lambda m: None, "RankAllocator was asked of a Net without a patched layer"),
        (
            lambda: tokengate.patch(Net(), ["q_proj"]),
            optimizer_of,
            "whose patched layers have no AdaLoRA: patch with method=",
        ),
        (adalora, lambda m: [1], "was given a list as its optimizer"),
        (
            adalora,
            lambda m: torch.optim.SGD([m.blocks[0].q_proj.gate.tau], lr=1.0),
            "P of the AdaLoRA layer 'blocks.0.q_proj' is not held by the optimizer",
        ),
        (adalora, frozen, "E of the AdaLoRA layer 'blocks.1.q_proj' is frozen"),
    ],
)
def test_bad_set_ups(make, optimizer, message):
    model = make()
    with pytest.raises(tokengate.TokenGateError, match=message):
        tokengate.RankAllocator(model, optimizer(model), total_steps=10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {}, "the state has no 'masks'"),
        (lambda state: None, "the state has no 'masks'"),
        (lambda state: state | {"masks": None}, "the state has no 'masks'"),
        (lambda state: state | {"step": "a"}, "the state has no 'step'"),
        (
            lambda state: state | {"sensitivity": {"blocks.0.q_proj": {"P": torch.ones(2)}}},
            "the state's sensitivity of P in 'blocks.0.q_proj' does not have the shape \\(8, 4\\)",
        ),
        (
            lambda state: state | {"schedule": state["schedule"] | {"final_budget": 3}},
            "construct it with the same numbers",
        ),
        (
            lambda state: state | {"schedule": state["schedule"] | {"interval": 5}},
            "the state's schedule is .* construct it with the same numbers",
        ),
        (
            lambda state: state | {"masks": {"a": torch.ones(4, dtype=torch.bool)}},
            "layer 'a' has rank 4 in the state and none in the model",
        ),
        (
            lambda state: state | {"masks": {n: mask[:2] for n, mask in state["masks"].items()}},
            "'blocks.0.q_proj' has rank 2 in the state and 4 in the model",
        ),
    ],
)
def test_a_state_of_something_else(change, message):
    model = adalora()
    allocator = tokengate.RankAllocator(model, optimizer_of(model), total_steps=10)
    before = allocator.state_dict()
    with pytest.raises(tokengate.TokenGateError, match=message):
        allocator.load_state_dict(change(before))
    assert allocator.steps == 0
    assert list(allocator.masks) == list(before["masks"])


def test_it_says_what_it_is():
    model = adalora()
    allocator = tokengate.RankAllocator(model, optimizer_of(model), total_steps=10)
    assert repr(allocator) == "RankAllocator(steps=0, budget=16, layers=4, target_step=7)"
    assert "target_rank=2" in repr(model)
