"""Patterns given by the distance between query and key, and by a global prefix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from methods.method import MaskMod, Method, Problem, kept

Interval = tuple[int, int]
DistanceTest = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# Up to so many bands, comparing each costs less than looking a distance up.
FEW_BANDS = 4


class Banded(Method):
    """A method whose heads see bands of distances and, at will, a global prefix.

    Only `bands` (and `prefix`) is written, the rest follows. The distance is i - j under
    causality, where a negative one is never allowed, else |i - j|. Tokens before `prefix` are
    seen by every query and, where not causal, see every key.
    """

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        """Inclusive distance intervals, in any order, of each head; one entry serves all heads."""
        raise NotImplementedError(f"{type(self).__name__} defines no bands")

    def prefix(self, p: Problem) -> int:
        """Global tokens at the start of the sequence."""
        return 0

    def sees(self, p: Problem, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """A closure (head, distance) -> bool that restates `bands` for a kernel; False below 0.

        The default compares with the ends of every band; many bands need a formula of their own.
        """
        bands, bound = _bounds(self, p, device)

        def inside(h: Tensor, distance: Tensor) -> Tensor:
            allowed = False
            for lo, hi in bands:
                allowed = allowed | ((distance >= bound(lo, h)) & (distance <= bound(hi, h)))
            return allowed

        return inside

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> MaskMod:
        sees, prefix, causal = self.sees(p, device), self.prefix(p), p.causal

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            distance = q_idx - kv_idx if causal else (q_idx - kv_idx).abs()
            allowed = sees(h, distance)
            if prefix == 0:
                return allowed
            if causal:
                return allowed | ((kv_idx < prefix) & (distance >= 0))
            return allowed | (kv_idx < prefix) | (q_idx < prefix)

        return mask

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # A block sees every distance from q0 - k1 to q1 - k0.
        within = distance_test(self, p, device)
        some, every = within(h, q0 - k1, q1 - k0)
        prefix = self.prefix(p)
        if prefix == 0:
            return some, every
        # Outside the prefix a block is a smaller block, whose distances decide alone.
        first_q, first_k = q0.clamp(min=prefix), k0.clamp(min=prefix)
        _, every = within(h, first_q - k1, q1 - first_k)
        every = every | (first_q > q1) | (first_k > k1)
        if p.causal:
            return some | ((k0 < prefix) & (k0 <= q1)), every & (k1 <= q0)
        return some | (k0 < prefix) | (q0 < prefix), every

    def allowed_pairs(self, p: Problem, state: Any = None) -> int:
        merged = merged_bands(self, p)
        rest = p.seq_len - min(self.prefix(p), p.seq_len)
        pairs = sum(band_pairs(*band, rest, p.causal) for band in merged.flatten(0, 1).tolist())
        pairs *= p.q_heads if len(merged) == 1 else 1
        with_prefix = dense_pairs(p.seq_len, p.causal) - dense_pairs(rest, p.causal)
        return pairs + p.q_heads * with_prefix


def dense_pairs(tokens: int, causal: bool) -> int:
    """Pairs of one head that sees all it may."""
    return tokens * (tokens + 1) // 2 if causal else tokens * tokens


def band_pairs(lo: int, hi: int, tokens: int, causal: bool) -> int:
    """Pairs (i, j) of one head with lo <= distance <= hi, by summing tokens - d over the band."""
    hi = min(hi, tokens - 1)
    if hi < lo:
        return 0
    pairs = (hi - lo + 1) * (2 * tokens - lo - hi) // 2
    return pairs if causal else 2 * pairs - (tokens if lo == 0 else 0)


def distance_test(method: Banded, p: Problem, device: torch.device) -> DistanceTest:
    """A closure (head, low, high) -> (some distance of low..high is seen, every one is)."""
    test = _compared if merged_bands(method, p).shape[1] <= FEW_BANDS else _counted
    decide = test(method, p, device)

    def within(h: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        if not p.causal:
            low, high = torch.maximum(low, -high).clamp(min=0), torch.maximum(-low, high)
        return decide(h, low, high)

    return within


def _compared(method: Banded, p: Problem, device: torch.device) -> DistanceTest:
    """Two comparisons a band."""
    bands, bound = _bounds(method, p, device)

    def decide(h: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        some = every = False
        for lo, hi in bands:
            lo, hi = bound(lo, h), bound(hi, h)
            some = some | ((high >= lo) & (low <= hi))
            every = every | ((low >= lo) & (high <= hi))
        return some, every

    return decide


def _counted(method: Banded, p: Problem, device: torch.device) -> DistanceTest:
    """Two look-ups, however many bands: how many distances below d a head sees."""
    lo, hi = merged_bands(method, p).to(device).unbind(-1)
    listed = (lo <= hi).int()
    edges = torch.zeros(len(lo), p.seq_len + 2, dtype=torch.int32, device=device)
    edges.scatter_add_(1, lo + 1, listed).scatter_add_(1, hi + 2, -listed)
    below = edges.cumsum(1, dtype=torch.int32).cumsum(1, dtype=torch.int32)

    def decide(h: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        head = h if len(below) > 1 else 0
        seen = below[head, (high + 1).clamp(0, p.seq_len)] - below[head, low.clamp(0, p.seq_len)]
        return seen > 0, seen == high - low + 1

    return decide


def _bounds(
    method: Banded, p: Problem, device: torch.device
) -> tuple[list[tuple[Any, Any]], Callable[[Any, Tensor], Any]]:
    """Merged bands as (lo, hi) pairs, and how to read a bound for head h.

    Bands that all heads share are plain numbers, which a compiler sees as constants.
    """
    merged = merged_bands(method, p)
    if len(merged) == 1:
        return merged[0].tolist(), lambda bound, h: bound
    table = merged.to(device=device, dtype=torch.int32).permute(1, 2, 0).contiguous()
    return [tuple(band) for band in table], lambda bound, h: bound[h]


@kept(256)
def merged_bands(method: Banded, p: Problem) -> Tensor:
    """Sorted, disjoint, non-adjacent intervals [heads or 1, R, 2]; (N, -1) fills empty places.

    Merging comes before any test for full blocks: two adjacent bands can fill one block together.
    """
    given = method.bands(p)
    try:
        heads = [_merge(intervals, p.seq_len) for intervals in given]
    except (TypeError, ValueError):
        raise ValueError(
            f"{method.name} gives bands {given!r}; for each head they must be a list of "
            "(first, last) distances, whole numbers with first <= last"
        ) from None
    if len(heads) not in (1, p.q_heads):
        raise ValueError(
            f"{method.name} gives bands for {len(heads)} heads; {p.q_heads} (or 1 for all) needed"
        )
    width = max(1, *(len(intervals) for intervals in heads))
    empty = (p.seq_len, -1)
    filled = [[*x, *[empty] * (width - len(x))] for x in heads]
    return torch.tensor(filled, dtype=torch.int64, device="cpu")


def shared_window(method: Method, p: Problem) -> int | None:
    """The largest distance seen, where every head sees all up to it and nothing else; or None."""
    if not isinstance(method, Banded) or method.prefix(p):
        return None
    heads = merged_bands(method, p)
    alike = len(heads.unique(dim=0)) == 1 and heads.shape[1] == 1 and int(heads[0, 0, 0]) == 0
    return int(heads[0, 0, 1]) if alike else None


def _merge(intervals: Sequence[Interval], seq_len: int) -> list[Interval]:
    merged: list[Interval] = []
    whole = [(index(lo), index(hi)) for lo, hi in intervals]
    if any(hi < lo - 1 for lo, hi in whole):  # at lo - 1 one is empty
        raise ValueError
    for lo, hi in sorted((max(0, lo), min(hi, seq_len - 1)) for lo, hi in whole):
        if hi < lo:
            continue
        if merged and lo <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged
