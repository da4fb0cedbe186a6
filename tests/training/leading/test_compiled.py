"""A model that `torch.compile` has compiled is called again in the end as one that is not."""

import copy
import pickle
from functools import partial

import pytest
import torch
from led_trainings import STEPS, made, thresholds, train

from tokengate.names import inside

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("where", ["in place", "before", "after", "step"])
def test_a_model_that_is_compiled_as_a_whole(where):
    """As one that is not; but where a function is compiled that calls it."""
    compiled = partial(torch.compile, backend="eager", fullgraph=True)

    def thresholds_of(settle):
        then = compiled if where == "before" else lambda model: model
        model, optimizer, schedule = made(settle=settle, then=then)
        if where == "in place":
            model.compile(backend="eager", fullgraph=True)
        called = compiled(model) if where == "after" else model
        call = lambda model, x, step: model(x)  # noqa: E731
        train(called, optimizer, compiled(call) if where == "step" else call)
        return list(schedule.thresholds.values())

    followed, settled = thresholds_of(settle=False), thresholds_of(settle=True)
    assert followed != pytest.approx(thresholds(), rel=0.01)
    assert settled == pytest.approx(followed if where == "step" else thresholds(), rel=1e-2)


@pytest.mark.parametrize("was", [False, True])
@pytest.mark.parametrize("becomes", [False, True])
def test_a_training_is_resumed_compiled_or_not(was, becomes):
    """To the bit: what was kept is known by the model's own names, and nothing is missed."""

    def made_so(is_compiled):
        then = partial(torch.compile, backend="eager") if is_compiled else lambda model: model
        return made(then=then)

    call = lambda model, x, step: model(x)  # noqa: E731
    (model, optimizer, schedule), again = made_so(was), made_so(becomes)
    train(model, optimizer, call, 12)
    inside(again[0]).load_state_dict(inside(model).state_dict())
    for before, after in ((optimizer, again[1]), (schedule, again[2])):
        after.load_state_dict(copy.deepcopy(before.state_dict()))
    train(*again[:2], call, begin=12)
    assert list(again[2].thresholds.values()) == thresholds()


def test_what_runs_as_it_is_beyond_the_limit_of_recompilations_is_heard_once():
    def call(model, x, step):
        return model(x[:, : 3 + step % 6])

    then = partial(torch.compile, backend="eager", dynamic=False)
    model, optimizer, schedule = made(then=then)
    with torch._dynamo.config.patch(recompile_limit=2):
        train(model, optimizer, call)
    assert list(schedule.thresholds.values()) == thresholds(call)


def test_nothing_hears_a_compiled_model_after():
    model, optimizer, _ = made()
    compiled = torch.compile(model, backend="eager")
    hooked = []
    train(
        compiled,
        optimizer,
        lambda model, x, step: hooked.append(len(compiled._forward_pre_hooks)) or model(x),
        STEPS - 1,
    )
    assert hooked[-1] == 1
    pickle.dumps(compiled._forward_pre_hooks | compiled._forward_hooks)  # as a saved model's
    train(compiled, optimizer, lambda model, x, step: model(x), begin=STEPS - 1)
    assert not compiled._forward_pre_hooks
    assert not compiled._forward_hooks
