"""The stand-ins against their released predicates, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from methods import Method, Problem
from methods.blockwise import blockwise
from methods.longformer import Longformer
from methods.mehc import MehcBigBird, MehcLongformer, MehcReformer
from tests.methods.dense import CPU, assert_lists_equal, attention, both_masks, dense_mask

METHODS = (MehcLongformer(), MehcBigBird(), MehcReformer())
LENGTHS = (*range(1, 71), 99, 127, 128, 129, 255, 256, 257, 511, 512, 1000, 1024, 1100)
BLOCK_SIZES = ((16, 16), (16, 64), (64, 32), (128, 128))


def problem(seq_len: int, heads: int = 2) -> Problem:
    return Problem(q_heads=heads, seq_len=seq_len, head_dim=16, dtype="float64")


# The predicates with the names and in the order of operations of the released code.


def longformer(n: int, h: int, i: Tensor, j: Tensor) -> Tensor:
    window_size, num_global = max(1, min(256, n // 4)), max(1, min(16, max(1, n // 32)))
    return (i - j <= window_size) | (i < num_global) | (j < num_global)


def bigbird(n: int, h: int, i: Tensor, j: Tensor) -> Tensor:
    window_size = max(1, min(128, max(1, n // 8)))
    num_global = max(1, min(8, max(1, n // 64)))
    stride = max(16, n // 32)
    strided = ((i - j) % stride == 0) & (i - j > window_size)
    return (i - j <= window_size) | (i < num_global) | (j < num_global) | strided


def reformer(n: int, h: int, i: Tensor, j: Tensor) -> Tensor:
    bucket_size = max(1, min(64, max(1, n // 8)))
    num_buckets = max(2, n // bucket_size)
    bucket_i, bucket_j = ((x * 3 + h * 13 + 7) % num_buckets for x in (i, j))
    adjacent = (bucket_i - bucket_j).abs() <= 1
    if num_buckets > 2:
        adjacent |= (bucket_i == 0) & (bucket_j == num_buckets - 1)
        adjacent |= (bucket_i == num_buckets - 1) & (bucket_j == 0)
    return adjacent | (i - j <= max(1, min(8, n // 4)))


RELEASED = (longformer, bigbird, reformer)
PAIRS = tuple(zip(METHODS, RELEASED, strict=True))


@pytest.mark.parametrize(("method", "released"), PAIRS)
def test_mask_is_the_released_predicate(method: Method, released: Callable[..., Tensor]) -> None:
    for n in LENGTHS:
        i, j = torch.arange(n)[:, None], torch.arange(n)
        mask = dense_mask(method, problem(n, heads=3))[0]
        for h in range(3):
            expected = (j <= i) & (released(n, h, i, j) if n > 4 else True)
            assert torch.equal(mask[h], expected), n


@pytest.mark.parametrize("method", METHODS)
def test_lists_and_pairs(method: Method) -> None:
    for n in (1, 4, 5, 63, 130, 300, 1000):
        p = problem(n)
        assert method.allowed_pairs(p) == int(dense_mask(method, p).sum())
        for block_size in BLOCK_SIZES:
            assert_lists_equal(method, p, block_size)


@pytest.mark.parametrize(
    ("method", "at_1024", "at_1000"),
    [
        (METHODS[0], 242_424, 231_489),
        (METHODS[1], 142_852, 136_807),
        (METHODS[2], 105_953, 107_469),
    ],
)
def test_known_pairs(method: Method, at_1024: int, at_1000: int) -> None:
    assert method.allowed_pairs(problem(1024, heads=1)) == at_1024
    assert method.allowed_pairs(problem(1000, heads=4)) == 4 * at_1000


@pytest.mark.parametrize(
    ("method", "touched", "full"), [(METHODS[0], 26, 7), (METHODS[1], 36, 0), (METHODS[2], 36, 0)]
)
def test_blocks_of_128(method: Method, touched: int, full: int) -> None:
    """Of 36 causal blocks at N = 1024; two of the three can skip none."""
    p = problem(1024, heads=1)
    mask, _ = both_masks(method, p, (128, 128))
    assert int(mask.full_kv_num_blocks.sum()) == full
    assert int(mask.kv_num_blocks.sum()) == touched - full


def test_stand_in_for_longformer_is_one_of_its_masks() -> None:
    for n in (1024, 1500):
        p = problem(n)
        assert torch.equal(dense_mask(MehcLongformer(), p), dense_mask(Longformer(512, 16), p))


@pytest.mark.parametrize("method", METHODS)
def test_numbers_and_causality(method: Method) -> None:
    p, cut = problem(300), 150
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 2, 300, 16)
    first, second = (torch.randn(shape, generator=generator).double() for _ in range(2))
    changed = torch.cat((first[..., :cut, :], second[..., cut:, :]), -2)

    def run(qkv: Tensor) -> Tensor:
        layout = method.layout(*qkv, p)
        return blockwise(layout.q, layout.k, layout.v, layout.block_mask)[0]

    before, after = run(first), run(changed)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])
    bias = method.rows(p, CPU, torch.arange(300).expand(2, -1))
    assert (before - attention(*first, bias)).abs().max() < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_causal_only(method: Method) -> None:
    method.validate(problem(100))
    with pytest.raises(ValueError, match=f"{method.name} is causal as released") as error:
        method.validate(replace(problem(100), causal=False))
    assert "\n" not in str(error.value)
