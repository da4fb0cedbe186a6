"""What a model was called with in the last steps: how much of it is kept, and where it goes."""

import copy

import pytest
import torch
from led_trainings import Net, given, thresholds

import tokengate
from tokengate.layers.following import HEARERS
from tokengate.training.leading import last_calls
from tokengate.training.leading.last_calls import LEAST, LastCalls

pytestmark = pytest.mark.usefixtures("one_thread")


def kept(calls):
    model = tokengate.patch(Net(), "all-linear")
    last = LastCalls(model, torch.device("cpu"))
    last.begin()
    for x in calls:
        model(x)
        last.step()
    return last


@pytest.mark.parametrize(
    ("shape", "count", "left"),
    [
        ((1, 10, 6), 200, last_calls.STEPS),
        ((100, 10, 6), 100, LEAST),
        ((40, 10, 6), 100, 13),  # 512 samples
        ((4, 10**5, 6), 20, LEAST),  # 64 MiB
        ((4, 10, 6), 5, 5),
    ],
)
def test_so_much_is_kept(shape, count, left):
    last = kept(torch.zeros(shape) for _ in range(count))
    assert len(last.again()) == left
    last.end()
    assert last.again() == []


def test_what_is_kept_goes_on_where_it_was():
    last = kept([given(step) for step in range(10)])
    model = tokengate.patch(Net(), "all-linear")
    other = LastCalls(model, torch.device("cpu"))
    other.load_state_dict(copy.deepcopy(last.state_dict()))
    model.eval()
    outputs = [call() for (call,) in other.again()]
    assert len(outputs) == 10
    for step, output in enumerate(outputs):
        assert torch.equal(output, model(given(step)))


def test_an_evaluation_with_gradients_takes_no_memory(monkeypatch):
    """Nor a large batch; what was kept is let go."""
    monkeypatch.setattr(last_calls, "_MOST", 10 * given(0).numel() * 4)
    last = kept([given(0)] * 5)
    model = last._modules[""]
    for step in range(6):
        assert len(last.again()) == 5
        model(given(step))
    assert (last.again(), list(last._steps), last._now) == ([], [], [])
    last.begin()
    assert last not in HEARERS


def test_masks_of_restrictions_take_of_the_same_memory(monkeypatch):
    x = given(0)
    monkeypatch.setattr(last_calls, "_MOST", 10 * x.nbytes)
    last = kept([])
    model = last._modules[""]
    masks = {name: torch.rand(x.shape[:2]) for name in ("first", "last")}  # x.nbytes / 6 each
    for step in range(8):
        assert len(last.again()) == step
        with tokengate.restrict(model, masks):
            model(x)
        last.step()
    assert last.again() == []


def test_memory_that_is_short(monkeypatch):
    def short(value):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(last_calls, "_copied", short)
    assert thresholds() == thresholds(settle=False)


def test_what_is_loaded_goes_where_the_model_is():
    """Trainers load a checkpoint to the CPU; what was elsewhere than the model stays there."""
    model = tokengate.patch(Net(), "all-linear")
    last = LastCalls(model, torch.device("cpu"))
    last.begin()
    model(given(0), more=[given(1), torch.zeros(2, device="meta")])
    last.step()
    state = last.state_dict()
    elsewhere = LastCalls(model, torch.device("meta"))
    elsewhere.load_state_dict(state)
    ((call,),) = elsewhere._steps
    assert [t.device.type for t in last_calls._tensors(call.given)] == ["meta"] * 3
    state["steps"][0][0][-1][:] = [True, False, True]
    elsewhere.load_state_dict(state)
    ((call,),) = elsewhere._steps
    assert [t.device.type for t in last_calls._tensors(call.given)] == ["meta", "cpu", "meta"]
