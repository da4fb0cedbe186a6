"""What is told of the next step's scores from those of the steps before it."""

import math

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st

from tokengate.gates.score_counts import count_scores, no_counts
from tokengate.training.leading.quantile_tracker import QuantileTracker

pytestmark = pytest.mark.usefixtures("one_thread")


def test_in_two_thousand_steps():
    tracker = QuantileTracker(1, torch.device("cpu"))
    generator, target = torch.Generator().manual_seed(1), 0.8
    for step in range(1, 2001):
        scores = step**0.5 * torch.exp(0.5 * torch.randn(1, 300, generator=generator))
        counts = no_counts(scores.device)
        count_scores(counts, scores, None)
        tracker.add(counts.unsqueeze(0), target)
    found = tracker.quantile(target)[0] * torch.tensor(2.0).log() - 0.5 * torch.tensor(2000.0).log()
    share = torch.distributions.Normal(0.0, 0.5).cdf(found)
    assert abs(share - target) < 0.03


def followed(powers, steps, target, weights, seed=0):
    """How far off one threshold is in the end for layers whose scores grow with steps^power."""
    generator, weights = torch.Generator().manual_seed(seed), torch.tensor(weights).double()
    mixed = QuantileTracker(len(powers), torch.device("cpu"), weights)
    as_one = QuantileTracker(1, torch.device("cpu"))
    for step in range(1, steps + 1):
        counts = torch.stack([no_counts(torch.device("cpu")) for _ in powers])
        for own, power in zip(counts, powers, strict=True):
            drawn = torch.exp(0.3 * torch.randn(1, 600, generator=generator))
            count_scores(own, step**power * drawn, None)
        counts = counts * weights.unsqueeze(-1)
        mixed.add(counts, target)
        as_one.add(counts.sum(0, keepdim=True), target)
    at = torch.tensor(powers) * math.log(steps + 1)
    thresholds = [tracker.quantile(target)[0] * math.log(2) for tracker in (mixed, as_one)]
    shares = [torch.distributions.Normal(at, 0.3).cdf(threshold) for threshold in thresholds]
    return [((share * weights).sum() - target).abs() for share in shares]


@settings(max_examples=many(10))
@given(
    powers=st.lists(st.floats(-0.5, 1.5), min_size=2, max_size=3),
    steps=st.sampled_from([20, 60, 200]),
    target=st.sampled_from([0.3, 0.6, 0.85]),
    heavy=st.floats(0.3, 0.8),
)
def test_layers_do_not_grow_alike(powers, steps, target, heavy):
    rest = [(1 - heavy) / (len(powers) - 1)] * (len(powers) - 1)
    off, _ = followed(powers, steps, target, [heavy, *rest])
    assert off <= 0.03


@pytest.mark.parametrize("steps", [30, 200])
def test_a_line_through_the_size_of_all_is_late(steps):
    """As long as one layer overtakes the other."""
    off, as_one = followed([1.5, 0.3], steps, 0.85, [0.5, 0.5])
    assert as_one > 0.1
    assert off <= 0.03
