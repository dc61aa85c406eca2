import math

import numpy as np
import pytest

from bench.stats import median_interval, ratio_interval, relative_width


def ar1(series: int, length: int, phi: float, seed: int) -> np.ndarray:
    """Noise [series, length] of unit variance whose neighbours correlate by phi."""
    random = np.random.default_rng(seed)
    noise = random.standard_normal((series, length))
    for step in range(1, length):
        noise[:, step] = phi * noise[:, step - 1] + math.sqrt(1 - phi**2) * noise[:, step]
    return noise


def holds(truth: float, interval) -> bool:
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("length", [10, 30, 100])
@pytest.mark.parametrize("phi", [0.0, 0.3])
def test_interval_of_a_median_covers_the_truth(length, phi):
    times = 100 * np.exp(0.02 * ar1(1000, length, phi, seed=length))
    covered = np.mean([holds(100, median_interval(series)) for series in times])
    assert covered >= 0.97  # 990 expected of a perfect interval
    narrow = np.mean([holds(100, median_interval(series, 0.5)) for series in times])
    assert 0.40 <= narrow <= 0.75  # an interval that covers everything would tell nothing


def test_interval_shrinks_with_samples():
    widths = [relative_width(np.exp(0.02 * ar1(1, n, 0.3, seed=1)[0])) for n in (20, 80, 320)]
    assert widths[0] > 1.5 * widths[1] > 2.25 * widths[2]


def test_stopping_at_one_percent_keeps_the_coverage():
    covered = []
    for series in np.exp(0.007 * ar1(200, 80, 0.3, seed=3)):
        rounds = next((n for n in range(30, 80) if relative_width(series[:n]) < 0.01), 80)
        covered.append(holds(1.0, median_interval(series[:rounds])))
    assert np.mean(covered) >= 0.95


def test_same_samples_same_interval():
    samples = list(np.exp(0.1 * ar1(1, 31, 0.3, seed=4)[0]))
    assert median_interval(samples) == median_interval(list(samples))
    assert median_interval(samples).median == pytest.approx(np.median(samples))


def test_scale_of_the_samples_is_the_scale_of_the_interval():
    samples = np.exp(0.1 * ar1(1, 30, 0.3, seed=5)[0])
    assert median_interval(1000 * samples) == pytest.approx(
        tuple(1000 * x for x in median_interval(samples))
    )


def test_few_samples_give_their_range():
    assert median_interval([7.0]) == (pytest.approx(7.0), None, None)
    assert median_interval([9.0, 4.0]) == pytest.approx((6.5, 4.0, 9.0))
    assert median_interval([5.0, 1.0, 3.0]) == pytest.approx((3.0, 1.0, 5.0))
    assert [relative_width([1.0] * n) for n in (1, 7)] == [math.inf, math.inf]
    assert relative_width([1.0] * 8) == 0


def test_interval_holds_its_median_and_ignores_an_outlier():
    samples = [10.0] * 29 + [1000.0]
    assert median_interval(samples) == pytest.approx((10.0, 10.0, 10.0))
    median, low, high = median_interval([1, 1, 1, 1, 1, 50, 50, 50, 50, 50, 50])
    assert low <= median <= high


@pytest.mark.parametrize("samples", [[], [1.0, 0.0], [1.0, math.nan], [1.0, math.inf]])
def test_samples_that_are_no_times_are_refused(samples):
    with pytest.raises(ValueError, match="positive numbers are needed"):
        median_interval(samples)


def test_pairing_cancels_what_both_went_through():
    shared, a, b = ar1(3, 40, 0.3, seed=6)
    left = dict(enumerate(2 * np.exp(0.05 * shared + 0.002 * a)))
    right = dict(enumerate(np.exp(0.05 * shared + 0.002 * b)))
    paired = ratio_interval(left, right)
    elsewhere = ratio_interval(left, {k + 100: v for k, v in right.items()})
    assert paired.paired and paired.rounds == 40
    assert not elsewhere.paired
    assert paired.high - paired.low < 0.5 * (elsewhere.high - elsewhere.low)
    assert paired.ratio == pytest.approx(2, rel=0.01)


def test_ratio_and_its_reciprocal_agree():
    a, b = np.exp(0.05 * ar1(2, 30, 0.3, seed=7))
    for shift in (0, 100):
        left, right = dict(enumerate(a)), {k + shift: v for k, v in enumerate(b)}
        there, back = ratio_interval(left, right), ratio_interval(right, left)
        assert there.ratio == pytest.approx(1 / back.ratio)
        assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low), rel=0.005)


@pytest.mark.parametrize("shift", [0, 1000])
def test_interval_of_a_ratio_covers_the_truth(shift):
    noise = ar1(1000, 30, 0.3, seed=8)
    covered = []
    for a, b in zip(np.exp(0.02 * noise[::2]), 4 * np.exp(0.02 * noise[1::2]), strict=True):
        ratio = ratio_interval(dict(enumerate(a)), {k + shift: v for k, v in enumerate(b)})
        covered.append(holds(0.25, ratio))
    assert np.mean(covered) >= 0.97


def test_common_rounds_alone_are_paired():
    left = dict.fromkeys(range(10), 6.0)
    right = dict.fromkeys(range(1, 20), 2.0) | {50: 900.0, 51: 900.0}
    ratio = ratio_interval(left, right)
    assert (ratio.ratio, ratio.rounds, ratio.paired) == (pytest.approx(3.0), 9, True)
    few = ratio_interval(left, dict.fromkeys(range(6, 10), 2.0))
    assert (few.rounds, few.paired) == (4, False)


def test_ratio_of_single_samples_has_no_interval():
    assert ratio_interval({0: 6.0}, {0: 2.0}) == (pytest.approx(3.0), None, None, False, 1)
    with pytest.raises(ValueError, match="positive numbers"):
        ratio_interval({}, {0: 2.0})


def test_ratio_with_one_single_sample_has_no_interval():
    assert ratio_interval({0: 6.0}, {0: 2.0, 1: 3.0}).low is None
