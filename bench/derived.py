"""What tables and figures derive from rows: speed-ups, ideals, rates; none of it is stored."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from bench.record import CLOCKS, Row
from bench.stats import Ratio, ratio_interval

BASELINE = "standard"
# In every table and figure; methods that are not listed follow in their order of appearance.
METHOD_ORDER = (
    BASELINE, "sliding_window", "local_only", "spattention", "spattention_released",
    "gapped_bands", "longformer", "bigbird", "reformer", "mehc_longformer", "mehc_bigbird",
    "mehc_reformer",
)  # fmt: skip
# Everything that two rows must share before their times may be divided; the clock is the rest.
PROBLEM = (
    "device", "batch", "seq_len", "q_heads", "kv_heads", "head_dim", "dtype", "causal", "q_block",
    "kv_block",
)  # fmt: skip
# Multiply and add of the two (forward) or five (backward) products of an allowed pair, times D.
FLOPS_PER_PAIR = {"fwd": 4, "bwd": 10, "fwd_bwd": 14}
# Rows that share these had their samples interleaved: a run that is gone on with has others later.
# The code may differ, since that of a method of the user's own has the user's file in it.
ROUNDS = "run", "time_utc", "host", "device"
UNPAIRED = 1 << 30  # round numbers from here on meet no other row's


class Cell(NamedTuple):
    """A row of a table: a method with its parameters on a backend."""

    method: str
    params: str | None
    backend: str

    @property
    def label(self) -> str:
        return f"{self.method}:{self.params}" if self.params else self.method


class Gain(NamedTuple):
    """A speed-up, and the phase whose two times were divided."""

    value: float
    phase: str


Rival = Callable[[str], Cell | None]


class Board:
    """The rows of one problem by one clock, and what follows from them.

    Whatever a row lacks, or is not `ok` for, comes out as None. Where a cell was measured twice
    the later row counts.

    Attributes:
        head: any row: it has the problem and the clock.
        cells: by backend in order of appearance, then by METHOD_ORDER.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.head = rows[0]
        self._rows = {(cell_of(row), row.phase): row for row in rows}
        backends = list(dict.fromkeys(row.backend for row in rows))
        methods = in_order(row.method for row in rows)
        self.cells = sorted(
            {cell: None for cell, _ in self._rows},
            key=lambda cell: (backends.index(cell.backend), methods.index(cell.method)),
        )

    def row(self, cell: Cell, phase: str) -> Row | None:
        return self._rows.get((cell, phase))

    def us(self, cell: Cell, phase: str) -> float | None:
        """Median in microseconds."""
        row = self.row(cell, phase)
        return row.median_us if row is not None and row.status == "ok" else None

    def dense(self, backend: str | None = None) -> list[Cell]:
        """The baseline on one backend, or on all."""
        return [c for c in self.cells if c.method == BASELINE and backend in (None, c.backend)]

    def fastest_dense(self, phase: str) -> Cell | None:
        return self.fastest(BASELINE, phase)

    def fastest(self, method: str, phase: str) -> Cell | None:
        """A method's cell with the least time, whatever its backend and parameters."""
        timed = [cell for cell in self.cells if cell.method == method and self.us(cell, phase)]
        return min(timed, key=lambda cell: self.us(cell, phase), default=None)

    def tokens_per_s(self, cell: Cell) -> float | None:
        us = self.us(cell, "fwd_bwd")
        return us and self.head.batch * self.head.seq_len / us * 1e6

    def over_same_backend(self, cell: Cell, phase: str | None = None) -> Gain | None:
        """Speed-up over the baseline on the same backend: fwd_bwd where both have it, else fwd."""
        return self._gain(cell, phase, lambda _: next(iter(self.dense(cell.backend)), None))

    def over_fastest_dense(self, cell: Cell, phase: str | None = None) -> Gain | None:
        return self._gain(cell, phase, self.fastest_dense)

    def ideal_by_elements(self, cell: Cell) -> float | None:
        """Allowed pairs of the baseline over those of the method: the same on every backend."""
        pairs = self._pairs(cell, "allowed_pairs")
        dense = (self._pairs(other, "allowed_pairs") for other in self.dense())
        return _ratio(next(filter(None, dense), None), pairs)

    def ideal_by_blocks(self, cell: Cell) -> float | None:
        """Pairs in the blocks that the baseline visits on this backend, over the method's."""
        dense = (self._pairs(other, "computed_pairs") for other in self.dense(cell.backend))
        return _ratio(next(filter(None, dense), None), self._pairs(cell, "computed_pairs"))

    def ideal(self, cell: Cell) -> float | None:
        """By blocks; by elements where the backend has no block lists."""
        has_blocks = self._pairs(cell, "computed_pairs") is not None
        return self.ideal_by_blocks(cell) if has_blocks else self.ideal_by_elements(cell)

    def efficiency(self, cell: Cell, phase: str | None = None) -> Gain | None:
        """Measured over ideal speed-up, both over the baseline on the same backend."""
        gain, ideal = self.over_same_backend(cell, phase), self.ideal(cell)
        return Gain(gain.value / ideal, gain.phase) if gain and ideal else None

    def tflop_per_s(self, cell: Cell) -> Gain | None:
        """Arithmetic of the allowed pairs over the median of fwd_bwd, else of fwd."""
        pairs = self._pairs(cell, "allowed_pairs")
        for phase in ("fwd_bwd", "fwd"):
            if (us := self.us(cell, phase)) and pairs is not None:
                flops = FLOPS_PER_PAIR[phase] * self.head.head_dim * pairs * self.head.batch
                return Gain(flops / us * 1e-6, phase)
        return None

    def percent_of_matmul(self, cell: Cell) -> Gain | None:
        """TFLOP/s over the rate of a large matrix product, which the run measured on this chip."""
        rate = self.tflop_per_s(cell)
        ceiling = rate and self.row(cell, rate.phase).matmul_tflop_s
        return Gain(100 * rate.value / ceiling, rate.phase) if ceiling else None

    def prepare_share(self, cell: Cell) -> float | None:
        """Part of the forward that makes the mask from the inputs, gathers included."""
        return _ratio(self.us(cell, "prepare"), self.us(cell, "fwd"))

    def peak_bytes(self, cell: Cell) -> int | None:
        return self._pairs(cell, "peak_bytes")

    def _gain(self, cell: Cell, phase: str | None, rival_in: Rival) -> Gain | None:
        for option in (phase,) if phase else ("fwd_bwd", "fwd"):
            rival = rival_in(option)
            value = rival and _ratio(self.us(rival, option), self.us(cell, option))
            if value:
                return Gain(value, option)
        return None

    def _pairs(self, cell: Cell, field: str) -> int | None:
        """A count that every phase of a cell shares; some rows of it may lack it."""
        counts = (getattr(row, field) for (c, _), row in self._rows.items() if c == cell)
        return max((count for count in counts if count is not None), default=None)


def compare(over: Row, under: Row) -> Ratio:
    """One row's median over the other's; rounds pair where both were sampled in the same ones.

    Raises:
        ValueError: a row has no samples.
    """
    together = all(getattr(over, name) == getattr(under, name) for name in ROUNDS)
    paired = together and over.rounds and under.rounds
    return ratio_interval(_by_round(over, 0), _by_round(under, 0 if paired else UNPAIRED))


def _by_round(row: Row, offset: int) -> dict[int, float]:
    numbers = map(int, row.rounds.split(";")) if row.rounds else range(len(row.samples))
    return {offset + k: us for k, us in zip(numbers, row.samples, strict=True)}


def boards(rows: Iterable[Row]) -> list[Board]:
    """One for each problem and clock, problems in order of appearance; `layout` is in none.

    `prepare`, a part of `fwd`, is only in those that have something else.
    """
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.phase in FLOPS_PER_PAIR or row.phase == "prepare":
            grouped.setdefault(problem_of(row), []).append(row)
    return [
        Board(chosen)
        for group in grouped.values()
        for clock in CLOCKS
        if (chosen := [row for row in group if row.clock == clock])
        and any(row.phase != "prepare" for row in chosen)
    ]


def problem_of(row: Row) -> tuple:
    return tuple(getattr(row, name) for name in PROBLEM)


def in_order(methods: Iterable[str]) -> list[str]:
    """Distinct method names in the order of every table and figure."""
    names = list(dict.fromkeys(methods))
    return [m for m in METHOD_ORDER if m in names] + [m for m in names if m not in METHOD_ORDER]


def cell_of(row: Row) -> Cell:
    return Cell(row.method, row.params, row.backend)


def _ratio(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def labels(cells: Sequence[Cell]) -> list[str]:
    """Names alone where a method has one set of parameters (a note gives them), else both."""
    variants = defaultdict(set)
    for cell in cells:
        variants[cell.method].add(cell.params)
    return [cell.label if len(variants[cell.method]) > 1 else cell.method for cell in cells]


def by_kind(step_kernels: str) -> Counter[str]:
    """Microseconds of a step by kind of kernel, from what its row says."""
    found: Counter[str] = Counter()
    try:
        for line in step_kernels.split(";"):
            us, kind, _ = line.split(" ", 2)
            found[kind] += float(us)
    except ValueError:
        raise ValueError(
            f"step_kernels is {step_kernels[:80]!r}, not lists of us, kind and name"
        ) from None
    return found
