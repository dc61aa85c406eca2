"""Tokens sorted by hash and cut into chunks: Reformer's order, its blocks, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from methods.method import MaskMod, Method, Problem, ScoreMod

if TYPE_CHECKING:
    from methods.reformer import Reformer

# Subtracted from a token's score with itself; next to any other score its exp is 0.
PENALTY = 1e5

Listings = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Rounds:
    """State of one call: the order of the tokens in every round of hashing.

    Attributes:
        buckets: bucket of each token, int64 [B, H, R, N].
        order: token in each slot, sorted by (bucket, position), int64 [B, H, R, N].
        slot: slot of each token, its inverse.
    """

    buckets: Tensor
    order: Tensor
    slot: Tensor


@dataclass(frozen=True)
class Chunks(Method):
    """Reformer over slots: what a kernel sees, of H R heads, or on a ring of R N slots.

    Which chunks are near each other is known without the data, and so are the block lists.
    Inside blocks, causality, buckets and the penalty of a token with itself read the state.
    """

    name: ClassVar[str] = "reformer_chunks"
    paper: ClassVar[str] = "Kitaev et al. 2020, arXiv:2001.04451"
    inner: Reformer

    def problem(self, p: Problem) -> Problem:
        """One head of slots, which stands for all."""
        slots = p.seq_len * (self.inner.n_rounds if self.inner.ring else 1)
        return replace(p, batch=1, q_heads=1, kv_heads=1, seq_len=slots)

    def fold(self, x: Tensor) -> Tensor:
        """[B, H, R, N, ...] -> [B, heads, slots, ...]."""
        return x.flatten(2, 3) if self.inner.ring else x.flatten(1, 2)

    def buckets(self, state: Rounds) -> Tensor:
        """Bucket in each slot, another number in each round, int64 [B, heads, slots]."""
        rounds = self.inner.n_rounds
        number = torch.arange(rounds, device=state.buckets.device)[:, None]
        return self.fold((state.buckets * rounds + number).gather(3, state.order))

    def mask_mod(self, p: Problem, device: torch.device, state: Rounds | None = None) -> MaskMod:
        """p counts slots. Without a state, what is known without the data."""
        chunk, near = self.inner.chunk, self.inner.near(p.seq_len)

        def near_chunks(b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return near(s // chunk - t // chunk)

        if state is None or not self._reads_data(p):
            return near_chunks
        causal, within = p.causal, self.inner.within_buckets
        order, bucket = self.fold(state.order).int(), self.buckets(state) if within else None
        ring = self.inner.ring

        def mask(b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
            allowed = near(s // chunk - t // chunk)
            i, j = order[b, h, s], order[b, h, t]
            if causal:
                allowed = allowed & (j <= i)
            if ring:
                # Itself in another round, too: two penalties have a sum that float32 rounds.
                allowed = allowed & ((i != j) | (s == t))
            if within:
                allowed = allowed & (bucket[b, h, t] == bucket[b, h, s])
            return allowed

        return mask

    def score_mod(
        self, p: Problem, device: torch.device, state: Rounds | None = None
    ) -> ScoreMod | None:
        if state is None:
            return None
        order, rounds = self.fold(state.order).int(), self.inner.n_rounds
        once = not self.inner.ring and rounds > 1
        listings = self.inner.listings(p, state) if once else None

        def bias(score: Tensor, b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
            i, j = order[b, h, s], order[b, h, t]
            score = torch.where(i == j, score - PENALTY, score)
            if listings is None:
                return score
            # Outside the mask nothing may be listed; the score there must stay finite.
            return score - listings(b, h // rounds, i, j).clamp(min=1).to(score.dtype).log()

        return bias

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        chunk = self.inner.chunk
        # Of the differences between chunks of two blocks, each from low to high occurs.
        low, high = q0 // chunk - k1 // chunk, q1 // chunk - k0 // chunk
        some, every = False, False
        for first, last in self.inner.spans(p.seq_len):
            some = some | ((low <= last) & (high >= first))
            every = every | ((low >= first) & (high <= last))
        return some, every & (not self._reads_data(p))

    def _reads_data(self, p: Problem) -> bool:
        return p.causal or self.inner.within_buckets


class _Reorder(torch.autograd.Function):
    """x [B, H, R or 1, N, D] by index [B, H, R, N]; its gradient is sorted back, not added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.shared = x.shape[2] == 1
        return _take(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        grad = _take(grad, *ctx.saved_tensors)
        several = ctx.shared and grad.shape[2] > 1
        return grad.sum(2, keepdim=True) if several else grad, None, None


def stable_order(buckets: Tensor, together: bool) -> Tensor:
    """The indices that sort buckets [..., N] along the last dimension, int64, stably.

    Args:
        together: all lines in one sort. On a GPU many short ones take a multiple of its time; on
            a CPU they take less, and run side by side.
    """
    if not together:
        return buckets.argsort(dim=-1, stable=True)
    lines = buckets.flatten(0, -2)
    line = torch.arange(len(lines), device=buckets.device)[:, None]
    order = ((line << 32) + lines).flatten().argsort(stable=True).view_as(lines)
    return (order - line * lines.shape[1]).view_as(buckets)


def sort(x: Tensor, state: Rounds) -> Tensor:
    """Tokens [B, H, N, D] in the order of each round, [B, H, R, N, D]."""
    return _Reorder.apply(x.unsqueeze(2), state.order, state.slot)


def merge(out: Tensor, lse: Tensor | None, state: Rounds) -> Tensor:
    """The rounds' outputs, weighed by their log-sum-exp, in token order.

    Args:
        out: [B, heads, slots, D] in the order of the kernel.
        lse: [B, heads, slots]; None where there is one round.
    """
    out = _Reorder.apply(out.reshape(*state.slot.shape, -1), state.slot, state.order)
    if lse is None:
        return out.squeeze(2)
    lse = _Reorder.apply(lse.reshape(*state.slot.shape, 1), state.slot, state.order)
    return (lse.softmax(2) * out).sum(2).to(out.dtype)


def _take(x: Tensor, index: Tensor) -> Tensor:
    batch, heads, rounds, n = x.shape[:4]
    start = torch.arange(batch * heads * rounds, device=x.device).view(batch, heads, rounds, 1) * n
    rows = x.reshape(batch * heads * rounds * n, -1)
    return rows.index_select(0, (index + start).flatten()).view(*index.shape, -1)
