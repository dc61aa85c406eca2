"""Which lists of a BlockMask the plain block-sparse attention reads, and how."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from methods import METHODS, block_mask
from methods.blockwise import blockwise
from tests.methods.dense import CPU
from tests.methods.test_blockwise import (
    KINDS,
    assert_matches_dense,
    operands,
    problem,
    reference,
    results,
)


def with_lists(mask: BlockMask, mask_mod: Callable | None = None, **lists: Any) -> BlockMask:
    """The mask with some of its lists (counts, indices) replaced, by kind."""
    old = [
        (getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")) for kind in KINDS
    ]
    new = itertools.chain(*(lists.get(kind, pair) for kind, pair in zip(KINDS, old, strict=True)))
    return BlockMask(
        mask.seq_lengths, *new, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask_mod or mask.mask_mod
    )  # fmt: skip


def emptied(mask: BlockMask, *kinds: str) -> BlockMask:
    return with_lists(
        mask,
        **{
            k: (getattr(mask, f"{k}_num_blocks") * 0, getattr(mask, f"{k}_indices")) for k in kinds
        },
    )


def listed_case() -> tuple[BlockMask, list[Tensor], list[Tensor], list[Tensor]]:
    """A mask with partial and full blocks, operands, cotangents and the right results."""
    p = problem(seq_len=256)
    mask = block_mask(METHODS["spattention_released"], p, CPU, (32, 32))
    assert all(getattr(mask, f"{kind}_num_blocks").sum() for kind in KINDS)
    qkv, cotangents = operands(p)
    return mask, qkv, cotangents, results(lambda *x: blockwise(*x, mask), qkv, cotangents)


def changed(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    """Which of out, lse, dq, dk and dv differ."""
    return [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["q", "full_q"])
def test_dk_and_dv_alone_read_the_q_lists(kind):
    mask, qkv, cotangents, right = listed_case()
    lying = emptied(mask, kind)
    got = results(lambda *x: blockwise(*x, lying), qkv, cotangents)
    assert changed(got, right) == [False, False, False, True, True]


@pytest.mark.parametrize("kind", ["kv", "full_kv"])
def test_out_and_dq_read_the_kv_lists(kind):
    mask, qkv, cotangents, right = listed_case()
    lying = emptied(mask, kind)
    assert all(changed(results(lambda *x: blockwise(*x, lying), qkv, cotangents), right)[:3])


def test_dq_reads_the_kv_lists_of_the_backward():
    """Emptied between the passes, they leave dK and dV as they were."""
    mask, qkv, cotangents, right = listed_case()
    lying = emptied(mask)
    answer = blockwise(*qkv, lying)
    lying.kv_num_blocks.zero_()
    lying.full_kv_num_blocks.zero_()
    dq, dk, dv = torch.autograd.grad(answer, qkv, cotangents)
    assert (dq == 0).all()
    assert torch.equal(dk, right[3]) and torch.equal(dv, right[4])


def test_empty_lists_give_zero():
    mask, qkv, cotangents, _ = listed_case()
    out, lse, *grads = results(lambda *x: blockwise(*x, emptied(mask, *KINDS)), qkv, cotangents)
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in (out, *grads))


def test_full_blocks_are_not_masked():
    """Partial blocks moved to the full lists: every pair of a listed block takes part."""
    p = problem(seq_len=256, causal=True)
    mask = block_mask(METHODS["sliding_window"], p, CPU, (32, 32))
    moved = {}
    for kind in ("kv", "q"):
        counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        full, full_indices = (getattr(mask, f"full_{kind}_{x}") for x in ("num_blocks", "indices"))
        assert (counts == 1).all()
        shifted = torch.cat((indices[..., :1], full_indices[..., :-1]), -1)
        moved |= {kind: (counts * 0, indices), f"full_{kind}": (full + 1, shifted.contiguous())}
    lying = with_lists(mask, **moved)
    qkv, cotangents = operands(p)
    blocks = torch.arange(256) // 32
    allowed = (blocks[:, None] >= blocks).expand(p.batch, p.q_heads, -1, -1)
    got = results(lambda *x: blockwise(*x, lying), qkv, cotangents)
    want = reference(qkv, cotangents, allowed, p)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_mask_mod_is_evaluated_in_partial_blocks_inside_the_sequence_only():
    p = problem(batch=1, seq_len=200)
    mask = block_mask(METHODS["standard"], p, CPU, (32, 64))
    seen = torch.zeros(p.seq_len, p.seq_len, dtype=torch.bool)

    def watched(b, h, q_idx, kv_idx):
        seen[q_idx.long(), kv_idx.long()] = True
        return mask.mask_mod(b, h, q_idx, kv_idx)

    rows, columns = torch.arange(200)[:, None], torch.arange(200)
    row, column = rows // 32 * 32, columns // 64 * 64
    some = row + 31 >= column
    full = (row >= column + 63) & (row + 31 < 200) & (column + 63 < 200)
    qkv, cotangents = operands(p)
    watching = with_lists(mask, watched)
    answer = blockwise(*qkv, watching)
    assert torch.equal(seen, some & ~full)
    seen.zero_()
    torch.autograd.grad(answer, qkv, cotangents)
    assert torch.equal(seen, some & ~full)


def test_entries_behind_the_count_are_ignored():
    mask, qkv, cotangents, right = listed_case()
    lists = {}
    for kind in KINDS:
        counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        lists[kind] = counts, indices.masked_fill(~used, 1 << 20)
    got = results(lambda *x: blockwise(*x, with_lists(mask, **lists)), qkv, cotangents)
    assert not any(changed(got, right))


def test_lists_of_partial_blocks_alone():
    p = problem(q_heads=4)
    mask_mod = METHODS["spattention"].mask_mod(p, CPU)
    every = torch.arange(7, dtype=torch.int32).expand(1, 1, 7, 7).contiguous()
    mask = BlockMask.from_kv_blocks(
        torch.full((1, 1, 7), 7, dtype=torch.int32), every, BLOCK_SIZE=32, mask_mod=mask_mod,
        seq_lengths=(200, 200),
    )  # fmt: skip
    assert mask.full_kv_num_blocks is None
    assert_matches_dense(p, mask)


@pytest.mark.parametrize("shared", ["batch", "heads", "neither"])
def test_lists_of_each_batch_and_head(shared):
    """Lists [B or 1, H or 1, ...] with a mask that differs accordingly."""
    p = problem(batch=3, q_heads=4)

    def mask_mod(b, h, q_idx, kv_idx):
        reach = {"batch": 40 * h, "heads": 60 * b, "neither": 30 * b + 20 * h}[shared]
        return (q_idx - kv_idx).abs() <= reach

    batch, heads = (
        None if shared == name else size for name, size in (("batch", 3), ("heads", 4))
    )
    mask = torch.nn.attention.flex_attention.create_block_mask(
        mask_mod, batch, heads, 200, 200, "cpu", BLOCK_SIZE=(32, 64)
    )
    assert mask.kv_indices.shape[:2] == (batch or 1, heads or 1)
    assert_matches_dense(p, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 100, 16)}, "k [2, 2, 100, 16]"),
        ({"q": torch.zeros(2, 3, 200, 16)}, "Hq a multiple of Hkv"),
        ({"q": torch.zeros(4, 200, 16)}, "q [4, 200, 16]"),
        ({"v": torch.zeros(2, 2, 200, 16).double()}, "one float dtype"),
        ({"q": torch.zeros(2, 8, 200, 16)}, "the block mask is [1, 4, 200, 200]"),
    ],
)
def test_operands_that_do_not_fit_are_refused_in_one_line(change, message):
    p = problem(dtype="float32")
    q, k, v = (x.detach() for x in operands(p)[0])
    mask = block_mask(METHODS["spattention"], p, CPU, (64, 64))
    with pytest.raises(ValueError) as caught:
        blockwise(**{"q": q, "k": k, "v": v, "block_mask": mask} | change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
