"""Medians, ratios and their intervals, from samples taken in rounds.

Neighbouring rounds resemble each other (clocks, temperature), so whole blocks of rounds are drawn:
a circular block bootstrap, block length ceil(n^(1/3)). For a median its percentiles alone are too
narrow: with AR(1) noise, phi = 0.3, a 99 % interval of 30 samples holds the truth 94 times of 100.
Two factors move them away from the median: Student's t over the normal quantile, for
n / length - 1 degrees of freedom (there are only that many separate blocks), and
sqrt(n / (n - length)), for what blocks lose of the variance. That makes it 98 of 100, from 10
samples to 120. All of it is on a log scale: times are positive, and the interval of a / b is the
reciprocal of the interval of b / a. The draws are seeded by n alone, so a file has one table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

RESAMPLES = 1000
# Fewer samples than this are not resampled: their interval is the smallest to the largest. From
# 8 on, that range itself holds the median 99 times of 100, so no interval reaches beyond it.
FEW = 8


class Interval(NamedTuple):
    """A median (or a ratio of two) and its interval; None where one sample is all there is."""

    median: float
    low: float | None
    high: float | None


class Ratio(NamedTuple):
    """median(a) / median(b) with its interval.

    Attributes:
        paired: whether common rounds were drawn together, so that what both went through cancels.
        rounds: samples behind it: the common rounds, or the fewer of the two sides' samples.
    """

    ratio: float
    low: float | None
    high: float | None
    paired: bool
    rounds: int


def median_interval(samples: Sequence[float], confidence: float = 0.99) -> Interval:
    """The median of samples in the order of their rounds, and its interval.

    From 2 to 7 samples the interval is the smallest to the largest, whatever the confidence.

    Raises:
        ValueError: no samples, or one that is not a positive number.
    """
    times = _times(samples)
    median = float(np.median(times))
    if len(times) == 1:
        return Interval(median, None, None)
    if len(times) < FEW:
        return Interval(median, float(times.min()), float(times.max()))
    low, high = (factor * median for factor in _bootstrap(confidence, times))
    return Interval(median, max(low, float(times.min())), min(high, float(times.max())))


def relative_width(samples: Sequence[float], confidence: float = 0.99) -> float:
    """Width of the median's interval over the median; infinite below 8 samples.

    For a stopping rule, which must not stop on the range of a handful of samples.
    """
    if len(samples) < FEW:
        return math.inf
    median, low, high = median_interval(samples, confidence)
    return (high - low) / median


def ratio_interval(
    a_by_round: Mapping[int, float], b_by_round: Mapping[int, float], confidence: float = 0.99
) -> Ratio:
    """median(a) / median(b) of samples by round, and its interval.

    Where at least 8 rounds are common, those alone are used and drawn together. Otherwise the
    two medians' intervals, each from all samples of its side, are combined as independent.

    Raises:
        ValueError: a side without samples, or a sample that is not a positive number.
    """
    common = sorted(a_by_round.keys() & b_by_round.keys())
    if len(common) < FEW:
        return _unpaired(_in_order(a_by_round), _in_order(b_by_round), confidence)
    a, b = (_times([side[r] for r in common]) for side in (a_by_round, b_by_round))
    ratio = float(np.median(a) / np.median(b))
    low, high = _bootstrap(confidence, a, b)
    return Ratio(ratio, low * ratio, high * ratio, True, len(common))


def _unpaired(a: list[float], b: list[float], confidence: float) -> Ratio:
    """Each end of log(a / b) is as far from the middle as the two sides' ends in quadrature."""
    a_interval, b_interval = median_interval(a, confidence), median_interval(b, confidence)
    ratio, rounds = a_interval.median / b_interval.median, min(len(a), len(b))
    if rounds == 1:
        return Ratio(ratio, None, None, False, rounds)
    (a_down, a_up), (b_down, b_up) = _reach(a_interval), _reach(b_interval)
    low, high = -math.hypot(a_down, b_up), math.hypot(a_up, b_down)
    return Ratio(ratio, ratio * math.exp(low), ratio * math.exp(high), False, rounds)


def _reach(interval: Interval) -> tuple[float, float]:
    """Distances from the median down to the low end and up to the high end, in logs."""
    median, low, high = (math.log(x) for x in interval)
    return median - low, high - median


def _bootstrap(
    confidence: float, a: np.ndarray, b: np.ndarray | None = None
) -> tuple[float, float]:
    """Ends of the interval as factors of median(a), or of median(a) / median(b).

    The rounds of a and b are drawn jointly.
    """
    medians, middle = _log_medians(a), math.log(np.median(a))
    if b is not None:
        medians, middle = medians - _log_medians(b), middle - math.log(np.median(b))
    ends = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = _widening(len(a), confidence) * (ends - middle)
    # All draws can lie on one side of the middle, where samples come in two heaps.
    return math.exp(min(low, 0.0)), math.exp(max(high, 0.0))


def _log_medians(times: np.ndarray) -> np.ndarray:
    """Of each resample. Sorts ranks: as int16 that is ten times faster than floats."""
    order = np.argsort(times)
    ranks = np.empty(len(times), np.int16 if len(times) < 1 << 15 else np.int64)
    ranks[order] = np.arange(len(times))
    drawn = np.sort(ranks[_draws(len(times))], axis=1)
    middle = drawn[:, [(len(times) - 1) // 2, len(times) // 2]]
    return np.log(times[order][middle].mean(axis=1))


def _block_length(n: int) -> int:
    return math.ceil(n ** (1 / 3))


@lru_cache(maxsize=8)
def _draws(n: int) -> np.ndarray:
    """Indices [RESAMPLES, n] of whole blocks, which wrap round from the last to the first."""
    length = _block_length(n)
    starts = np.random.default_rng(n).integers(0, n, (RESAMPLES, -(-n // length), 1))
    return ((starts + np.arange(length)) % n).reshape(RESAMPLES, -1)[:, :n]


@lru_cache(maxsize=64)
def _widening(n: int, confidence: float) -> float:
    length = _block_length(n)
    freedom = max(2.0, n / length - 1)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    # Student's t by its expansion in 1 / freedom (Abramowitz and Stegun 26.7.5).
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    t = z + sum(term / freedom**power for power, term in enumerate(terms, 1))
    return t / z * math.sqrt(n / (n - length))


def _in_order(by_round: Mapping[int, float]) -> list[float]:
    return [by_round[r] for r in sorted(by_round)]


def _times(samples: Sequence[float]) -> np.ndarray:
    times = np.asarray(samples, dtype=np.float64)
    if not len(times) or not np.all((times > 0) & np.isfinite(times)):
        raise ValueError(f"samples are {list(samples)!r}; one or more positive numbers are needed")
    return times
