"""Rows of samples, and what compare prints of them."""

import numpy as np
from rich.console import Console

from bench.compare import compare, sides
from tests.bench.rows import make_row
from tests.bench.test_stats import ar1


def timed(median: float = 100.0, noise: float = 0.001, seed: int = 1, n: int = 30, **changes):
    """A row of n samples about a median, in rounds of their own seed."""
    samples = median * np.exp(noise * ar1(1, n, 0.3, seed)[0])
    texts = {
        "samples_us": ";".join(f"{us:.6g}" for us in samples),
        "rounds": ";".join(map(str, range(n))),
        "median_us": float(np.median(samples)),
    }
    return make_row(**texts | changes)


def printed(*request, fail_slower=None, width=160):
    """Exit status and text of a comparison; a request is csv, other, method, against."""
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        status = compare(*sides(*request), fail_slower, console)
    return status, capture.get()


def words(text, *first):
    """Words of the one line of a table that begins with these."""
    found = [line.split() for line in text.splitlines() if line.split()[: len(first)] == [*first]]
    assert len(found) == 1, text
    return found[0]
