import dataclasses
import random

import numpy as np
import pytest

from bench.complexity import block_classes, complexity, count
from methods import METHODS, Banded, Method, Problem

EQUATIONS = {
    "standard": lambda n, h, i, j: True,
    "sliding_window": lambda n, h, i, j: i - j < 512,
    "local_only": lambda n, h, i, j: i - j <= width(n, *h),
    "spattention": lambda n, h, i, j: start(n, *h) <= i - j < start(n, *h) + width(n, *h),
    "spattention_released": lambda n, h, i, j: (
        i - j <= width(n, *h) or start(n, *h) <= i - j < start(n, *h) + width(n, *h)
    ),
    "gapped_bands": lambda n, h, i, j: start(n, *h) <= i - j < start(n, *h) + width(n, *h) // 2,
}


def width(n, head, heads):
    return n // heads + (1 if head < n % heads else 0)


def start(n, head, heads):
    return sum(width(n, h, heads) for h in range(head))


def brute_force(name, n, heads):
    """bool [H, N, N], one pair at a time."""
    allowed = np.zeros((heads, n, n), dtype=bool)
    for h in range(heads):
        for i in range(n):
            for j in range(i + 1):
                allowed[h, i, j] = EQUATIONS[name](n, (h, heads), i, j)
    return allowed


def sizes():
    drawn = random.Random(0)
    return [(drawn.randint(1, 70), drawn.randint(1, 16)) for _ in range(50)]


@pytest.mark.parametrize("name", EQUATIONS)
def test_counts_are_those_of_brute_force_for_fifty_sizes(name):
    for n, heads in sizes()[: 50 if "spattention" in name else 12]:
        p = Problem(seq_len=n, q_heads=heads)
        line, allowed = count(METHODS[name], p, (16, 8)), brute_force(name, n, heads)
        padded = np.zeros((heads, -(-n // 16) * 16, -(-n // 8) * 8), dtype=bool)
        padded[:, :n, :n] = allowed
        blocks = padded.reshape(heads, -(-n // 16), 16, -(-n // 8), 8)
        watchers = allowed.sum(0)
        assert line.allowed_by_head == allowed.sum((1, 2)).tolist(), (n, heads)
        assert line.allowed_pairs == allowed.sum() == METHODS[name].allowed_pairs(p)
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
