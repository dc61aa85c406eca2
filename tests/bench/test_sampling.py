"""When a sample counts, and when there are enough."""

import numpy as np
import pytest

from bench.chip import Reading, summary
from bench.sampling import sample_rounds
from bench.stats import median_interval

CALM = Reading(1980, 600.0, 50, ())
CAPPED = Reading(1700, 700.0, 60, ("power cap",))
HOT = Reading(1200, 500.0, 90, ("thermal",))


def noisy(width, seed=0):
    rng = np.random.default_rng(seed)
    return lambda: float(100 * np.exp(width * rng.standard_normal()))


def test_sampling_goes_on_until_every_median_is_known():
    quiet, loud = (
        sample_rounds({"steady": noisy(1e-4), "noisy": noisy(width)}, rounds=30, seconds=60)
        for width in (1e-4, 0.02)
    )
    assert [len(x.samples) for x in quiet.values()] == [30, 30]
    assert 60 < len(loud["noisy"].samples) < 2000
    assert len(loud["steady"].samples) == len(loud["noisy"].samples)
    assert loud["noisy"].settled


def test_time_ends_it_but_not_before_its_rounds():
    for rounds in (30, 3):
        series = sample_rounds({"noisy": noisy(0.5)}, rounds=rounds, seconds=0.0)["noisy"]
        assert [number for number, _ in series.samples] == list(range(rounds))
    assert sample_rounds({}, rounds=30, seconds=60) == {}


@pytest.mark.parametrize("width", [0.01, 0.02])
def test_the_rule_keeps_the_coverage_of_the_interval(width):
    """Stopping once the interval is narrow must not make it too narrow, with AR(1) noise."""
    rng, held = np.random.default_rng(5), []
    for _ in range(150):
        series = sample_rounds({"x": drifting(rng, width)}, rounds=30, seconds=60)["x"]
        interval = median_interval([us for _, us in series.samples])
        held.append(interval.low <= 100 <= interval.high)
    assert np.mean(held) >= 0.95


def drifting(rng, width, memory=0.3):
    """Samples about 100 whose neighbours resemble each other."""
    state = 0.0

    def sample():
        nonlocal state
        state = memory * state + width * np.sqrt(1 - memory**2) * rng.standard_normal()
        return float(100 * np.exp(state))

    return sample


def test_samples_of_a_slowed_chip_do_not_count():
    readings = iter([CALM, HOT, CAPPED, HOT, CALM] * 2)
    series = sample_rounds(
        {"x": noisy(0.01)}, rounds=5, seconds=0.0, read_chip=lambda: next(readings)
    )["x"]
    assert series.discarded == 2
    assert [number for number, _ in series.samples] == [0, 2, 4]
    assert series.readings == [CALM, CAPPED, CALM]


def test_a_row_says_what_the_chip_was_like():
    assert summary([CALM, CAPPED, CAPPED]) == {
        "sm_mhz": 1700, "power_w": 700.0, "celsius": 60, "throttled": "power cap 2/3",
    }  # fmt: skip
    assert set(summary([]).values()) == {None}
    assert summary([Reading(None, None, None, ())])["sm_mhz"] is None
