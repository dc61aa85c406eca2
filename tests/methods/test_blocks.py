"""Block lists against torch's create_block_mask, which evaluates every pair."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode

from methods import METHODS, Method, Problem, block_mask, blocks
from methods.blocks import computed_pairs
from methods.spattention import SPAttention
from tests.methods.dense import STATIC

LISTS = ("kv", "full_kv", "q", "full_q")
HEADS = (1, 2, 3, 7, 8, 16, 33)
SIZES = (16, 32, 64, 128)
BLOCK_SIZES = tuple(product(SIZES, SIZES))
SMALL = range(1, 301)  # every length
DRAWN = 1260 // len(STATIC)  # longer lengths a preset
ELEMENTS = 2_000_000  # of the mask that create_block_mask evaluates; one head may have more


def counts_and_indices(mask: BlockMask, kind: str) -> tuple[Tensor, Tensor]:
    return getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")


def reference(
    method: Method, p: Problem, block_size: tuple[int, int], state: Any = None
) -> BlockMask:
    mask_mod = method.mask_mod(p, torch.device("cpu"), state)
    batch = None if state is None else p.batch
    return create_block_mask(
        mask_mod, batch, p.q_heads, p.seq_len, p.seq_len, "cpu", BLOCK_SIZE=block_size
    )


def assert_same_lists(actual: BlockMask, expected: BlockMask, case: object = None) -> None:
    """Counts, and as many entries of every row as are counted; one head may stand for all."""
    assert actual.seq_lengths == expected.seq_lengths
    assert actual.BLOCK_SIZE == expected.BLOCK_SIZE
    for kind in LISTS:
        counts, indices = counts_and_indices(actual, kind)
        expected_counts, expected_indices = counts_and_indices(expected, kind)
        assert counts.dtype == indices.dtype == torch.int32
        assert indices.is_contiguous()
        assert torch.equal(counts.expand_as(expected_counts), expected_counts), (case, kind)
        width = min(indices.shape[-1], expected_indices.shape[-1])
        counted = torch.arange(width) < expected_counts[..., None]
        assert counted.sum() == expected_counts.sum(), (case, kind, "too narrow")
        indices = indices.expand(*expected_counts.shape, -1)[..., :width]
        assert torch.equal(indices[counted], expected_indices[..., :width][counted]), (case, kind)


def assert_identical(actual: BlockMask, expected: BlockMask) -> None:
    for kind in LISTS:
        pairs = zip(
            counts_and_indices(actual, kind), counts_and_indices(expected, kind), strict=True
        )
        assert all(torch.equal(x, y) for x, y in pairs), kind


def assert_narrow(narrow: BlockMask, full: BlockMask) -> None:
    """The full-width lists, cut after the longest row; partial and full ones to one width."""
    for direction in ("kv", "q"):
        kinds = (direction, f"full_{direction}")
        width = max(1, *(int(counts_and_indices(full, kind)[0].max()) for kind in kinds))
        for kind in kinds:
            counts, indices = counts_and_indices(narrow, kind)
            full_counts, full_indices = counts_and_indices(full, kind)
            assert torch.equal(counts, full_counts)
            assert torch.equal(indices, full_indices[..., :width])


def draw_problems(name: str) -> Iterator[tuple[Problem, tuple[int, int]]]:
    """Every length of SMALL, then DRAWN longer ones; the rest drawn, from a seed."""
    draw = random.Random(name)
    longer = (int(math.exp(draw.uniform(math.log(301), math.log(3000)))) for _ in range(DRAWN))
    for seq_len in (*SMALL, *longer):
        heads = draw.choice([h for h in HEADS if h == 1 or h * seq_len**2 <= ELEMENTS])
        yield (
            Problem(
                q_heads=heads,
                kv_heads=draw.choice([g for g in range(1, heads + 1) if heads % g == 0]),
                seq_len=seq_len,
                causal=draw.random() < 0.7,
            ),
            draw.choice(BLOCK_SIZES),
        )


@pytest.mark.parametrize("name", STATIC)
def test_lists_equal_create_block_mask(name: str) -> None:
    method, seen = METHODS[name], Counter()
    for p, block_size in draw_problems(name):
        mask, expected = block_mask(method, p, "cpu", block_size), reference(method, p, block_size)
        assert_same_lists(mask, expected, (p, block_size))
        assert mask.kv_indices.shape[-1] == -(-p.seq_len // block_size[1])
        assert mask.q_indices.shape[-1] == -(-p.seq_len // block_size[0])
        assert_narrow(block_mask(method, p, "cpu", block_size, narrow=True), mask)
        seen.update(
            {
                "cases": 1,
                "long": p.seq_len > 2000,
                "ragged": any(p.seq_len % size for size in block_size),
                "bidirectional": not p.causal,
                "grouped": p.group > 1,
                "oblong": block_size[0] != block_size[1],
                "full": bool(expected.full_kv_num_blocks.any()),
                f"{p.q_heads} heads": 1,
                f"blocks of {block_size}": 1,
            }
        )
    assert seen["cases"] == len(SMALL) + DRAWN
    assert set(seen) >= {f"{h} heads" for h in HEADS} | {f"blocks of {x}" for x in BLOCK_SIZES}
    # The Reformer proxy allows three distances in eight at most: no block of it is full.
    assert (seen.pop("full") >= 10) == (name != "mehc_reformer"), seen
    assert min(seen.values()) >= 10, seen


# Section by (N, H), in the presets' order: (allowed pairs, partial blocks, full blocks) over all
# heads at blocks of 128, counted from the dense masks that the paper's equations and code give.
PRESETS = ("standard", "spattention", "spattention_released", "local_only", "gapped_bands")
GOLDEN = {
    (1000, 8): (
        (4_004_000, 120, 168),
        (500_500, 92, 0),
        (1_327_375, 177, 0),
        (945_000, 120, 0),
        (263_872, 92, 0),
    ),
    (1000, 16): (
        (8_008_000, 240, 336),
        (500_500, 156, 0),
        (1_422_764, 339, 0),
        (984_248, 240, 0),
        (255_068, 156, 0),
    ),
    (1024, 8): (
        (4_198_400, 64, 224),
        (524_800, 64, 0),
        (1_391_680, 155, 7),
        (990_720, 120, 0),
        (278_784, 64, 0),
    ),
    (1024, 16): (
        (8_396_800, 128, 448),
        (524_800, 128, 0),
        (1_492_000, 324, 0),
        (1_031_680, 240, 0),
        (270_592, 128, 0),
    ),
    (4096, 8): (
        (67_125_248, 256, 3968),
        (8_390_656, 256, 384),
        (22_180_096, 620, 1042),
        (15_759_360, 480, 720),
        (4_457_472, 272, 136),
    ),
    (4096, 16): (
        (134_250_496, 512, 7936),
        (8_390_656, 512, 256),
        (23_687_296, 1382, 751),
        (16_316_416, 992, 496),
        (4_326_400, 528, 0),
    ),
}


@pytest.mark.parametrize(("seq_len", "heads"), GOLDEN)
def test_golden_numbers(seq_len: int, heads: int) -> None:
    p = Problem(seq_len=seq_len, q_heads=heads)
    for name, (pairs, partial, full) in zip(PRESETS, GOLDEN[seq_len, heads], strict=True):
        mask = block_mask(METHODS[name], p, "cpu")
        copies = heads // mask.kv_num_blocks.shape[1]
        assert METHODS[name].allowed_pairs(p) == pairs, name
        assert int(mask.kv_num_blocks.sum()) * copies == partial, name
        assert int(mask.full_kv_num_blocks.sum()) * copies == full, name
        assert computed_pairs(mask, p) == (partial + full) * 128 * 128, name


@pytest.mark.parametrize("name", STATIC)
def test_computed_pairs_are_those_of_touched_blocks(name: str) -> None:
    draw = random.Random(1)
    for _ in range(20):
        p = Problem(q_heads=draw.choice((1, 3, 8)), seq_len=draw.randint(1, 200), batch=2)
        rows, columns = block_size = draw.choice(BLOCK_SIZES)
        allowed = dense(METHODS[name], p)
        touched = sum(
            bool(block.any())
            for head in allowed
            for strip in head.split(rows)
            for block in strip.split(columns, dim=1)
        )
        mask = block_mask(METHODS[name], p, "cpu", block_size)
        assert computed_pairs(mask, p) == touched * rows * columns


def dense(method: Method, p: Problem) -> Tensor:
    """The mask itself, bool [H, N, N]."""
    positions, heads = torch.arange(p.seq_len), torch.arange(p.q_heads)
    mask = method.mask_mod(p, torch.device("cpu"))
    allowed = mask(torch.tensor(0), heads[:, None, None], positions[:, None], positions[None, :])
    return allowed.expand(p.q_heads, p.seq_len, p.seq_len)


def test_the_block_mask_is_complete() -> None:
    p = Problem(q_heads=3, seq_len=100)
    mask = block_mask(METHODS["spattention"], p, "cpu", (32, 16))
    assert mask.shape == (1, 3, 100, 100)
    blocks_touched = mask.to_dense()[0].repeat_interleave(32, 1).repeat_interleave(16, 2)
    allowed = dense(METHODS["spattention"], p)
    assert not (allowed & (blocks_touched[:, :100, :100] == 0)).any()
    indices = torch.arange(3)[:, None, None], torch.arange(100)[:, None], torch.arange(100)
    assert torch.equal(mask.mask_mod(torch.tensor(0), *indices), allowed)


@dataclass(frozen=True)
class Recording(SPAttention):
    """SPAttention that notes how many blocks each call of its grid was asked about."""

    sizes: ClassVar[list[int]] = []

    def grid(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        some, every = super().grid(*args, **kwargs)
        self.sizes.append(some.numel())
        return some, every


@pytest.mark.parametrize("limit", [1, 500, 5000])
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_strips_give_the_same_lists(
    monkeypatch: pytest.MonkeyPatch, limit: int, narrow: bool, causal: bool
) -> None:
    p, block_size = Problem(q_heads=7, seq_len=1001, causal=causal), (16, 32)
    whole = block_mask(Recording(), p, "cpu", block_size, narrow=narrow)
    monkeypatch.setattr(blocks, "STRIP_ELEMENTS", limit)
    Recording.sizes.clear()
    assert_identical(block_mask(Recording(), p, "cpu", block_size, narrow=narrow), whole)
    longest_line = 7 * 63  # all heads of one column of blocks
    assert len(Recording.sizes) > 5
    assert max(Recording.sizes) <= max(limit, longest_line)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_memory_is_that_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "STRIP_ELEMENTS", 1 << 16)
    p = Problem(q_heads=8, seq_len=1 << 17)
    with LargestTensor() as largest:
        mask = block_mask(METHODS["spattention"], p, "cpu", narrow=True)
    answer = max(counts_and_indices(mask, kind)[1].numel() for kind in LISTS)
    all_blocks = p.q_heads * (p.seq_len // 128) ** 2
    assert answer < all_blocks / 5
    # A table of distances is linear in the tokens; a strip's nonzero() has four columns.
    assert largest.elements <= max(answer, 4 << 16, 2 * p.q_heads * p.seq_len) < all_blocks / 3


class EveryThird(Method):
    """A user's method: nothing but a mask."""

    name = "every_third"

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return lambda b, h, q, k: (q >= k) & ((q - k) % 3 == h % 3)


@pytest.mark.parametrize("narrow", [False, True])
def test_a_method_without_a_grid(narrow: bool) -> None:
    p = Problem(q_heads=4, seq_len=77)
    mask = block_mask(EveryThird(), p, "cpu", (16, 32), narrow=narrow)
    assert_same_lists(mask, reference(EveryThird(), p, (16, 32)))
    assert mask.kv_num_blocks.shape == (1, 4, 5)
    assert int(mask.kv_num_blocks.sum()) > 0


class WindowOfEachSequence(Method):
    """A method with a state: the window of each sequence of the batch, int [B]."""

    name = "window_of_each_sequence"

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return lambda b, h, q, k: (q >= k) & (q - k < state[b])


class WindowOfEachSequenceByGrid(WindowOfEachSequence):
    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        window = state[b]
        return (q1 >= k0) & (q0 - k1 < window), (q0 >= k1) & (q1 - k0 < window)


@pytest.mark.parametrize("method", [WindowOfEachSequence(), WindowOfEachSequenceByGrid()])
def test_a_state_gives_each_sequence_its_own_lists(method: Method) -> None:
    p, state = Problem(batch=3, q_heads=2, seq_len=150), torch.tensor([1, 40, 150])
    mask = block_mask(method, p, "cpu", (16, 32), state=state)
    assert_same_lists(mask, reference(method, p, (16, 32), state))
    first, _, last = (mask.kv_num_blocks + mask.full_kv_num_blocks).sum(dim=(1, 2)).tolist()
    assert first < last
