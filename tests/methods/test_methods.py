"""Problems and the banded methods, against predicates written down pair by pair."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from methods import METHODS, Method, Problem
from methods.banded import Banded, shared_window
from tests.methods.dense import STATIC

CPU = torch.device("cpu")
HEADS = (1, 2, 3, 8, 16)
LENGTHS = (*range(1, 71), 101, 129)
SHORT_WINDOW = dataclasses.replace(METHODS["sliding_window"], window=5)

Predicate = Callable[[int, int, int, int], bool]  # (tokens, heads, head, distance)


def start_and_width(tokens: int, heads: int, head: int) -> tuple[int, int]:
    """Equations 2 and 3: the tokens are dealt out evenly, the first heads take one more."""
    widths = [tokens // heads + (1 if h < tokens % heads else 0) for h in range(heads)]
    return sum(widths[:head]), widths[head]


def own_band(tokens: int, heads: int, head: int, distance: int) -> bool:
    """Equation 4."""
    start, width = start_and_width(tokens, heads, head)
    return start <= distance < start + width


def local_band(tokens: int, heads: int, head: int, distance: int) -> bool:
    _, width = start_and_width(tokens, heads, head)
    return distance <= width


def first_half(tokens: int, heads: int, head: int, distance: int) -> bool:
    start, width = start_and_width(tokens, heads, head)
    return start <= distance < start + width // 2


# What a method sees at a distance that is not negative.
PREDICATES: list[tuple[Method, Predicate]] = [
    (METHODS["standard"], lambda n, heads, h, d: True),
    (METHODS["sliding_window"], lambda n, heads, h, d: d < 512),
    (SHORT_WINDOW, lambda n, heads, h, d: d < 5),
    (METHODS["spattention"], own_band),
    (METHODS["spattention_released"], lambda *x: local_band(*x) or own_band(*x)),
    (METHODS["gapped_bands"], first_half),
    (METHODS["local_only"], local_band),
]
each_method = pytest.mark.parametrize(
    ("method", "predicate"), PREDICATES, ids=[str(method) for method, _ in PREDICATES]
)


def dense(method: Method, p: Problem) -> Tensor:
    """What a method allows, bool [H, N, N], by its mask_mod."""
    positions, heads = torch.arange(p.seq_len), torch.arange(p.q_heads)
    mask = method.mask_mod(p, CPU)
    allowed = mask(torch.tensor(0), heads[:, None, None], positions[:, None], positions[None, :])
    return allowed.expand(p.q_heads, p.seq_len, p.seq_len)


def by_loops(predicate: Predicate, p: Problem) -> Tensor:
    """The same, pair by pair."""
    n, heads = p.seq_len, p.q_heads
    return torch.tensor(
        [
            [[(i >= j or not p.causal) and seen[abs(i - j)] for j in range(n)] for i in range(n)]
            for seen in [[predicate(n, heads, h, d) for d in range(n)] for h in range(heads)]
        ]
    )


def problems() -> list[Problem]:
    return [
        Problem(seq_len=n, q_heads=heads, causal=causal)
        for n in LENGTHS
        for heads in HEADS
        for causal in (True, False)
    ]


@each_method
def test_masks_and_pair_counts(method: Method, predicate: Predicate) -> None:
    for p in problems():
        expected = by_loops(predicate, p)
        assert torch.equal(dense(method, p), expected), p
        pairs = int(expected.sum())
        assert method.allowed_pairs(p) == pairs, p
        if p.seq_len > 60:
            assert Method.allowed_pairs(method, p) == pairs, p  # by evaluating the mask


def test_wide_sliding_window() -> None:
    method, p = METHODS["sliding_window"], Problem(seq_len=600, q_heads=2)
    assert torch.equal(dense(method, p)[0], by_loops(lambda n, heads, h, d: d < 512, p)[0])


def test_every_causal_pair_belongs_to_one_head() -> None:
    for n in LENGTHS:
        for heads in HEADS:
            p = Problem(seq_len=n, q_heads=heads)
            in_heads = dense(METHODS["spattention"], p).sum(0)
            assert torch.equal(in_heads, torch.ones(n, n, dtype=torch.int64).tril())
            assert METHODS["spattention"].allowed_pairs(p) == n * (n + 1) // 2


def empty_rows(name: str, n: int, heads: int) -> set[tuple[int, int]]:
    """(head, query) pairs that see no key: those before the head's band, or all without one."""
    if name not in ("spattention", "gapped_bands"):
        return set()
    empty = set()
    for h in range(heads):
        start, width = start_and_width(n, heads, h)
        seen = width // 2 if name == "gapped_bands" else width
        empty |= {(h, i) for i in range(n) if i < start or seen == 0}
    return empty


@pytest.mark.parametrize(
    "name", [method.name for method, _ in PREDICATES if method is not SHORT_WINDOW]
)
def test_empty_rows(name: str) -> None:
    for n in LENGTHS:
        for heads in HEADS:
            allowed = dense(METHODS[name], Problem(seq_len=n, q_heads=heads))
            found = {tuple(x) for x in (~allowed.any(-1)).nonzero().tolist()}
            assert found == empty_rows(name, n, heads), (n, heads)


def attention(method: Method, p: Problem, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense float64 attention [H, N, D] by the rows that a method gives to the gate."""
    index = torch.arange(p.seq_len).expand(p.q_heads, -1)
    scores = q @ k.transpose(-1, -2) / p.head_dim**0.5 + method.rows(p, CPU, index)[0]
    return torch.softmax(scores, -1).nan_to_num() @ v  # a row without a key is 0


@pytest.mark.parametrize("name", STATIC)
def test_the_past_does_not_see_the_future(name: str) -> None:
    p = Problem(seq_len=45, q_heads=4, head_dim=16)
    random_numbers = torch.Generator().manual_seed(3)
    inputs = torch.randn(
        3, p.q_heads, p.seq_len, p.head_dim, dtype=torch.float64, generator=random_numbers
    )
    before = attention(METHODS[name], p, *inputs)
    assert before.abs().sum() > 0
    for first in (1, 17, 44):  # at fixed N: the bands depend on it
        changed = inputs.clone()
        changed[:, :, first:] += 1
        after = attention(METHODS[name], p, *changed)
        assert torch.equal(after[:, :first], before[:, :first])
        assert not torch.equal(after[:, first:], before[:, first:])


@dataclasses.dataclass(frozen=True)
class Slope(type(METHODS["spattention"])):
    """SPAttention with a bias by distance, and by the sequence of the batch."""

    def score_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return lambda score, b, h, q, k: score - (b + 1) * (q - k) / (h + 2)


@pytest.mark.parametrize("method", [*(METHODS[name] for name in STATIC), Slope()], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_rows_are_rows_of_the_mask(method: Method, causal: bool) -> None:
    p = Problem(batch=2, seq_len=57, q_heads=6, kv_heads=2, causal=causal)
    draw = random.Random(4)
    index = torch.tensor([draw.sample(range(57), 9) for _ in range(6)])
    rows = method.rows(p, CPU, index)
    assert rows.dtype == torch.float64
    assert rows.shape in ((1, 6, 9, 57), (2, 6, 9, 57))
    allowed = dense(method, p)
    for b in range(len(rows)):
        for h in range(6):
            for r, i in enumerate(index[h].tolist()):
                bias = torch.zeros(57, dtype=torch.float64)
                if isinstance(method, Slope):
                    bias -= (b + 1) * (i - torch.arange(57)) / (h + 2)
                expected = torch.where(allowed[h, i], bias, -torch.inf)
                torch.testing.assert_close(rows[b, h, r], expected, rtol=0, atol=1e-5)
    assert len(rows) == (2 if isinstance(method, Slope) else 1)


def test_presets_are_hashable_values() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert method.paper
        assert hash(method) == hash(dataclasses.replace(method))
        assert method == dataclasses.replace(method)
    assert METHODS["sliding_window"] != SHORT_WINDOW


@dataclasses.dataclass(frozen=True)
class GivenBands(Banded):
    name = "given_bands"
    paper = "none"
    given: tuple[tuple[tuple[int, int], ...], ...] = ()

    def bands(self, p: Problem) -> Sequence[Sequence[tuple[int, int]]]:
        return self.given


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "bands",
    [
        ((0, 3), (4, 9)),  # adjacent
        ((7, 20), (0, 8)),  # overlapping, out of order
        ((0, 30), (3, 4)),  # one inside another
        ((2, 2), (5, 5), (1000, 2000)),  # beyond the sequence
        ((5, 4), (-3, 1)),  # empty, and below zero
        (),
    ],
)
def test_bands_are_merged(bands: tuple[tuple[int, int], ...], causal: bool) -> None:
    p = Problem(seq_len=50, q_heads=2, causal=causal)
    method = GivenBands(given=(bands, ((0, 0),)))
    expected = by_loops(lambda n, heads, h, d: any(x <= d <= y for x, y in method.given[h]), p)
    assert torch.equal(dense(method, p), expected)
    assert method.allowed_pairs(p) == int(expected.sum())


@pytest.mark.parametrize(
    ("bands", "reach"),
    [
        ((((0, 5), (6, 9)),), 9),  # adjacent
        ((((3, 9), (0, 4)), ((0, 9),)), 9),  # alike once they are merged
        ((((-2, 7),),), 7),
        ((((0, 1000),),), 49),  # clipped to the tokens there are
        ((((0, 3), (5, 9)),), None),
        ((((1, 9),),), None),
        ((((0, 9),), ((0, 8),)), None),
        (((),), None),
    ],
)
def test_a_window_that_all_heads_share(bands: tuple, reach: int | None) -> None:
    p = Problem(seq_len=50, q_heads=2)
    assert shared_window(GivenBands(given=bands), p) == reach


def test_a_window_with_global_tokens_or_without_bands_is_none() -> None:
    p = Problem(seq_len=600, q_heads=2)
    assert shared_window(METHODS["sliding_window"], p) == 511
    assert shared_window(dataclasses.replace(METHODS["longformer"], n_global=0), p) == 256
    assert shared_window(METHODS["longformer"], p) is None
    assert shared_window(METHODS["bigbird"], p) is None


def test_bands_of_the_wrong_number_of_heads() -> None:
    method = GivenBands(given=(((0, 1),),) * 3)
    with pytest.raises(ValueError, match=r"given_bands gives bands for 3 heads; 8 .* needed"):
        method.allowed_pairs(Problem(q_heads=8))


@pytest.mark.parametrize("window", [0, -1, 2.5, True, "512", None])
def test_bad_window(window: object) -> None:
    with pytest.raises(ValueError) as error:
        dataclasses.replace(METHODS["sliding_window"], window=window)
    assert str(error.value) == (
        f"sliding_window: window is {window!r}; it must be a whole number above 0"
    )


def test_problem_defaults() -> None:
    p = Problem(q_heads=12)
    assert (p.kv_heads, p.group, p.batch, p.causal) == (12, 1, 1, True)
    assert Problem(q_heads=12, kv_heads=3).group == 4
    assert p == Problem(q_heads=12, kv_heads=12)
    assert hash(p) == hash(Problem(q_heads=12, kv_heads=12))
    assert Problem(dtype="float16").torch_dtype == torch.float16


def test_other_heads_of_a_problem_keep_its_key_heads() -> None:
    p = Problem(q_heads=8)
    assert dataclasses.replace(p, q_heads=16).kv_heads == 8
    assert dataclasses.replace(p, q_heads=16, kv_heads=None) == Problem(q_heads=16)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((field, value) for field in ("batch", "q_heads", "kv_heads", "seq_len", "head_dim")
          for value in (0, -1, 1.0, True, "8", 1 << 60)),
        ("head_dim", 15),
        ("head_dim", 1025),
        ("seq_len", (1 << 24) + 1),
    ],
)  # fmt: skip
def test_numbers_out_of_range(field: str, value: object) -> None:
    with pytest.raises(ValueError) as error:
        Problem(**{field: value})
    pattern = rf"{field} is {re.escape(repr(value))}; it must be a whole number, \d+ to \d+"
    assert re.fullmatch(pattern, str(error.value))


@pytest.mark.parametrize("field", ["batch", "q_heads", "seq_len", "head_dim"])
def test_a_number_may_not_be_missing(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is None; it must be a whole number"):
        Problem(**{field: None})


def test_heads_that_do_not_divide() -> None:
    with pytest.raises(ValueError) as error:
        Problem(q_heads=8, kv_heads=3)
    assert str(error.value) == "q_heads 8 is not a multiple of kv_heads 3"


@pytest.mark.parametrize("dtype", ["fp8", "", torch.float32, None])
def test_unknown_dtype(dtype: object) -> None:
    with pytest.raises(ValueError) as error:
        Problem(dtype=dtype)
    assert str(error.value) == (
        f"dtype is {dtype!r}; it must be one of bfloat16, float16, float32, float64"
    )
