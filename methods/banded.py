"""Patterns given by the distance between query and key alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from methods.method import MaskMod, Method, Problem

Interval = tuple[int, int]


class Banded(Method):
    """A method whose heads see bands of distances; only `bands` is written, the rest follows.

    The distance is i - j under causality, where a negative one is never allowed, else |i - j|.
    """

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        """Inclusive distance intervals, in any order, of each head; one entry serves all heads."""
        raise NotImplementedError(f"{type(self).__name__} defines no bands")

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> MaskMod:
        bands, bound = _bounds(self, p, device)
        causal = p.causal

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            distance = q_idx - kv_idx if causal else (q_idx - kv_idx).abs()
            allowed = False
            for lo, hi in bands:
                allowed = allowed | ((distance >= bound(lo, h)) & (distance <= bound(hi, h)))
            return allowed

        return mask

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        # A block sees every distance from q0 - k1 to q1 - k0, so two comparisons decide a band.
        low, high = q0 - k1, q1 - k0
        if not p.causal:
            low, high = torch.maximum(low, -high).clamp(min=0), torch.maximum(-low, high)
        bands, bound = _bounds(self, p, device)
        some = every = False
        for lo, hi in bands:
            lo, hi = bound(lo, h), bound(hi, h)
            some = some | ((high >= lo) & (low <= hi))
            every = every | ((low >= lo) & (high <= hi))
        return some, every

    def allowed_pairs(self, p: Problem, state: Any = None) -> int:
        merged = merged_bands(self, p)
        pairs = sum(_band_pairs(lo, hi, p) for lo, hi in merged.flatten(0, 1).tolist())
        return pairs * (p.q_heads if len(merged) == 1 else 1)


def _band_pairs(lo: int, hi: int, p: Problem) -> int:
    """Pairs (i, j) of one head with lo <= distance <= hi, by summing N - d over the band."""
    if hi < lo:
        return 0
    pairs = (hi - lo + 1) * (2 * p.seq_len - lo - hi) // 2
    return pairs if p.causal else 2 * pairs - (p.seq_len if lo == 0 else 0)


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


@lru_cache(maxsize=256)
def merged_bands(method: Banded, p: Problem) -> Tensor:
    """Sorted, disjoint, non-adjacent intervals [heads or 1, R, 2]; (N, -1) fills empty places.

    Merging comes before any test for full blocks: two adjacent bands can fill one block together.
    """
    heads = [_merge(intervals, p.seq_len) for intervals in method.bands(p)]
    if len(heads) not in (1, p.q_heads):
        raise ValueError(
            f"{method.name} gives bands for {len(heads)} heads; {p.q_heads} (or 1 for all) needed"
        )
    width = max(1, *(len(intervals) for intervals in heads))
    empty = (p.seq_len, -1)
    return torch.tensor([[*x, *[empty] * (width - len(x))] for x in heads], dtype=torch.int64)


def _merge(intervals: Sequence[Interval], seq_len: int) -> list[Interval]:
    merged: list[Interval] = []
    for lo, hi in sorted((max(0, lo), min(hi, seq_len - 1)) for lo, hi in intervals):
        if hi < lo:
            continue
        if merged and lo <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(hi, merged[-1][1]))
        else:
            merged.append((lo, hi))
    return merged
