"""Tokens sorted by hash and cut into chunks: Reformer's order, its blocks, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.compiled import fused
from methods.first_order import first_order
from methods.method import STRIP_ELEMENTS, MaskMod, Method, Problem, ScoreMod

if TYPE_CHECKING:
    from methods.reformer import Reformer

# Subtracted from a token's score with itself; next to any other score its exp is 0.
PENALTY = 1e5
KEYS = (torch.int16, torch.int32, torch.int64)  # to sort by; a pass each 8 bits

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

    def fault(self, shape: tuple[int, ...]) -> str | None:
        """Why no call of buckets of this shape has it, or None; not whether the order is one."""
        for name, x in vars(self).items():
            if not isinstance(x, Tensor):
                return f"{name} is a {type(x).__name__}; it must be torch.int64 {list(shape)}"
            if x.dtype != torch.int64 or x.shape != shape:
                given = f"{x.dtype} {list(x.shape)}"
                return f"{name} is {given}; it must be torch.int64 {list(shape)}"
        return None


@dataclass(frozen=True)
class Chunks(Method):
    """Reformer over slots: what a kernel sees, of H R heads, or on a ring of R N slots.

    Which chunks are near each other is known without the data, and so are the block lists.
    Inside blocks, causality, buckets, what an earlier round lists and the penalty of a token
    with itself read the state.
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
        ring, rounds = self.inner.ring, self.inner.n_rounds
        earlier = self.inner.listed_before(p, state) if self._once else None

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
            if earlier is not None:
                allowed = allowed & ~earlier(b, h // rounds, i, j, h % rounds)
            return allowed

        return mask

    def score_mod(
        self, p: Problem, device: torch.device, state: Rounds | None = None
    ) -> ScoreMod | None:
        if state is None:
            return None
        order = self.fold(state.order).int()

        def bias(score: Tensor, b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
            return torch.where(order[b, h, s] == order[b, h, t], score - PENALTY, score)

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

    def pairs(self, p: Problem, state: Rounds) -> int:
        """Of tokens that the first sample's rounds list, each once; p counts tokens."""
        chunk, ring = self.inner.chunk, self.inner.ring
        listings, order = self.inner.listings(p, state), self.fold(state.order)[0]
        tokens, buckets = (
            F.pad(x, (0, -x.shape[1] % chunk), value=-1).unflatten(1, (-1, chunk))
            for x in (order, self.buckets(state)[0])
        )
        head = torch.arange(len(order), device=order.device)[:, None, None, None]
        token_head = head // (len(order) // p.q_heads)
        number = torch.arange(tokens.shape[1], device=order.device)
        strips = number.split(max(1, STRIP_ELEMENTS // (chunk**2 * len(order))))
        total = 0.0
        for own, step in product(strips, range(-self.inner.after, self.inner.before + 1)):
            other = (own - step) % len(number) if ring else own - step
            exists = (other >= 0) & (other < len(number))
            own, other = own[exists], other[exists]
            i, j = tokens[:, own, :, None], tokens[:, other, None, :]
            allowed = (i >= 0) & (j >= 0) & ((j <= i) | (not p.causal))
            if self.inner.within_buckets:
                allowed &= buckets[:, own, :, None] == buckets[:, other, None, :]
            times = listings(head[:1] * 0, token_head, i.clamp(min=0), j.clamp(min=0))
            # A pair that is met in several rounds adds up to one.
            total += float((allowed / times.clamp(min=1).double()).sum())
        return round(total)

    @property
    def _once(self) -> bool:
        """Whether a pair that several rounds list takes part in the first of them alone."""
        return not self.inner.ring and self.inner.n_rounds > 1

    def _reads_data(self, p: Problem) -> bool:
        return p.causal or self.inner.within_buckets or self._once


class _Sort(torch.autograd.Function):
    """Tensors [B, H, N, D] by index [B, H, R, N]; gradients are gathered back, not added up."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, inverse: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(inverse)
        return fused(_spread, index, *tensors)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *fused(_gathered, *ctx.saved_tensors, *grads)


class _Merge(torch.autograd.Function):
    """Rounds in the order of their slots into one softmax, in token order."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor, order: Tensor, slot: Tensor) -> Tensor:
        merged, weights = fused(_merged, out, lse, slot)
        ctx.save_for_backward(out, order, merged, weights)
        return merged

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *fused(_unmerged, grad, *ctx.saved_tensors), None, None


def stable_order(buckets: Tensor, together: bool, count: int | None = None) -> Tensor:
    """The indices that sort buckets [..., N] along the last dimension, int64, stably.

    Args:
        together: all lines in one sort. On a GPU many short ones take a multiple of its time; on
            a CPU they take less, and run side by side.
        count: buckets are 0 to count - 1, so that few bytes of a key are sorted by; None for any
            of 32 bits.
    """
    if not together:
        return buckets.argsort(dim=-1, stable=True)
    lines = buckets.flatten(0, -2).long()
    line = torch.arange(len(lines), device=buckets.device)[:, None]
    keys = line * (count or 1 << 32) + lines
    if count:
        most = count * len(lines)
        keys = keys.to(next(x for x in KEYS if most <= torch.iinfo(x).max))
    order = keys.flatten().argsort(stable=True).view_as(lines)
    return (order - line * lines.shape[1]).view_as(buckets)


def sort(state: Rounds, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tokens [B, H, N, D] in the order of each round, [B, H, R, N, D]."""
    return _Sort.apply(state.order, state.slot, *tensors)


def merge(out: Tensor, lse: Tensor | None, state: Rounds) -> Tensor:
    """The rounds' outputs, weighed by their log-sum-exp, in token order.

    Args:
        out: [B, heads, slots, D] in the order of the kernel.
        lse: [B, heads, slots]; None where there is one round.
    """
    if lse is None:
        return _Sort.apply(state.slot, state.order, out)[0].squeeze(2)
    out = out.reshape(*state.slot.shape, -1)
    return _Merge.apply(out, lse.reshape(state.slot.shape), state.order, state.slot)


def _spread(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_take(x.unsqueeze(2), index) for x in tensors)


def _gathered(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(_take(x, index).sum(2) for x in tensors)


def _merged(out: Tensor, lse: Tensor, slot: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, N, D] of out [B, H, R, N, D], and the rounds' weights [B, H, R, N]; of tokens."""
    own = lse.gather(3, slot).unbind(2)
    # By elements: torch warns of a compiled softmax over so few. A round without keys has -inf;
    # all never have.
    peak = reduce(torch.maximum, own)
    shares = [(x - peak).exp() for x in own]
    weights = torch.stack(shares, 2) / sum(shares).unsqueeze(2)
    return (weights.unsqueeze(-1) * _take(out, slot)).sum(2).to(out.dtype), weights


def _unmerged(
    grad: Tensor, out: Tensor, order: Tensor, merged: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of a merge's out and lse, in slots."""
    inner = (grad.to(weights.dtype) * merged).sum(-1)
    inner = inner.unsqueeze(2).expand_as(order).gather(3, order)
    weights, grad = weights.gather(3, order), _take(grad.unsqueeze(2), order)
    share = (grad.to(weights.dtype) * out).sum(-1)
    return (weights.unsqueeze(-1) * grad).to(out.dtype), weights * (share - inner)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of x [B, H, R or 1, N, D] by index [B, H, R, N]."""
    batch, heads, rounds, n = x.shape[:4]
    start = torch.arange(batch * heads * rounds, device=x.device).view(batch, heads, rounds, 1) * n
    rows = x.reshape(batch * heads * rounds * n, -1)
    return rows.index_select(0, (index + start).flatten()).view(*index.shape, -1)
