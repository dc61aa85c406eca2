"""Dense multi-head attention (Vaswani et al. 2017), the baseline of every speed-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from methods.banded import Banded, Interval
from methods.method import Problem


@dataclass(frozen=True)
class Standard(Banded):
    """Dense attention: query i sees every key j <= i, and every key where not causal."""

    name: ClassVar[str] = "standard"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv:1706.03762"

    def grows(self, causal: bool = True) -> bool:
        return True

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        return [[(0, p.seq_len - 1)]]
