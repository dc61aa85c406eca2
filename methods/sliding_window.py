"""Sliding-window attention, the same in every head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from methods.banded import Banded, Interval
from methods.method import Problem


@dataclass(frozen=True)
class SlidingWindow(Banded):
    """Sliding window: query i sees key j iff 0 <= i - j < window (|i - j| where not causal).

    Attributes:
        window: distances, the query's own position included (transformers' convention).
    """

    name: ClassVar[str] = "sliding_window"
    paper: ClassVar[str] = "Jiang et al. 2023, arXiv:2310.06825"
    window: int = 512

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 1:
            raise ValueError(
                f"sliding_window: window is {self.window!r}; it must be a whole number above 0"
            )

    def grows(self, causal: bool = True) -> bool:
        return True

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        return [[(0, self.window - 1)]]
