"""The survey itself, over a handful, and what it wrote; all of it takes half an hour."""

import pytest
import torch
from torch import nn

import tokengate

transformers = pytest.importorskip("transformers", reason="the transformers extra is not installed")

import survey_results as written  # noqa: E402
import survey_transformers as survey  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_type", ["llama", "swin", "clip"])
def test_reached(model_type):
    found = survey.survey(model_type, survey.classes()[model_type])
    assert (found.outcome, found.reason) == ("reached", "")
    assert found.called == found.layers > 5
    assert found.experts == ""


def test_experts_are_reached_or_refused_in_a_sentence():
    found = survey.survey("mixtral", survey.classes()["mixtral"])
    assert found.outcome == "reached"
    assert found.experts in ("reached", "refused")


def test_a_model_that_does_not_run_is_not_ours():
    found = survey.survey("no_such_type", "LlamaModel")
    assert found.outcome == "unbuilt"
    assert found.reason.startswith("KeyError")


class Broken(nn.Module):
    """Whose second call gives something else: patching has changed it, as it seems."""

    def __init__(self, after):
        super().__init__()
        self.layer, self.calls, self.after = nn.Linear(4, 4), 0, after

    def forward(self, x):
        self.calls += 1
        return self.layer(x) + (self.calls > self.after)


def test_a_failure_is_seen():
    build, inputs = (lambda: Broken(after=2)), {"x": torch.ones(1, 2, 4)}
    outcome, _, _, reason = survey._outcome(build, inputs, "all-linear")
    assert outcome == "failed"
    assert "patched, it is not what it was" in reason
    outcome, *_ = survey._outcome(lambda: Broken(after=99), inputs, "all-linear")
    assert outcome == "reached"


def test_what_was_found_has_no_failures_and_is_counted_in_the_docs():
    results = written.written()
    assert len(results) > 600
    outcomes = [found.outcome for found in results.values()]
    assert outcomes.count("reached") + outcomes.count("partly") > 300
    assert "failed" not in outcomes
    assert written.counts(results) in written.PAGE.read_text()


def test_the_classes_that_give_other_outputs_are_left_out():
    class Grouped(nn.Linear):
        def forward(self, x):
            return super().forward(x).unflatten(-1, (2, -1))

    class Plain(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = nn.ModuleDict({"a": Grouped(4, 4), "b": Plain(4, 4), "c": nn.Linear(4, 4)})
    tokengate.patch(model, "all-linear")
    assert list(tokengate.layers(model)) == ["b", "c"]
    with pytest.raises(tokengate.TokenGateError, match=r"a Grouped and gives other outputs than"):
        tokengate.patch(nn.ModuleDict({"a": Grouped(4, 4)}), ["a"])
