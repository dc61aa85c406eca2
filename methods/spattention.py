"""SPAttention and its ablations (Zhao, Hu et al., AAAI 2026, arXiv:2511.09596).

The causal distances 0..N-1 are cut into one band a head. With w, R = divmod(N, H), head h has the
W_h = w + (h < R) distances from S_h = h*w + min(h, R): equations 2 and 3 of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from methods.banded import Banded, Interval
from methods.method import Problem


def head_bands(p: Problem) -> list[tuple[int, int]]:
    """(S_h, W_h) of each query head: first distance and number of distances."""
    w, rest = divmod(p.seq_len, p.q_heads)
    return [(h * w + min(h, rest), w + (h < rest)) for h in range(p.q_heads)]


@dataclass(frozen=True)
class SPAttention(Banded):
    """SPAttention as its equation 4 defines it; also the paper's ablation EBALL.

    Head h sees key j iff S_h <= i - j < S_h + W_h: every causal pair belongs to exactly one head.
    Queries i < S_h of head h have no key; their output is 0. The bands depend on N, so a prefix
    of a sequence is attended to differently when the sequence grows.

    Deviations: none under causality; the paper has no bidirectional form, here it uses |i - j|.
    """

    name: ClassVar[str] = "spattention"
    paper: ClassVar[str] = "Zhao, Hu et al. 2026, arXiv:2511.09596, eqs. 2 to 4"

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        return [[(start, start + width - 1)] for start, width in head_bands(p)]


@dataclass(frozen=True)
class SPAttentionReleased(Banded):
    """The mask of the paper's released SPAttention.py: own band plus a local band in every head.

    Head h sees key j iff i - j <= W_h or S_h <= i - j < S_h + W_h. About 2.6 (H = 8) to 2.8
    (H = 16) times the pairs of equation 4; no row is empty.
    """

    name: ClassVar[str] = "spattention_released"
    paper: ClassVar[str] = "Harry-Miral/MEHC, SPAttention.py"

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        return [[(0, width), (start, start + width - 1)] for start, width in head_bands(p)]


@dataclass(frozen=True)
class GappedBands(Banded):
    """The ablation GBHALF: the first half of each head's own band.

    Head h sees key j iff S_h <= i - j < S_h + W_h // 2; the other distances are seen by no head.
    """

    name: ClassVar[str] = "gapped_bands"
    paper: ClassVar[str] = "Zhao, Hu et al. 2026, arXiv:2511.09596, ablation GBHALF"

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        return [[(start, start + width // 2 - 1)] for start, width in head_bands(p)]


@dataclass(frozen=True)
class LocalOnly(Banded):
    """The ablation Sliding Window / Local-Only: a window as wide as the head's band.

    Head h sees key j iff 0 <= i - j <= W_h: one distance more than the band has, as released.
    """

    name: ClassVar[str] = "local_only"
    paper: ClassVar[str] = "Zhao, Hu et al. 2026, arXiv:2511.09596, ablation Sliding Window"

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        return [[(0, width)] for _, width in head_bands(p)]
