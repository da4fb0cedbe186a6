"""tau by its own rule however steps are taken: scaled, by closures, in backward, resumed."""

import copy
import math

import pytest
import reference
import torch
from followed import S, loss_of, made, near, numbers, taus_of, train, without
from models import Net
from torch import nn, optim

import tokengate
from tokengate.errors import UnreachedLayerWarning
from tokengate.training.following import KEY


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("held", [True, False])
def test_a_grad_scaler(held, fused):
    """Scales that change, a step that is skipped, and the unit of lambda."""
    ends = []
    for scaled in (False, True):
        model = made()
        groups = model.parameters() if held else without(model)
        optimizer = optim.AdamW(groups, lr=1e-2, fused=fused)
        tokengate.follow(model, optimizer, s=S)
        scaler = torch.amp.GradScaler("cpu", 1024.0, enabled=scaled, growth_interval=3)
        for step in range(8):
            optimizer.zero_grad()
            tokengate.scale_penalty(model, scaler.get_scale())
            scaler.scale(loss_of(model, step)).backward()
            if step == 4:
                if not scaled:
                    continue
                model.blocks[1].v_proj.modification.A.grad.fill_(math.inf)
            before = numbers(model)
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(numbers(model), before) == (step == 4)
        ends.append(numbers(model))
    assert scaler.get_scale() != 1024.0
    assert torch.allclose(*ends, rtol=1e-5)


@pytest.mark.parametrize("held", [True, False])
def test_micro_batches_and_gradients_that_are_thrown_away(held):
    ends = []
    for thrown in (False, True):
        model = made()
        optimizer = optim.SGD([*model.parameters()] if held else without(model), lr=0.01)
        tokengate.follow(model, optimizer, s=S)
        for step in range(4):
            if thrown:  # as where a loss is not finite
                loss_of(model, 99).backward()
                optimizer.zero_grad()
            for micro in range(3):
                (loss_of(model, 3 * step + micro) / 3).backward()
            together = torch.cat([tau.grad for tau in taus_of(model)])
            optimizer.step()
            optimizer.zero_grad()
        ends.append((numbers(model), together))
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


class Released(optim.SGD):
    """Steps one parameter alone, as within backward; and in the midst of it another one."""

    @torch.no_grad()
    def step(self, closure=None, *, param=None, within=None):
        if within is not None:
            self.step(param=within)
        param.add_(param.grad, alpha=-self.defaults["lr"])


def test_steps_of_single_taus_may_overlap():
    """As backward's threads take them, of which each device has one."""
    model = made()
    taus = taus_of(model)
    optimizer = Released([p for p in model.parameters() if p.requires_grad], lr=0.5)
    tokengate.follow(model, optimizer, s=S)
    for i, tau in enumerate(taus):
        tau.data.fill_(float(i))
        tau.grad = torch.ones(1)
    optimizer.step(param=taus[0], within=taus[1])
    assert torch.allclose(numbers(model)[:2], torch.tensor([0.0, 1.0]) - S, rtol=0, atol=1e-6)


class SAM(optim.Optimizer):
    """Sharpness-aware minimisation: a step up along the gradient, then one of the base's."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    def _all(self):
        return [p for g in self.param_groups for p in g["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self):
        norm = torch.stack([p.grad.norm() for p in self._all()]).norm()
        for p in self._all():
            self.state[p]["was"] = p.detach().clone()
            p.add_(0.05 * p.grad / norm)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in self._all():
            p.copy_(self.state[p]["was"])
        self.base_optimizer.step()

    def step(self, closure):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


@pytest.mark.parametrize("by_closure", [True, False])
def test_an_optimiser_that_wraps_another(by_closure):
    model = made()
    optimizer = SAM(without(model), optim.SGD, lr=0.01)
    tokengate.follow(model, optimizer, s=S)
    directions, seen = [[] for _ in taus_of(model)], set()
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        before = numbers(model)

        def again(step=step, before=before):
            assert torch.equal(numbers(model), before)  # nobody has moved them
            loss = loss_of(model, step)
            loss.backward()
            for each, tau in zip(directions, taus_of(model), strict=True):
                each.append(-tau.grad.item())
            return loss

        if by_closure:
            optimizer.step(again)
        else:
            optimizer.first_step()
            again()
            optimizer.second_step()
        seen.add(tuple(numbers(model).tolist()))
    assert len(seen) == 6
    assert near(model, torch.tensor([reference.tau_adam(0.0, g, S)[-1] for g in directions]))
    held = SAM(model.parameters(), optim.SGD, lr=0.01)
    with pytest.raises(tokengate.TokenGateError, match=r"SAM, which wraps SGD .*\[:1\]"):
        tokengate.follow(model, held)


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("kind", ["SGD", "LBFGS"])
def test_closures_of_which_the_first_call_counts(kind, held):
    model = made()
    params = [*model.parameters()] if held else without(model)[0]["params"]
    trained = [p for p in params if p.requires_grad]
    optimizer = optim.SGD(trained, lr=0.01) if kind == "SGD" else optim.LBFGS(trained, max_iter=4)
    tokengate.follow(model, optimizer, s=S)
    directions, calls = [[] for _ in taus_of(model)], 0
    for step in range(4):
        found = []

        def closure(step=step, found=found):
            nonlocal calls
            calls += 1
            model.zero_grad(set_to_none=False)
            loss = loss_of(model, step)
            loss.backward()
            found.append([-tau.grad.item() for tau in taus_of(model)])
            return loss

        optimizer.step(closure)
        for each, g in zip(directions, found[0], strict=True):
            each.append(g)
    assert calls > 4 or kind == "SGD"
    assert near(model, torch.tensor([reference.tau_adam(0.0, g, S)[-1] for g in directions]))


@pytest.mark.parametrize("micro", [1, 2])
def test_steps_within_backward(micro):
    """optimi's gradient release, with its accumulation."""
    optimi = pytest.importorskip("optimi", reason="needs torch-optimi")
    model = made()
    model.requires_grad_(False)
    for layer in tokengate.layers(model).values():
        layer.requires_grad_(True)
        layer.weight.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimi.AdamW(trained, lr=1e-2, gradient_release=True)
    optimi.prepare_for_gradient_release(model, optimizer)
    tokengate.follow(model, optimizer, s=S)
    twin = made()
    own = tokengate.follow(twin, optim.SGD(without(twin, 0.0)), s=S)
    a = model.blocks[0].q_proj.modification.A
    for step in range(6):
        with torch.no_grad():
            for p, q in zip(model.parameters(), twin.parameters(), strict=True):
                q.copy_(p)
        before = a.detach().clone()
        for part in range(micro):
            optimizer.optimizer_accumulation = part < micro - 1
            loss_of(model, step).backward()
            loss_of(twin, step).backward()
        own._optimizers[0].step()
        assert not torch.equal(a, before)
        assert torch.allclose(numbers(model), numbers(twin), rtol=1e-6, atol=0)
    assert numbers(model).abs().min() > 0


@pytest.mark.parametrize("order", ["follow, load", "load, follow", "schedule, follow, load"])
@pytest.mark.parametrize("held", [True, False])
def test_resumed_bit_for_bit(held, order, tmp_path):
    def start(model):
        return optim.SGD([*model.parameters()] if held else without(model), lr=0.01, momentum=0.9)

    model = made()
    optimizer = start(model)
    following = tokengate.follow(model, optimizer, s=S)
    train(model, optimizer, 5)
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "checkpoint")
    train(model, optimizer, 5)
    weights, state = torch.load(tmp_path / "checkpoint", weights_only=True)
    assert (KEY in state["state"]) is not held
    again = made()
    again.load_state_dict(weights)
    resumed = start(again)
    for what in order.split(", "):
        if what == "follow":
            other = tokengate.follow(again, resumed, s=S)
        elif what == "load":
            resumed.load_state_dict(state)
        else:
            optim.lr_scheduler.OneCycleLR(resumed, 0.01, total_steps=20)
    train(again, resumed, 5)
    assert torch.equal(numbers(again), numbers(model))
    for name, own in following.state_dict().items():
        assert {*own} == {"step", "exp_avg", "exp_avg_sq"}
        assert own["step"] == 10
        assert all(torch.equal(v, other.state_dict()[name][k]) for k, v in own.items())


def test_the_state_alone_and_what_does_not_fit():
    model, again = made(), made()
    optimizer, resumed = optim.SGD(without(model)), optim.SGD(without(again))
    following = tokengate.follow(model, optimizer, s=S)
    train(model, optimizer, 3)
    other = tokengate.follow(again, resumed, s=S)
    again.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(following.state_dict()))
    train(model, optimizer, 2)
    train(again, resumed, 2)
    assert torch.equal(numbers(model), numbers(again))
    with pytest.raises(tokengate.TokenGateError, match=r"differ in 'blocks\.0\.q_proj'"):
        other.load_state_dict({})
    third = made()
    plain = optim.SGD(without(third), momentum=0.9)
    train(third, plain, 1)
    with pytest.raises(tokengate.TokenGateError, match=r"saved without tokengate\.follow"):
        resumed.load_state_dict(plain.state_dict())


def test_it_goes_on_from_adams_own_averages_and_gives_them_back():
    """AdamW with param_groups is the same rule: to change between them changes nothing."""
    ends = []
    for changes in (False, True):
        model = made()
        optimizer = optim.AdamW(tokengate.param_groups(model, 1e-2, S))
        train(model, optimizer, 4)
        following = tokengate.follow(model, optimizer) if changes else None
        train(model, optimizer, 4)
        if changes:
            following.detach()
        train(model, optimizer, 4)
        ends.append(numbers(model))
    assert torch.allclose(*ends, rtol=1e-6, atol=0)


def test_the_later_of_two_calls_counts():
    model = made()
    first, second = optim.SGD(without(model)), optim.SGD(without(model))
    tokengate.follow(model, first, s=S)
    tokengate.follow(model, second, s=S)
    assert near(model, train(model, second))
    before = numbers(model)
    loss_of(model, 0).backward()
    first.step()
    assert torch.equal(numbers(model), before)


def test_nothing_to_follow_and_nothing_that_steps():
    model = tokengate.patch(Net(), ["q_proj"], gate=False)
    optimizer = optim.SGD(without(model))
    assert tokengate.follow(model, optimizer).adam is None
    loss_of(model, 0).backward()
    optimizer.step()
    for wrong in (None, model, "adam"):
        with pytest.raises(tokengate.TokenGateError, match=r"pass a torch\.optim\.Optimizer"):
            tokengate.follow(model, wrong)


def test_gradients_that_somebody_keeps_to_himself():
    """As DeepSpeed's ZeRO, whose optimiser holds flat copies."""
    model = made()
    flat = nn.Parameter(torch.zeros(3))
    optimizer = optim.SGD([flat], lr=0.1)
    tokengate.follow(model, optimizer)
    optimizer.step()  # without any gradient, as before a training
    flat.grad = torch.ones(3)
    with pytest.warns(UnreachedLayerWarning, match="none of the 4 taus .* had a gradient"):
        optimizer.step()
    optimizer.step()


def test_what_looks_at_gradients_after_the_step_finds_them():
    model = made()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    tokengate.follow(model, optimizer)
    loss_of(model, 0).backward()
    before = [tau.grad for tau in taus_of(model)]
    optimizer.step()
    assert all(tau.grad is g for tau, g in zip(taus_of(model), before, strict=True))


def test_compiled():
    ends = []
    for compiled in (False, True):
        model = made()
        optimizer = optim.AdamW(without(model))
        tokengate.follow(model, optimizer, s=S)
        step = torch.compile(lambda o=optimizer: o.step(), backend="eager")
        for i in range(3):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            step() if compiled else optimizer.step()
        ends.append(numbers(model))
    assert torch.allclose(*ends, rtol=1e-5)
    assert ends[0].abs().min() > 0


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_beside_a_schedule_and_an_allocator(order, held):
    """Which look at gradients in the same step, by closures too, made before or after it."""
    paths = []
    for follows in (False, True):
        model = made("adalora", rank=4, target_rank=2)
        groups = tokengate.param_groups(model, 1e-2, S)
        optimizer = optim.AdamW(groups if held or not follows else groups[:1])
        hooks = [
            *([lambda m, o: tokengate.follow(m, o)] if follows else []),
            lambda m, o: tokengate.RankAllocator(m, o, total_steps=10),
        ][::order]
        for hook in hooks:
            hook(model, optimizer)
        controlled = tokengate.SparsitySchedule(model, optimizer, 0.5, 10)
        for step in range(10):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert controlled.steps == 10
        paths.append((numbers(model), torch.tensor([*controlled.thresholds.values()])))
    for one, other in zip(*paths, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-8)
    assert paths[0][1].abs().min() > 0


def test_clipping_leaves_the_taus_out():
    model = made()
    loss_of(model, 0).backward()
    everything = [p for p in model.parameters() if p.grad is not None]
    others = [p for p in everything if not any(p is tau for tau in taus_of(model))]
    whole = nn.utils.get_total_norm([p.grad for p in everything])
    wanted = nn.utils.get_total_norm([p.grad for p in others])
    before = [tau.grad.clone() for tau in taus_of(model)]
    assert whole > 1.01 * wanted
    for parameters in (model, model.parameters(), everything):
        assert tokengate.clip_grad_norm_(parameters, 1e9) == pytest.approx(wanted.item())
    tokengate.clip_grad_norm_(model, 0.01, norm_type=2.0, foreach=False)
    assert nn.utils.get_total_norm([p.grad for p in others]) == pytest.approx(0.01, rel=1e-3)
    assert all(torch.equal(t.grad, g) for t, g in zip(taus_of(model), before, strict=True))
    assert tokengate.clip_grad_norm_(others[0], 1e9) == pytest.approx(others[0].grad.norm().item())
    assert tokengate.clip_grad_norm_(taus_of(model), 1.0) == 0
