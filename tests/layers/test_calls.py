"""What belongs to a call is no other thread's, task's or context's, in whatever order they end."""

import asyncio
import contextlib
import copy
import gc
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from drawing import many
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from models import Net, away_from_initialisation, one_sentence, snapshot
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokengate
from tokengate.errors import UnenteredContextWarning
from tokengate.layers import calls
from tokengate.layers.named_adapters import add_adapter

X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 0, 0, 1]] * 4, dtype=torch.bool)
NAMES = ("default", "b", "c")


def several():
    """A model of three adapters with gates that are open and closed; "default" is in use."""
    torch.manual_seed(0)
    model = tokengate.patch(Net(), ["q_proj", "fc1", "fc2"], rank=2, tau=0.3).eval()
    away_from_initialisation(model)
    for seed, name in enumerate(NAMES[1:], 1):
        torch.manual_seed(seed)
        other = away_from_initialisation(
            tokengate.patch(Net(), ["q_proj", "fc1", "fc2"], rank=2, tau=0.3)
        )
        for path, layer in tokengate.layers(model).items():
            own = tokengate.layers(other)[path]
            add_adapter(layer, name, own.modification, own.gate)
    return model


def run(model, x=X):
    with torch.no_grad():
        return model(x)


def ways(model):
    """Every kind of context, by name."""
    found = {name: lambda name=name: tokengate.use(model, name) for name in (*NAMES, None)}
    found["rows"] = lambda: tokengate.use(model, ["b", None, "c", "default"])
    found["regions"] = lambda: tokengate.use(model, {"b": MASK, "c": ~MASK})
    found["disabled"] = lambda: tokengate.disabled(model)
    found["restrict"] = lambda: tokengate.restrict(model, MASK)
    found["free"] = contextlib.nullcontext
    return found


def answers(model):
    found = {}
    for name, context in ways(model).items():
        with context():
            found[name] = run(model)
    return found


def all_differ(found):
    same = {frozenset(("default", "free")), frozenset((None, "disabled"))}
    for one, a in found.items():
        for other, b in found.items():
            if one is not other and frozenset((one, other)) not in same:
                assert (a - b).abs().max() > 1e-4, (one, other)


@pytest.fixture
def quick_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_threads(count, work):
    with ThreadPoolExecutor(count) as pool:
        return [f.result() for f in [pool.submit(work, seed) for seed in range(count)]]


def test_threads_get_their_own_answers_and_counts(quick_switches, one_thread, tmp_path):
    """Eight threads, in each 200 requests of kinds drawn at random."""
    model = several()
    expected, before = answers(model), snapshot(model)
    all_differ(expected)
    counts = dict.fromkeys((None, "disabled"))  # where nothing is counted
    for name, context in ways(model).items():
        if name in counts:
            continue
        with context(), tokengate.record(model, ratios=name not in ("rows", "regions")) as rec:
            run(model)
        counts[name] = rec.report().modules

    def serve(seed):
        generator, wrong = torch.Generator().manual_seed(seed), 0
        kinds = list(expected)
        for request in range(many(200)):
            name = kinds[int(torch.randint(len(kinds), (), generator=generator))]
            plain = name not in ("rows", "regions")
            if request % 5 == 0 and counts[name] is not None:
                with ways(model)[name](), tokengate.record(model, ratios=plain) as rec:
                    found = run(model)
                wrong += rec.report().modules != counts[name]
            else:
                with ways(model)[name]():
                    found = run(model)
            wrong += not torch.equal(found, expected[name])
            if request % 100 == 50:
                tokengate.save(model, tmp_path / str(seed), name="c")
        return wrong

    assert in_threads(8, serve) == [0] * 8
    assert snapshot(model)["values"] == before["values"]
    assert snapshot(model)["parameters"] == before["parameters"]
    assert torch.equal(run(model), expected["free"])
    with tokengate.use(model, "c"):
        tokengate.save(model, tmp_path / "wanted")
    for seed in range(8):
        assert (
            not tokengate.diff(tmp_path / str(seed), tmp_path / "wanted").layers
            if hasattr(tokengate, "diff")
            else True
        )


def test_padding_of_one_thread_is_not_another_s(quick_switches, one_thread):
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=30, max_position_embeddings=12,
    )  # fmt: skip
    model = tokengate.patch(transformers.BertModel(config).eval(), ["query"])
    ids = torch.randint(1, 30, (2, 6))

    def count(seed):
        found = set()
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[:, 6 - seed % 4 :] = 0
        for _ in range(60):
            with tokengate.record(model) as rec, torch.no_grad():
                model(ids, attention_mask=mask)
            found.add(next(iter(rec.report().modules.values())).positions)
        return found

    assert in_threads(8, count) == [{12 - 2 * (seed % 4)} for seed in range(8)]


def test_tasks_get_their_own_answers():
    model = several()
    expected = answers(model)

    async def serve(name):
        with ways(model)[name]():
            await asyncio.sleep(0)
            found = run(model)
            await asyncio.sleep(0)
            return torch.equal(found, expected[name]) and torch.equal(run(model), found)

    async def all_of_them():
        return await asyncio.gather(*(serve(name) for name in [*expected] * 3))

    assert all(asyncio.run(all_of_them()))
    assert torch.equal(run(model), expected["free"])


def test_suspended_generators_and_other_orders_leave_nothing():
    model = several()
    expected = answers(model)

    def suspended(name):
        with ways(model)[name]():
            yield run(model)

    first, second = suspended("b"), suspended("disabled")
    assert torch.equal(next(first), expected["b"])
    next(second)
    first.close()  # that which was entered first
    assert torch.equal(run(model), expected["disabled"])
    second.close()
    assert torch.equal(run(model), expected["free"])
    # Closed by a thread that never entered it.
    left = suspended("c")
    next(left)
    thread = threading.Thread(target=left.close)
    thread.start()
    thread.join()
    assert torch.equal(run(model), expected["free"])
    tokengate.unpatch(model)  # nobody is left in a context


def test_for_good_is_for_all_threads_and_a_context_for_one():
    model = several()
    expected = answers(model)

    def elsewhere():
        return in_threads(1, lambda _: run(model))[0]

    tokengate.use(model, "b")
    assert torch.equal(run(model), expected["b"])
    assert torch.equal(elsewhere(), expected["b"])
    with tokengate.use(model, "c"):
        assert torch.equal(run(model), expected["c"])
        assert torch.equal(elsewhere(), expected["b"])
    assert torch.equal(elsewhere(), expected["b"])
    held = tokengate.use(model, "c")  # may be entered yet
    assert torch.equal(run(model), expected["c"])
    assert torch.equal(elsewhere(), expected["b"])
    with held:
        assert torch.equal(run(model), expected["c"])
    assert torch.equal(run(model), expected["b"])
    with held:  # again
        assert torch.equal(run(model), expected["c"])
    assert torch.equal(run(model), expected["b"])
    held = tokengate.use(model, "c")
    tokengate.use(model, "default")  # later, and the last word
    del held
    gc.collect()
    assert torch.equal(run(model), expected["default"])
    assert torch.equal(elsewhere(), expected["default"])


def test_rows_for_good_are_none_and_say_so():
    model = several()
    expected = answers(model)
    with pytest.warns(UserWarning, match="several adapters and was no context"):
        tokengate.use(model, ["b", None, "c", "b"])
    assert torch.equal(run(model), expected["free"])


CHANGES = {
    "patch": lambda model: tokengate.patch(model, ["v_proj"]),
    "unpatch": tokengate.unpatch,
    "calibrate": lambda model: tokengate.calibrate(model, [X]),
    "verify": lambda model: tokengate.verify(model, X),
    "fold": lambda model: tokengate.fold(model, [X]),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("busy", ["is in use", "is in record", "runs it"])
def test_a_model_is_not_changed_while_another_thread_uses_it(change, busy):
    model = several()
    if change == "fold":
        model = tokengate.patch(Net(), ["fc1"], gate=False)
    entered, leave = threading.Event(), threading.Event()

    def wait(*_):
        entered.set()
        assert leave.wait(60)

    def hold():
        if busy == "runs it":
            handle = model.blocks[0].fc1.register_forward_pre_hook(wait)
            run(model)
            handle.remove()
            return
        with tokengate.use(model, None) if "use" in busy else tokengate.record(model):
            wait()

    thread = threading.Thread(target=hold)
    thread.start()
    assert entered.wait(60)
    before = snapshot(model)
    try:
        with one_sentence(f"{change} was asked of a Net while another thread {busy}"):
            CHANGES[change](model)
        assert snapshot(model)["values"] == before["values"]
    finally:
        leave.set()
        thread.join()
    CHANGES[change](model)


def test_what_is_trained_in_a_context_is_what_it_uses():
    model = several().train()
    with tokengate.use(model, "b"):
        flags = {n: p.requires_grad for n, p in model.named_parameters() if "adapters" in n}
        assert all(on == (".b." in n) for n, on in flags.items())
        model(X).square().sum().backward()
    with_gradients = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradients
    assert all("adapters.b." in n for n in with_gradients)
    model(X).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} > with_gradients
    assert not any("adapters.c." in n for n, p in model.named_parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["disabled", "restrict"])
def test_layers_that_a_context_would_not_know_are_added_before_it(name, tmp_path):
    model = several()
    tokengate.save(tokengate.patch(Net(), ["fc1", "head"], rank=2), tmp_path / "more")
    tokengate.save(tokengate.patch(Net(), ["fc1"], rank=2), tmp_path / "same")
    keys = set(model.state_dict())
    with ways(model)[name]():
        expected = run(model)
        for added in (
            lambda: tokengate.patch(model, ["head"], rank=2),
            lambda: tokengate.load(model, tmp_path / "more", name="more"),
        ):
            with one_sentence("more layers than before, 1,", f"within tokengate.{name}"):
                added()
        assert set(model.state_dict()) == keys
        tokengate.load(model, tmp_path / "same", name="same")
        assert torch.equal(run(model), expected)
    with tokengate.use(model, "b"):
        tokengate.patch(model, ["head"], rank=2)


def test_copies_in_a_context_are_in_none():
    model = several()
    expected = answers(model)
    for name in ("use", "disabled"):
        around = tokengate.disabled(model) if name == "disabled" else tokengate.use(model, "b")
        with around:
            with pytest.warns(
                UnenteredContextWarning, match=f"copied or .* tokengate.{name}, which"
            ):
                twin = copy.deepcopy(model)
            assert torch.equal(run(twin), expected["free"])
        assert torch.equal(run(twin), expected["free"])


@pytest.mark.parametrize("reference", ["disabled", "b"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_reference_without_gradients_is_no_checkpoint(reentrant, training, reference):
    """As in preference optimisation: between forward and backward the same input, otherwise."""
    model = several().train(training)
    x = X.clone().requires_grad_()
    found = []
    for again in (False, True):
        model.zero_grad()
        p = checkpoint(model, x, use_reentrant=reentrant) if again else model(x)
        with ways(model)[reference](), torch.no_grad():
            r = model(x)
            for _ in range(40):  # more than are waited for
                model(X[:, :3])
        (p - r).square().sum().backward()
        found.append([q.grad for q in model.parameters() if q.grad is not None])
    assert found[0]
    assert max(g.abs().max() for g in found[0]) > 1e-3
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore::tokengate.errors.UnenteredContextWarning")
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_made_in_a_context_trains_what_the_original_does(copied):
    model = several()
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    with tokengate.use(model, "b"):
        twin = copied(model)
    assert {n: p.requires_grad for n, p in twin.named_parameters()} == flags
    with tokengate.use(twin, "b"):
        trained = {n for n, p in twin.named_parameters() if p.requires_grad and ".b." in n}
    assert trained


def test_a_module_that_calls_itself_keeps_its_mask():
    class Recursive(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, attention_mask=None, depth=2):
            if depth:
                x = self(x, attention_mask, depth - 1)
            return self.fc(x)

    model = tokengate.patch(Recursive(), "all-linear", rank=2)
    with tokengate.record(model) as rec:
        model(X, MASK.long())
    assert next(iter(rec.report().modules.values())).positions == 3 * int(MASK.sum())


def test_contexts_that_another_task_has_ended_do_not_pile_up():
    model = several()

    async def again(left):
        with tokengate.disabled(model):
            if left:
                task = asyncio.create_task(again(left - 1))
        return len(calls.contexts()) + (await task if left else 0)

    assert asyncio.run(again(20)) <= 21


@pytest.mark.parametrize("name", ["b", "rows", "disabled", "restrict"])
def test_a_task_goes_on_in_what_it_was_begun_in(name):
    model = several()
    expected = answers(model)
    assert not torch.equal(expected[name], expected["free"])

    async def answer():
        return run(model)

    async def serve():
        with ways(model)[name]():
            task = asyncio.create_task(answer())
        assert torch.equal(run(model), expected["free"])
        return await task

    assert torch.equal(asyncio.run(serve()), expected[name])


def test_a_recording_ends_for_tasks_that_were_begun_in_it_too():
    model = several()

    async def answer():
        return run(model)

    async def serve():
        with tokengate.record(model) as rec:
            run(model)
            task = asyncio.create_task(answer())
        before = rec.report().to_dict()
        await task
        return before == rec.report().to_dict()

    assert asyncio.run(serve())


def test_backward_after_the_context_it_was_begun_in():
    model = several()
    adapters = tokengate.layers(model)["blocks.0.fc1"]._adapters

    def gradients(name):
        return [p.grad for p in adapters[name].parameters()]

    with tokengate.use(model, "b"):
        loss = model(X).sum()
        loss.backward(retain_graph=True)
    right = [grad.clone() for grad in gradients("b")]
    assert any(grad.any() for grad in right)
    model.zero_grad()
    loss.backward()
    assert all(map(torch.equal, gradients("b"), right))
    assert gradients("default") == [None] * len(right)
    # Until it is used for something else, nothing of which is to be trained.
    with tokengate.use(model, "b"):
        run(model)
    assert not any(p.requires_grad for p in adapters["b"].parameters())


@pytest.mark.parametrize("name", ["b", "rows", "disabled", "restrict", "record"])
def test_replicas_that_would_be_in_no_context_are_refused(name):
    model = several()
    layer = tokengate.layers(model)["blocks.0.fc1"]
    way = tokengate.record(model) if name == "record" else ways(model)[name]()
    kind = "use" if name in ("b", "rows") else name
    with way, one_sentence(f"DataParallel was called within {kind}"):
        layer._replicate_for_data_parallel()  # as DataParallel does on several GPUs
    assert layer._replicate_for_data_parallel()._is_replica


def test_a_layer_called_by_keyword():
    model = nn.Sequential(nn.Linear(8, 4))
    tokengate.patch(model, "all-linear", rank=2)
    away_from_initialisation(model)
    assert torch.equal(model[0](input=X), model[0](X))
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    conv = nn.Sequential(transformers.pytorch_utils.Conv1D(4, 8))
    tokengate.patch(conv, ["0"], rank=2)
    away_from_initialisation(conv)
    assert torch.equal(conv[0](x=X), conv[0](X))
    with pytest.raises(TypeError):
        model[0](inputs=X)


def test_compiled_code_is_of_what_is_in_force():
    model = several()
    expected = answers(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    # Of a code object there may be eight, in all threads together.
    for name in ("free", "b", "disabled", "rows", "b", "free"):
        with ways(model)[name](), torch.no_grad():
            torch.testing.assert_close(compiled(X), expected[name])

    def elsewhere(seed):
        name = ("b", "free", "disabled")[seed]
        with ways(model)[name](), torch.no_grad():
            return all(torch.allclose(compiled(X), expected[name], atol=1e-5) for _ in range(20))

    assert all(in_threads(3, elsewhere))


class Interleavings(RuleBasedStateMachine):
    """Contexts of several threads, entered and left in any order, against what each has entered."""

    @initialize()
    def start(self):
        self.model = several()
        self.expected = answers(self.model)
        self.pools = [ThreadPoolExecutor(1) for _ in range(3)]
        self.entered = [[] for _ in self.pools]

    def on(self, thread, work):
        return self.pools[thread].submit(work).result()

    @rule(thread=st.integers(0, 2), name=st.sampled_from([*NAMES, None, "disabled"]))
    def enter(self, thread, name):
        def work():
            context = ways(self.model)[name]()
            context.__enter__()
            return context

        self.entered[thread].append((name, self.on(thread, work)))

    @rule(thread=st.integers(0, 2), which=st.integers(0, 3))
    def leave(self, thread, which):
        if self.entered[thread]:
            _, context = self.entered[thread].pop(which % len(self.entered[thread]))
            self.on(thread, lambda: context.__exit__(None, None, None))

    @invariant()
    def each_runs_as_it_entered(self):
        if not hasattr(self, "pools"):
            return
        for thread, entered in enumerate(self.entered):
            names = [name for name, _ in entered]
            used = [name for name in names if name != "disabled"]
            wanted = used[-1] if used else "free"
            if "disabled" in names:
                wanted = "disabled"
            found = self.on(thread, lambda: run(self.model))
            assert torch.equal(found, self.expected[wanted])

    def teardown(self):
        if hasattr(self, "pools"):
            for thread, entered in enumerate(self.entered):
                for _, context in entered:
                    self.on(thread, lambda context=context: context.__exit__(None, None, None))
                self.pools[thread].shutdown()
            assert not calls.OPEN
            assert torch.equal(run(self.model), self.expected["free"])


TestInterleavings = Interleavings.TestCase
TestInterleavings.settings = settings(max_examples=15, stateful_step_count=20)
