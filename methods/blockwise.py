"""Attention over the listed blocks of a BlockMask, in plain PyTorch: any device, both passes.

The block lists alone decide which keys a query sees; what is computed is what a block-sparse
kernel computes, so wrong lists give wrong results here too. Tiles of similar rows go through
batched matrix products; memory is linear in the number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.attention.flex_attention import BlockMask

Mod = Callable[..., Tensor]
# Scores of one tile: large enough to hide the cost of a call, small enough to stay in a cache.
TILE_ELEMENTS = 1 << 20


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    score_mod: Mod | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, differentiable in q, k and v, through out and lse.

    The output and dQ read the kv lists alone, dK and dV the q lists alone. mask_mod is evaluated
    in partial blocks, never in full ones, and never at a position outside the sequence.

    Args:
        q: [B, Hq, N, D], float64, float32, bfloat16 or float16; sums are float32 or float64.
        k, v: [B, Hkv, N, D]; query head h reads head h // (Hq // Hkv).
        block_mask: lists [B or 1, Hq or 1, rows, width], narrow or full.
        score_mod: (score, b, h, q_idx, kv_idx) -> score, differentiable in the score. Tensors
            that it captures get no gradient.
        scale: factor of q k^T, 1 / sqrt(D) where not given.

    Returns:
        out [B, Hq, N, D] in q's dtype and the natural log-sum-exp [B, Hq, N], float32 (float64
        for float64). A row without a key has out 0, lse -inf and no gradient.

    Raises:
        ValueError: the shapes of q, k, v and the lists do not fit together.
    """
    _check(q, k, v, block_mask)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Blockwise.apply(q, k, v, block_mask, score_mod, scale)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor,
        block_mask: BlockMask, score_mod: Mod | None, scale: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        job = _Job(q, k, v, block_mask, score_mod, scale)
        out, lse = job.forward()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = (block_mask, score_mod, scale)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        job = _Job(q, k, v, *ctx.rest)
        dout = dout.to(lse.dtype)
        empty = lse == -torch.inf
        # d(score) = P (dP - delta); with lse = inf, P is 0 in rows without a key.
        delta = ((dout * out).sum(-1) - dlse).masked_fill_(empty, 0)
        job.prepare_backward(dout, lse.masked_fill(empty, torch.inf), delta)
        dq = job.dq() if ctx.needs_input_grad[0] else None
        dk, dv = job.dk_dv() if any(ctx.needs_input_grad[1:3]) else (None, None)
        return *(x if x is None else x.to(q.dtype) for x in (dq, dk, dv)), None, None, None


@dataclass(frozen=True)
class _Tile:
    """Block rows with equally many listed blocks, the `partial` ones of which come first."""

    b: Tensor  # [G]
    h: Tensor  # [G]
    row: Tensor  # [G]
    listed: Tensor  # [G, blocks]
    partial: int


def _tiles(lists: tuple[Tensor | None, ...], batch: int, heads: int, area: int) -> Iterator[_Tile]:
    """Tiles that cover every block row with at least one listed block.

    Args:
        lists: counts and indices of partial blocks, then of full blocks or None.
        area: scores in a block.
    """
    counts, indices, full_counts, full_indices = lists
    if full_counts is None:
        full_counts, full_indices = torch.zeros_like(counts), indices
    rows = counts.shape[-1]
    partial, full = (x.expand(batch, heads, rows).flatten().long() for x in (counts, full_counts))
    key, order = (partial * (int(full.max()) + 1) + full).sort(stable=True)
    group_sizes = key.unique_consecutive(return_counts=True)[1].tolist()
    for group in order.split(group_sizes):
        n_partial, n_full = int(partial[group[0]]), int(full[group[0]])
        if n_partial + n_full == 0:
            continue
        for entry in group.split(max(1, TILE_ELEMENTS // ((n_partial + n_full) * area))):
            b, h, row = entry // (heads * rows), entry // rows % heads, entry % rows
            listed = torch.cat((
                _listed(indices, b, h, row, n_partial), _listed(full_indices, b, h, row, n_full)
            ), dim=-1)  # fmt: skip
            yield _Tile(b, h, row, listed, n_partial)


def _listed(indices: Tensor, b: Tensor, h: Tensor, row: Tensor, count: int) -> Tensor:
    batch, heads = indices.shape[:2]
    return indices[..., :count][b % batch, h % heads, row].long()


class _Job:
    """The operands of one call, cut into blocks and in the dtype of the sums."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor,
        block_mask: BlockMask, score_mod: Mod | None, scale: float,
    ) -> None:  # fmt: skip
        self.batch, self.heads, self.tokens, _ = q.shape
        self.kv_heads = k.shape[1]
        self.mask = block_mask
        self.score_mod = score_mod
        self.scale = scale
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q_block, self.kv_block = block_mask.BLOCK_SIZE
        self.q = _blocks(q.to(self.dtype) * scale, self.q_block)
        self.k, self.v = (_blocks(x.to(self.dtype), self.kv_block) for x in (k, v))

    def forward(self) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(self.q)
        lse = self.q.new_full(self.q.shape[:-1], -torch.inf)
        for tile in self.kv_tiles():
            where = (tile.b, tile.h, tile.row)
            p = self.scores(tile, self.q[where], self._gather_kv(self.k, tile))
    """
