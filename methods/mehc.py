"""The stand-ins that the code released with SPAttention runs under the names of other methods.

They are kept to reproduce that comparison, and are not those methods: `longformer`, `bigbird` and
`reformer` are. All are causal, the same in every head, and depend on N alone; N <= 4 is plain
causal attention. Source: Harry-Miral/MEHC, newconfig/attention_variants.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from methods.banded import Banded, Interval
from methods.method import Problem

PLAIN_CAUSAL = 4


class _StandIn(Banded):
    """A released mask; the figures that it derives from N are properties of the problem."""

    paper: ClassVar[str] = "Harry-Miral/MEHC, attention_variants.py"

    def validate(self, p: Problem) -> None:
        if not p.causal:
            raise ValueError(f"{self.name} is causal as released; there is no bidirectional form")


def _share(seq_len: int, part: int, most: int) -> int:
    """1 / part of the sequence, from 1 to most."""
    return max(1, min(most, seq_len // part))


@dataclass(frozen=True)
class MehcLongformer(_StandIn):
    """Stand-in, not Longformer: a window and first tokens whose numbers follow from N.

    i - j <= min(256, N // 4), or j is one of min(16, N // 32) first tokens, each at least 1. No
    dilation, and no projections for global tokens. For N >= 1024 it is Longformer's causal mask
    with a window of 512 and 16 global tokens.
    """

    name: ClassVar[str] = "mehc_longformer"

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        if p.seq_len <= PLAIN_CAUSAL:
            return [[(0, p.seq_len - 1)]]
        return [[(0, _share(p.seq_len, 4, 256))]]

    def prefix(self, p: Problem) -> int:
        return 0 if p.seq_len <= PLAIN_CAUSAL else _share(p.seq_len, 32, 16)


@dataclass(frozen=True)
class MehcBigBird(_StandIn):
    """Stand-in, not BigBird: a window, first tokens and every s-th distance; nothing is random.

    i - j <= min(128, N // 8), or j is one of min(8, N // 64) first tokens, each at least 1, or
    i - j is a multiple of s = max(16, N // 32). No blocks, no heads: up to N = 4096, blocks of 128
    skip nothing.
    """

    name: ClassVar[str] = "mehc_bigbird"

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        if p.seq_len <= PLAIN_CAUSAL:
            return [[(0, p.seq_len - 1)]]
        stride = self._stride(p)
        return [[(0, self._window(p)), *((d, d) for d in range(0, p.seq_len, stride))]]

    def prefix(self, p: Problem) -> int:
        return 0 if p.seq_len <= PLAIN_CAUSAL else _share(p.seq_len, 64, 8)

    def sees(self, p: Problem, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        if p.seq_len <= PLAIN_CAUSAL:
            return super().sees(p, device)
        window, stride = self._window(p), self._stride(p)
        return lambda h, d: (d >= 0) & ((d <= window) | (d % stride == 0))

    def _window(self, p: Problem) -> int:
        return _share(p.seq_len, 8, 128)

    def _stride(self, p: Problem) -> int:
        return max(16, p.seq_len // 32)


@dataclass(frozen=True)
class MehcReformer(_StandIn):
    """Stand-in, not Reformer: buckets by position and a window; nothing is hashed or sorted.

    3 (i - j) mod m is 0, 1 or m - 1, with m = N // min(64, N // 8) and at least 2, or
    i - j <= min(8, N // 4), each minimum at least 1. The released bucket of a token is
    (3 i + 13 h + 7) mod m, and the same or a neighbouring bucket is seen: h cancels. Up to
    N = 32768, whole blocks of 128 skip nothing.
    """

    name: ClassVar[str] = "mehc_reformer"

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        n, buckets = p.seq_len, self._buckets(p)
        if n <= PLAIN_CAUSAL:
            return [[(0, n - 1)]]
        near = (d for d in range(n) if 3 * d % buckets in (0, 1, buckets - 1))
        return [[(0, _share(n, 4, 8)), *((d, d) for d in near)]]

    def sees(self, p: Problem, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        if p.seq_len <= PLAIN_CAUSAL:
            return super().sees(p, device)
        buckets, window = self._buckets(p), _share(p.seq_len, 4, 8)

        def inside(h: Tensor, d: Tensor) -> Tensor:
            apart = 3 * d % buckets
            return (d >= 0) & ((apart <= 1) | (apart == buckets - 1) | (d <= window))

        return inside

    def _buckets(self, p: Problem) -> int:
        return max(2, p.seq_len // _share(p.seq_len, 8, 64))
