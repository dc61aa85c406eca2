"""Samples in interleaved rounds: when one counts, and when there are enough."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from bench import chip, stats, timing

PRECISION = 0.01  # width of a median's 99 % interval that is narrow enough, over the median
# Looked at every round, an interval would be caught while it is narrow by chance: at rounds that
# grow by this factor it holds the truth 97 times of 100 in simulation, as it does unstopped.
NEXT_LOOK = 1.25


@dataclass
class Series:
    """The samples of one cell, phase and clock.

    Attributes:
        samples: (round, microseconds) of those that count.
        readings: of the chip, right after each of these.
        discarded: how many were taken while the chip was slowed down from outside.
    """

    samples: list[tuple[int, float]] = field(default_factory=list)
    readings: list[chip.Reading] = field(default_factory=list)
    discarded: int = 0

    @property
    def median(self) -> float | None:
        """Microseconds; None where no sample counts."""
        return statistics.median(us for _, us in self.samples) if self.samples else None

    @property
    def settled(self) -> bool:
        """Whether the median is known well enough."""
        return stats.relative_width([us for _, us in self.samples]) < PRECISION

    def keep(self, number: int, microseconds: float, reading: chip.Reading | None) -> None:
        """Takes one sample in, unless the chip was slowed down."""
        if reading is not None and reading.slowed:
            self.discarded += 1
            return
        self.samples.append((number, microseconds))
        if reading is not None:
            self.readings.append(reading)


def sample_rounds(
    samplers: Mapping[Hashable, timing.Sampler],
    *,
    rounds: int,
    seconds: float,
    seed: int = 0,
    read_chip: chip.Reader = lambda: None,
    announce: Callable[[Hashable], None] = lambda key: None,
) -> dict[Hashable, Series]:
    """Takes every sample once a round, in a new order each, until all is known well enough.

    Args:
        rounds: are taken however long they last.
        seconds: further ones end here, or before it once every median is known to PRECISION.
        announce: told of each key before its sample is taken.
    """
    series = {key: Series() for key in samplers}
    order, keys = random.Random(seed), list(samplers)
    start, number, look = time.perf_counter(), 0, rounds
    while keys and (number < rounds or time.perf_counter() - start < seconds):
        if number == look:
            if all(x.settled for x in series.values()):
                break
            look = math.ceil(NEXT_LOOK * look)
        for key in order.sample(keys, len(keys)):
            announce(key)
            microseconds = samplers[key]()
            series[key].keep(number, microseconds, read_chip())
        number += 1
    return series
