"""What is told of the next step's scores from those of the steps before it."""

import math

import pytest
import torch
from drawing import many
from hypothesis import given, settings
from hypothesis import strategies as st

from tokengate.gates.score_counts import LOW, count_scores, no_counts
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


def fallen(steps, moves, seed=0):
    """How far off a threshold is after a rate that fell to 0, where scores grow with its sum."""
    generator, way = torch.Generator().manual_seed(seed), 0.0
    tracker, target = QuantileTracker(1, torch.device("cpu")), 0.7
    for step in range(steps):
        drawn = torch.exp(0.3 * torch.randn(600, generator=generator))
        tracker.add(counted((way * drawn).tolist()), target, moves(1 - step / steps))
        way += 1 - step / steps
    threshold = tracker.quantile(target)[0] * math.log(2) - math.log(way)
    return abs(torch.distributions.Normal(0.0, 0.3).cdf(threshold).item() - target)


@pytest.mark.parametrize("steps", [20, 60])
def test_where_the_learning_rate_falls_growth_ends(steps):
    """A line over steps foretold that it goes on."""
    as_steps = [fallen(steps, lambda rate: 1.0, seed) for seed in range(8)]
    found = [fallen(steps, lambda rate: rate, seed) for seed in range(8)]
    assert sum(as_steps) / 8 > 0.015
    assert sum(found) / 8 < 0.008


@settings(max_examples=many(10))
@given(steps=st.integers(20, 200), unit=st.floats(1e-8, 1e3), seed=st.integers(0, 99))
def test_the_unit_of_the_learning_rate_is_nothing(steps, unit, seed):
    found = fallen(steps, lambda rate: unit * rate, seed)
    assert found <= 0.03
    assert found == pytest.approx(fallen(steps, torch.tensor, seed), abs=1e-3)


def test_where_no_rate_is_known_steps_are_counted():
    assert fallen(40, lambda rate: 0.0) == fallen(40, lambda rate: 1.0)


def test_a_rate_that_rises_from_0_where_scores_are_from_the_start():
    tracker = QuantileTracker(1, torch.device("cpu"))
    scores = torch.exp2(torch.randn(300, generator=torch.Generator().manual_seed(0)))
    for moves in (0.0, 0.0, 0.0, 1e-4, 2e-4, 3e-4, 4e-4):
        tracker.add(counted(scores.tolist()), 0.5, moves)
        assert (scores < tracker.quantile(0.5).exp2()).float().mean() == pytest.approx(
            0.5, abs=0.02
        )


@pytest.mark.parametrize("first", [[0.0] * 40, [1e-8]], ids=["no rate", "a tiny one"])
def test_what_a_rate_of_next_to_nothing_showed_is_no_line(first):
    """Scores that stay, and then grow: what was nearly one place was extrapolated over octaves."""
    generator, way = torch.Generator().manual_seed(0), 1.0
    tracker, normal = QuantileTracker(1, torch.device("cpu")), torch.distributions.Normal(0.0, 0.3)
    for step, moves in enumerate([*first, *[0.1] * 40]):
        tracker.add(
            counted(torch.exp(0.3 * torch.randn(200, generator=generator)).mul(way).tolist()),
            0.5,
            moves,
        )
        way += moves
        off = normal.cdf(tracker.quantile(0.5)[0] * math.log(2) - math.log(way)) - 0.5
        assert abs(off) < 0.2, step


def counted(*scores):
    """The counts of each series' scores, all of one sample; none where there are none."""
    counts = torch.stack([no_counts(torch.device("cpu")) for _ in scores])
    for own, each in zip(counts, scores, strict=True):
        if len(each):
            count_scores(own, torch.tensor([each]), None)
    return counts


def mixture(*steps, weights=(0.5, 0.5)):
    weights = torch.tensor(weights)
    tracker = QuantileTracker(len(weights), torch.device("cpu"), weights)
    for step in steps:
        tracker.add(counted(*step) * weights.unsqueeze(-1), 0.5)
    return tracker


@settings(max_examples=many(20))
@given(
    sizes=st.lists(st.floats(-30, 20), min_size=2, max_size=4),
    share=st.floats(0.02, 0.98),
    seed=st.integers(0, 99),
)
def test_what_does_not_change_is_told_as_it_is(sizes, share, seed):
    """However far apart the layers are, a mixture's quantile closes its share of what was seen."""
    drawn = torch.randn(len(sizes), 500, generator=torch.Generator().manual_seed(seed))
    scores = torch.exp2(torch.tensor(sizes).unsqueeze(-1) + drawn).tolist()
    weights = torch.arange(1.0, len(sizes) + 1)
    tracker = mixture(scores, scores, scores, weights=(weights / weights.sum()).tolist())
    [threshold] = tracker.quantile(share).exp2()
    below = [torch.tensor([score < threshold for score in own]).float().mean() for own in scores]
    assert (torch.stack(below) * weights).sum() / weights.sum() == pytest.approx(share, abs=0.02)
    assert tracker.share_below(threshold.log2().reshape(1)) == pytest.approx(share, abs=0.002)


def test_before_anything_is_known_nothing_is_closed():
    nothing = -math.inf
    assert mixture().quantile(0.5).item() == nothing
    assert mixture(([], [])).quantile(0.5).item() == nothing
    assert mixture(([0.0], [0.0])).quantile(0.5).item() == nothing
    assert mixture(([math.inf], [math.inf])).quantile(0.5).item() == nothing
    assert mixture(([1.0], [1.0])).quantile(0.0).item() == nothing


def test_zeros_and_what_never_closes_have_their_part_in_a_mixture():
    """And a layer that was never called has none."""
    half = [1.0, 1.1, 0.9, 1.05]
    # Of all a half is 0: the threshold that closes it, if more is asked the least of the others.
    zeros = mixture((half, [0.0] * 4))
    assert zeros.quantile(0.4).item() == pytest.approx(LOW)
    assert zeros.quantile(0.2).item() == -math.inf
    assert zeros.quantile(0.75).exp2().item() == pytest.approx(1.0, abs=0.1)
    infinite = mixture((half, [math.inf] * 4))
    assert infinite.quantile(0.25).exp2().item() == pytest.approx(1.0, abs=0.1)
    assert infinite.share_below(infinite.quantile(0.9)).item() == pytest.approx(0.5)
    absent = mixture((half, []))
    assert absent.quantile(0.5).exp2().item() == pytest.approx(1.0, abs=0.1)
    assert absent.share_below(absent.quantile(0.5)).item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("octaves", [-40, -24, 24, 40])
@pytest.mark.parametrize("weights", [None, torch.ones(1)], ids=["each", "a mixture"])
def test_what_is_far_from_the_line_is_closed_or_open_as_a_whole(octaves, weights):
    """Asked for a share within it: nothing was closed of what is far below, and all of what is far
    above."""
    near = torch.exp2(torch.randn(300, generator=torch.Generator().manual_seed(0)))
    far = near[:200] * 2.0**octaves
    tracker = QuantileTracker(1, torch.device("cpu"), weights)
    for _ in range(3):
        tracker.add(counted([*near.tolist(), *far.tolist()]), 0.5)
    threshold = tracker.quantile(0.3 if octaves < 0 else 0.7).exp2()
    lower, upper = (far, near) if octaves < 0 else (near, far)
    assert (lower < threshold).all()
    assert (upper > threshold).all()
