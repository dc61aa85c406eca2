"""Attention over the listed blocks of a BlockMask, in plain PyTorch: any device, both passes.

The lists alone decide which blocks are visited, as in a block-sparse kernel: wrong lists give
wrong results here too. Memory grows linearly with the number of tokens and of listed blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from methods.first_order import first_order

if TYPE_CHECKING:
    from methods.method import ScoreMod

# Scores computed at a time: enough to hide the cost of a call, few enough to stay in a cache.
TILE_ELEMENTS = 1 << 20


def blockwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_mask: BlockMask,
    score_mod: ScoreMod | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed blocks, differentiable in q, k and v through out and lse.

    out and dQ read the kv lists alone, dK and dV the q lists alone. mask_mod is evaluated in
    partial blocks only, and never at a position outside the sequence.

    Args:
        q: [B, Hq, N, D]; float64, float32, bfloat16 or float16. Sums are float32 or float64.
        k, v: [B, Hkv, N, D]; query head h reads head h // (Hq // Hkv).
        block_mask: lists [B or 1, Hq or 1, rows, any width].
        score_mod: (score, b, h, q_idx, kv_idx) -> score, differentiable in the score. Tensors
            that it captures get no gradient; one that wants one is refused.
        scale: factor of q k^T; 1 / sqrt(D) where not given.

    Returns:
        out [B, Hq, N, D] in q's dtype, and the natural log-sum-exp [B, Hq, N] in float32
        (float64 for float64). A row without keys has out 0, lse -inf and no gradient.

    Raises:
        ValueError: q, k, v and the block mask do not fit together, or score_mod reads a tensor
            that wants a gradient.
    """
    _check(q, k, v, block_mask)
    if score_mod is not None and torch.is_grad_enabled():
        _check_captured(score_mod, q)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    return _Blockwise.apply(q, k, v, block_mask, score_mod, scale)


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _Call(q, k, v, *rest).attend()
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = rest
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            call = _Call(q, k, v, *ctx.rest)
            call.start_backward(out, lse, dout, dlse)
            dq = call.dq() if ctx.needs_input_grad[0] else None
            dk, dv = call.dk_dv() if any(ctx.needs_input_grad[1:3]) else (None, None)
        return *(x if x is None else x.to(q.dtype) for x in (dq, dk, dv)), None, None, None


@dataclass(frozen=True)
class _Tile:
    """G rows of blocks that list L blocks each, the `partial` ones first.

    A row is a block of queries that lists blocks of keys, or the reverse if `by_key`. Its scores
    are [G, positions in the row's own block, positions in the listed blocks].
    """

    row: Tensor  # [G], counted over batches, query heads and blocks
    b: Tensor  # [G, 1, 1]
    h: Tensor  # [G, 1, 1]
    q: Tensor  # [G, 1] or [G, L], blocks of queries, counted over batches and heads
    kv: Tensor  # [G, L] or [G, 1], blocks of keys
    partial: int
    by_key: bool


class _Call:
    """One call's operands as [B * H * blocks, block size, D], in the dtype of the sums."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor,
        block_mask: BlockMask, score_mod: ScoreMod | None, scale: float,
    ) -> None:  # fmt: skip
        self.batch, self.heads, self.tokens, _ = q.shape
        self.group = self.heads // k.shape[1]
        self.mask, self.score_mod, self.scale = block_mask, score_mod, scale
        self.dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self.q_size, self.kv_size = block_mask.BLOCK_SIZE
        self.q = _blocks(q.to(self.dtype) * scale, self.q_size)
        self.k, self.v = (_blocks(x.to(self.dtype), self.kv_size) for x in (k, v))
        # The padding repeats the last position: a mod may index tensors that end there.
        position = torch.arange(self.tokens, device=q.device, dtype=torch.int32)[None, None]
        self.q_idx = _blocks(position, self.q_size, self.tokens - 1)
        self.kv_idx = _blocks(position, self.kv_size, self.tokens - 1)
        self.inside = _blocks(torch.ones_like(position, dtype=torch.bool), self.kv_size)

    def attend(self) -> tuple[Tensor, Tensor]:
        out = torch.zeros_like(self.q)
        lse = self.q.new_full(self.q.shape[:-1], -torch.inf)
        for tile in self._tiles(by_key=False):
            scores = torch.bmm(_gather(self.q, tile.q), _gather(self.k, tile.kv).mT)
            scores = self._mask(tile, self._modify(tile, scores))
            # Without keys all scores are -inf and the peak is not: weights of 0, never NaN.
            peak = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(self.dtype).min)
            weights = _exp_(scores.sub_(peak))
            total = weights.sum(-1, keepdim=True)
            values = torch.bmm(weights, _gather(self.v, tile.kv))
            # The peak adds 1 to the total, which is below 1 only without keys.
            out.index_copy_(0, tile.row, values.div_(total.clamp(min=1)))
            lse.index_copy_(0, tile.row, total.log_().add_(peak).squeeze(-1))
        return self._tokens(out), self._tokens(lse)

    def start_backward(self, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor) -> None:
        empty = lse == -torch.inf
        dout = dout.to(self.dtype)
        delta = ((dout * out).sum(-1) - dlse).masked_fill_(empty, 0)
        # exp(score - inf) is 0: rows without keys and rows of the padding take no part.
        self.lse = _blocks(lse.masked_fill(empty, torch.inf), self.q_size, torch.inf)
        self.delta, self.dout = (_blocks(x, self.q_size) for x in (delta, dout))

    def dq(self) -> Tensor:
        dq = torch.zeros_like(self.q)
        for tile in self._tiles(by_key=False):
            q, dout, lse, delta = (_gather(x, tile.q) for x in self._query_side())
            k, v = (_gather(x, tile.kv) for x in (self.k, self.v))
            dp = torch.bmm(dout, v.mT).sub_(delta[..., None])
            _, ds = self._weights_and_ds(tile, torch.bmm(q, k.mT), lse[..., None], dp)
            dq.index_copy_(0, tile.row, torch.bmm(ds, k))
        return self._tokens(dq) * self.scale

    def dk_dv(self) -> tuple[Tensor, Tensor]:
        """Found for every query head, then added up over the heads that share keys."""
        shape = (len(self.k) * self.group, *self.k.shape[1:])
        dk, dv = self.k.new_zeros(shape), self.v.new_zeros(shape)
        for tile in self._tiles(by_key=True):
            q, dout, lse, delta = (_gather(x, tile.q) for x in self._query_side())
            k, v = (_gather(x, tile.kv) for x in (self.k, self.v))
            dp = torch.bmm(v, dout.mT).sub_(delta[:, None])
            weights, ds = self._weights_and_ds(tile, torch.bmm(k, q.mT), lse[:, None], dp)
            dk.index_copy_(0, tile.row, torch.bmm(ds, q))
            dv.index_copy_(0, tile.row, torch.bmm(weights, dout))
        return tuple(self._tokens(x).unflatten(1, (-1, self.group)).sum(2) for x in (dk, dv))

    def _query_side(self) -> tuple[Tensor, ...]:
        return self.q, self.dout, self.lse, self.delta

    def _weights_and_ds(
        self, tile: _Tile, scores: Tensor, lse: Tensor, dp: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weights P, and the gradient of q k^T: P dP, taken back through score_mod."""
        if self.score_mod is None:
            weights = _exp_(self._mask(tile, scores).sub_(lse))
            return weights, dp.mul_(weights)
        with torch.enable_grad():
            scores.requires_grad_()
            modified = self._modify(tile, scores)
        weights = _exp_(self._mask(tile, modified.detach().clone()).sub_(lse))
        if not modified.requires_grad:  # whatever the score is
            return weights, dp.zero_()
        (ds,) = torch.autograd.grad(modified, scores, dp.mul_(weights))
        return weights, ds

    def _modify(self, tile: _Tile, scores: Tensor) -> Tensor:
        if self.score_mod is None:
            return scores
        modified = self.score_mod(scores, tile.b, tile.h, *self._positions(tile))
        # One that leaves the score out may be smaller.
        return modified.to(self.dtype).expand_as(scores).contiguous()

    def _mask(self, tile: _Tile, scores: Tensor) -> Tensor:
        """Writes -inf at the pairs of partial blocks that are not allowed."""
        if tile.partial:
            q_idx, kv_idx = self._positions(tile, tile.partial)
            allowed = self.mask.mask_mod(tile.b, tile.h, q_idx, kv_idx)
            if self.tokens % self.kv_size:
                inside = _gather(self.inside, tile.kv[:, : tile.partial] % len(self.inside))
                allowed = allowed & (inside[..., None] if tile.by_key else inside[:, None])
            masked = scores[..., : tile.partial * (self.q_size if tile.by_key else self.kv_size)]
            torch.where(allowed, masked, masked.new_full((), -torch.inf), out=masked)
        return scores

    def _positions(self, tile: _Tile, listed: int | None = None) -> tuple[Tensor, Tensor]:
        """Query and key positions, which broadcast to scores of the first listed blocks."""
        q_idx = _gather(self.q_idx, tile.q[:, :listed] % len(self.q_idx))
        kv_idx = _gather(self.kv_idx, tile.kv[:, :listed] % len(self.kv_idx))
        if tile.by_key:
            return q_idx[:, None], kv_idx[..., None]
        return q_idx[..., None], kv_idx[:, None]

    def _tiles(self, by_key: bool) -> Iterator[_Tile]:
        """Tiles that together hold every row with at least one listed block."""
        counts, indices, full_counts, full_indices = _lists(self.mask, by_key)
        shape = (self.batch, self.heads, counts.shape[-1])
        for row, partial, full in _groups(counts.expand(shape), full_counts.expand(shape)):
            b, h, own = torch.unravel_index(row, shape)
            listed = [_listed(indices, b, h, own, partial), _listed(full_indices, b, h, own, full)]
            q, kv = own[:, None], torch.cat(listed, -1)
            if by_key:
                q, kv = kv, q
            head = (b * self.heads + h)[:, None]
            q, kv = q + head * len(self.q_idx), kv + head // self.group * len(self.kv_idx)
            fit = TILE_ELEMENTS // ((partial + full) * self.q_size * self.kv_size)
            # A power of two: threads share the products of a batch evenly.
            size = 1 << max(0, fit.bit_length() - 1)
            parts = (row, b[:, None, None], h[:, None, None], q, kv)
            for part in zip(*(x.split(size) for x in parts), strict=True):
                yield _Tile(*part, partial, by_key)

    def _tokens(self, x: Tensor) -> Tensor:
        """[B * Hq * blocks, size, ...] -> [B, Hq, N, ...]."""
        x = x.view(self.batch, self.heads, -1, *x.shape[2:])
        return x[:, :, : self.tokens].contiguous()


def _lists(mask: BlockMask, by_key: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Counts and indices of partial blocks, then of full blocks."""
    if by_key:
        lists = mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices
    else:
        lists = mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices
    if lists[2] is None:
        return *lists[:2], torch.zeros_like(lists[0]), lists[1]
    return lists


def _groups(counts: Tensor, full_counts: Tensor) -> Iterator[tuple[Tensor, int, int]]:
    """Rows with equally many partial and full blocks, and these numbers; no rows without any."""
    both = torch.stack((counts.flatten(), full_counts.flatten()))
    pairs, group = both.unique(dim=1, return_inverse=True)
    for number, (partial, full) in enumerate(pairs.T.tolist()):
        if partial + full:
            yield (group == number).nonzero().flatten(), partial, full


def _listed(indices: Tensor, b: Tensor, h: Tensor, row: Tensor, count: int) -> Tensor:
    """The first `count` blocks of some rows of a list that batches or heads may share."""
    return indices[..., :count][b % indices.shape[0], h % indices.shape[1], row]


def _blocks(x: Tensor, size: int, fill: float = 0) -> Tensor:
    """[B, H, N, ...] -> [B * H * blocks, size, ...], padded at the end."""
    padding = (0, 0) * (x.dim() - 3) + (0, -x.shape[2] % size)
    return F.pad(x, padding, value=fill).unflatten(2, (-1, size)).flatten(0, 2).contiguous()


def _gather(x: Tensor, blocks: Tensor) -> Tensor:
    """Blocks [G, L] of x [blocks, size, ...], joined to [G, L * size, ...]."""
    return x.index_select(0, blocks.flatten()).view(len(blocks), -1, *x.shape[2:])


def _exp_(x: Tensor) -> Tensor:
    """exp in place, by exp2: a CPU's exp is many times slower at -inf and where it underflows."""
    return x.mul_(math.log2(math.e)).exp2_()


def _check_captured(score_mod: ScoreMod, q: Tensor) -> None:
    """Runs it for one pair whose score wants no gradient: whatever wants one is captured."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    score = torch.zeros(1, 1, 1, dtype=dtype, device=q.device)
    place = score.int()
    if score_mod(score, place, place, place, place).requires_grad:
        raise ValueError(
            "score_mod reads a tensor that wants a gradient; backend blockwise gives none: "
            "detach it, or call under torch.no_grad()"
        )


def _check(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> None:
    shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in (("q", q), ("k", k), ("v", v)))
    fits = q.dim() == k.dim() == 4 and k.shape == v.shape and q.shape[1] % k.shape[1] == 0
    if not fits or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"blockwise got {shapes}; it takes q [B, Hq, N, D] and k, v [B, Hkv, N, D], "
            "Hq a multiple of Hkv"
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; one float dtype is needed")
    batch, heads, tokens = q.shape[:3]
    if mask.shape[0] not in (1, batch) or mask.shape[1] not in (1, heads) or (
        mask.shape[2:] != (tokens, tokens)
    ):  # fmt: skip
        raise ValueError(
            f"the block mask is {list(mask.shape)}; "
            f"[{batch} or 1, {heads} or 1, {tokens}, {tokens}] is needed"
        )
