import dataclasses
import random

import numpy as np
import pytest

from bench.complexity import block_classes, complexity, count
from methods import METHODS, Banded, Method, Problem
from methods.bigbird import draw_blocks

# Small parameters, so that their patterns are whole at the lengths that are drawn.
SMALL = {
    "sliding_window": {"window": 9},
    "longformer": {"window": 8, "n_global": 2},
    "bigbird": {"block": 4, "n_random": 2},
}
SHORTEST = {"longformer": 2, "bigbird": 17}  # fewer tokens leave no room for these parameters


def width(n, heads, h):
    return n // heads + (1 if h < n % heads else 0)


def start(n, heads, h):
    return sum(width(n, heads, other) for other in range(h))


def drawn(n, heads, h, i, j):
    """Whether a random block of the row of i is that of j; the draws are the method's own."""
    blocks = draw_blocks(heads, -(-n // 4), 2, seed=0, causal=True)[h].numpy()
    return (blocks[i // 4] == j[..., None] // 4).any(-1)


def at_least_one(value, most):
    return max(1, min(value, most))


# Whether query i of head h sees key j <= i, by the papers' words and the released code's.
SEES = {
    "standard": lambda n, heads, h, i, j: i >= j,
    "sliding_window": lambda n, heads, h, i, j: i - j < 9,
    "local_only": lambda n, heads, h, i, j: i - j <= width(n, heads, h),
    "spattention": lambda n, heads, h, i, j: own_band(n, heads, h, i - j),
    "spattention_released": lambda n, heads, h, i, j: (
        (i - j <= width(n, heads, h)) | own_band(n, heads, h, i - j)
    ),
    "gapped_bands": lambda n, heads, h, i, j: (
        (i - j >= start(n, heads, h))
        & (i - j < start(n, heads, h) + width(n, heads, h) // 2)
    ),
    "longformer": lambda n, heads, h, i, j: (i - j <= 4) | (j < 2) | (i < 2),
    "bigbird": lambda n, heads, h, i, j: (
        (i // 4 - j // 4 <= 1) | (j < 4) | drawn(n, heads, h, i, j)
    ),
    "mehc_longformer": lambda n, heads, h, i, j: (
        (i - j <= at_least_one(n // 4, 256)) | (j < at_least_one(n // 32, 16))
    ),
    "mehc_bigbird": lambda n, heads, h, i, j: (
        (i - j <= at_least_one(n // 8, 128)) | (j < at_least_one(n // 64, 8))
        | ((i - j) % max(16, n // 32) == 0)
    ),
    "mehc_reformer": lambda n, heads, h, i, j: (
        same_or_next_bucket(n, h, i, j) | (i - j <= at_least_one(n // 4, 8))
    ),
}  # fmt: skip


def own_band(n, heads, h, distance):
    first = start(n, heads, h)
    return (distance >= first) & (distance < first + width(n, heads, h))


def same_or_next_bucket(n, h, i, j):
    buckets = max(2, n // at_least_one(n // 8, 64))
    of_query, of_key = ((3 * at + 13 * h + 7) % buckets for at in (i, j))
    apart = abs(of_query - of_key)
    return (apart <= 1) | (apart == buckets - 1)


def brute_force(name, n, heads):
    """bool [H, N, N]: every pair by SEES; the released stand-ins are plain up to four tokens."""
    i, j = np.mgrid[:n, :n]
    sees = SEES["standard" if name.startswith("mehc_") and n <= 4 else name]
    return np.stack([(j <= i) & sees(n, heads, h, i, j) for h in range(heads)])


def sizes():
    """Fifty (N, H): most short, with every remainder; some beyond what the released code caps."""
    drawn = random.Random(12)
    return [(drawn.randint(1, 70 if k % 8 else 1200), drawn.randint(1, 16)) for k in range(50)]


def test_every_counted_preset_is_counted_by_brute_force():
    assert set(SEES) == {name for name, method in METHODS.items() if method.static}
    assert max(n for n, _ in sizes()) > 1024 and len(set(sizes())) == 50


@pytest.mark.parametrize("name", SEES)
def test_counts_are_those_of_brute_force_for_fifty_sizes(name):
    method = dataclasses.replace(METHODS[name], **SMALL.get(name, {}))
    for n, heads in sizes():
        n = max(n, SHORTEST.get(name, 1))
        p = Problem(seq_len=n, q_heads=heads)
        line, allowed = count(method, p, (16, 8)), brute_force(name, n, heads)
        padded = np.zeros((heads, -(-n // 16) * 16, -(-n // 8) * 8), dtype=bool)
        padded[:, :n, :n] = allowed
        blocks = padded.reshape(heads, -(-n // 16), 16, -(-n // 8), 8)
        watchers = allowed.sum(0)
        assert line.allowed_by_head == allowed.sum((1, 2)).tolist(), (n, heads)
        assert line.allowed_pairs == allowed.sum() == method.allowed_pairs(p)
        assert line.computed_by_head == (blocks.any((2, 4)).sum((1, 2)) * 128).tolist()
        assert line.computed_pairs == sum(line.computed_by_head)
        assert (line.seen_pairs, line.seen_once) == ((watchers > 0).sum(), (watchers == 1).sum())
        assert line.empty_rows == (~allowed.any(2)).sum()
        assert line.causal_pairs == n * (n + 1) // 2


@pytest.mark.parametrize("n, heads", sizes())
def test_equations_5_to_8_hold_for_the_bands(n, heads):
    line = count(METHODS["spattention"], Problem(seq_len=n, q_heads=heads))
    assert line.seen_pairs == line.seen_once == line.allowed_pairs == line.causal_pairs
    assert count(METHODS["standard"], Problem(seq_len=n, q_heads=heads)).allowed_pairs == (
        heads * line.allowed_pairs
    )


def test_golden_counts():
    p = Problem(seq_len=1024, q_heads=8)
    expected = {
        "standard": (4198400, 64 + 224), "spattention": (524800, 64),
        "spattention_released": (1391680, 155 + 7), "local_only": (990720, 120),
        "gapped_bands": (278784, 64),
    }  # fmt: skip
    for name, (allowed, blocks) in expected.items():
        line = count(METHODS[name], p)
        assert (line.allowed_pairs, line.computed_pairs) == (allowed, blocks * 128 * 128)
    classes = block_classes(METHODS["spattention_released"], p)
    assert classes.shape == (8, 8, 8)
    assert [int((classes == value).sum()) for value in (1, 2)] == [155, 7]
    assert (classes[1].diagonal(-1) == 2).all()


def test_long_sequences_are_counted_in_strips():
    p = Problem(seq_len=1500, q_heads=16)
    line = count(METHODS["spattention_released"], p)
    assert line.allowed_pairs == METHODS["spattention_released"].allowed_pairs(p)
    assert line.seen_pairs == line.causal_pairs


def test_a_mask_that_all_heads_share_counts_for_each():
    @dataclasses.dataclass(frozen=True)
    class Far(Banded):
        name, paper = "far", "none"

        def bands(self, p):
            return [[(10, 20)]]

    line = count(Far(), Problem(seq_len=40, q_heads=3))
    one = sum(10 <= i - j <= 20 for i in range(40) for j in range(40))
    assert (line.allowed_pairs, line.allowed_by_head) == (3 * one, [one] * 3)
    assert (line.empty_rows, line.seen_pairs, line.seen_once) == (3 * 10, one, 0)


def test_what_cannot_be_counted_says_why():
    class FollowsItsInputs(Method):
        name, paper = "follows", "none"

        def prepare(self, q, k, p):
            return q

    dataclass = dataclasses.dataclass(frozen=True)(FollowsItsInputs)
    lines = complexity((METHODS["standard"], METHODS["bigbird"], dataclass()), [(64, 2), (512, 2)])
    reasons = {(c.method, c.seq_len): c.reason for c in lines}
    assert reasons["standard", 64] is reasons["bigbird", 512] is None
    assert "n_random" in reasons["bigbird", 64]
    assert reasons["follows", 512] == "its pairs depend on the inputs"
    assert [c.allowed_pairs is None for c in lines] == [c.reason is not None for c in lines]
