"""What rows of training say: rates, speed-ups beside their two ceilings; none of it is stored.

The ceilings of a speed-up over the fastest dense step. Zero cost: the dense step over the step of
the same model with q + k + v in place of attention. Amdahl: 1 / (1 - a + a / s), with a the share
that kernels of attention have of the dense step, and s the speed-up of the attention call by
itself, by the device clock.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from statistics import fmean, variance
from typing import NamedTuple

from bench.derived import BASELINE, Cell, by_kind, cell_of, compare, in_order, problem_of
from bench.figures import Value
from bench.record import STEP, Row
from bench.step_attention import IDENTITY

PART = 0.1  # of the steps at either end, whose mean losses are compared
ERRORS = 3  # standard errors of their difference that are no noise
SPLIT = 0.03  # share of a step by which its two parts may miss what it took unobserved


class Training:
    """Steps of one model at one length, and the attention calls that they made.

    Whatever a row lacks, or is not `ok` for, comes out as None.

    Attributes:
        head: any row of a step.
        calls: of the cells' own attention calls, the rows by the device clock, forward + backward.
        cells: by METHOD_ORDER, the identity last.
    """

    def __init__(self, steps: Sequence[Row], calls: dict[Cell, Row]) -> None:
        self.head, self.calls = steps[0], calls
        self.rows = {cell_of(row): row for row in steps}
        order = in_order(row.method for row in steps if row.method != IDENTITY.name)
        order.append(IDENTITY.name)
        self.cells = sorted(self.rows, key=lambda cell: order.index(cell.method))

    @property
    def measured(self) -> str:
        """UTC time of its last row."""
        return max(row.time_utc for row in self.rows.values())

    def us(self, cell: Cell | None) -> float | None:
        row = self.rows.get(cell)
        return row.median_us if row is not None and row.status == "ok" else None

    def best(self, method: str, params: str | None) -> Cell | None:
        """The fastest backend of a method."""
        own = [c for c in self.cells if c[:2] == (method, params) and self.us(c)]
        return min(own, key=self.us, default=None)

    @cached_property
    def dense(self) -> Cell | None:
        return self.best(BASELINE, None)

    def speedup(self, cell: Cell, over: Cell | None = None) -> Value | None:
        """Over the fastest dense step, or over another."""
        over = over or self.dense
        if not (self.us(over) and self.us(cell)):
            return None
        return _ratio(self.rows[over], self.rows[cell])

    def zero_cost(self) -> float | None:
        dense, bare = self.us(self.dense), self.us(self.best(IDENTITY.name, None))
        return dense / bare if dense and bare else None

    def amdahl(self, cell: Cell, calls: Mapping[Cell, Row] | None = None) -> Value | None:
        """By its own calls' times, or by those of another run of the same problem."""
        calls = self.calls if calls is None else calls
        if self.no_amdahl(cell) or not {cell, self.dense} <= calls.keys():
            return None
        share = attention_share(self.rows[self.dense])
        call = _ratio(calls[self.dense], calls[cell])
        return Value(*(gain and 1 / (1 - share + share / gain) for gain in call))

    def no_amdahl(self, cell: Cell) -> str | None:
        """Why a cell has no figure by Amdahl's law, or None."""
        if self.head.world_size > 1:
            return "with several processes, what they send each other runs beside attention"
        if self.dense is None or not attention_share(self.rows[self.dense]):
            return "no dense step was split by kernel"
        if (slowed := -missed(self.rows[self.dense])) > SPLIT:  # launches were waited for
            return f"CUPTI made the dense step {slowed:.1%} longer"
        for call in (self.calls.get(self.dense), self.calls.get(cell)):
            if call is None or not call.median_us:
                told = call.reason if call is not None and call.reason else "not measured"
                return f"no device time of the attention call ({told})"
        return None


def trainings(rows: Iterable[Row]) -> list[Training]:
    """One for each problem, model, data, number of processes, recipe and machine, as they appear.

    Of two rows of a cell the later counts.
    """
    grouped: dict[tuple, list[Row]] = {}
    calls: dict[tuple, dict[Cell, Row]] = {}
    before: dict[tuple, Row] = {}  # a step's own call has its row before the step's
    for row in rows:
        of_cell = row.run, problem_of(row), cell_of(row)
        if (row.phase, row.clock) == ("fwd_bwd", "device"):
            before[of_cell] = row
        elif row.phase == STEP:
            grouped.setdefault(_setting(row), []).append(row)
            if call := before.pop(of_cell, None):
                calls.setdefault(_setting(row), {})[cell_of(row)] = call
    return [Training(steps, calls.get(key, {})) for key, steps in grouped.items()]


def latest(found: Sequence[Training]) -> list[Training]:
    """Of trainings that differ in recipe or machine alone, the last measured; by N and so on."""
    by_time = sorted(found, key=lambda x: x.measured)
    kept = {_column(x.head): x for x in by_time}
    return sorted(kept.values(), key=lambda x: (x.head.world_size, x.head.seq_len))


def _column(row: Row) -> tuple:
    names = "device", "model", "data", "world_size", "batch", "seq_len", "dtype"
    return tuple(getattr(row, name) for name in names)


def attention_share(row: Row) -> float | None:
    """Of the step."""
    whole = (row.attention_us or 0) + (row.other_us or 0)
    return row.attention_us / whole if row.world_size == 1 and whole else None


def products_share(row: Row) -> float | None:
    """Of the step: matrix products that are no attention's."""
    if not row.step_kernels or row.attention_us is None:
        return None
    return by_kind(row.step_kernels)["product"] / (row.attention_us + row.other_us)


def tokens_per_s(row: Row) -> Value | None:
    """Over all processes, with the ends of the 99 % interval."""
    if row.status != "ok" or not row.median_us:
        return None
    tokens = (row.world_size or 1) * row.batch * row.seq_len * 1e6
    return Value(*(us and tokens / us for us in (row.median_us, row.ci_high_us, row.ci_low_us)))


def utilisation(row: Row) -> float | None:
    """Model FLOPs over what a large matrix product reaches on the same chip in that time."""
    if row.status != "ok" or not (row.median_us and row.model_flops and row.matmul_tflop_s):
        return None
    return row.model_flops / row.median_us * 1e-6 / row.matmul_tflop_s


def scaling(row: Row, rows: Iterable[Row]) -> Value | None:
    """Tokens/s over those of one process of the same cell and code times the number of processes.

    One by the same recipe where there is one; of several, the last.
    """
    if row.world_size == 1 or not (own := tokens_per_s(row)):
        return None
    alone = [x for x in rows if x.world_size == 1 and _scales(x) == _scales(row)]
    alone = [x for x in alone if x.phase == STEP and tokens_per_s(x)]
    single = max(alone, key=lambda x: (x.recipe == row.recipe, x.time_utc), default=None)
    if single is None:
        return None
    alone = Value(*(rate and row.world_size * rate for rate in tokens_per_s(single)))
    return quotient(own, alone)


def quotient(a: Value, b: Value) -> Value:
    """A over B; its ends are as far apart as those of the two can be."""
    ends = (a.low, b.high), (a.high, b.low)
    return Value(a.y / b.y, *(x / y if x and y else None for x, y in ends))


class Fall(NamedTuple):
    """Mean losses over the first and the last steps after the warm-up, so many each.

    Attributes:
        highest: loss of any step after the warm-up: one of a spike, where there is one.
        clear: whether the last are below the first by more than their noise.
    """

    steps: int
    first: float
    last: float
    highest: float
    clear: bool


def fall(row: Row) -> Fall | None:
    """How far a text's loss fell; None for random tokens, which teach nothing, and few steps."""
    timed = len(row.samples) + row.discarded
    count = round(PART * timed)
    if row.data == "random" or not row.losses or count < 2:
        return None
    losses = [float(loss) for loss in row.losses.split(";")][-timed:]
    ends = losses[:count], losses[-count:]
    first, last = map(fmean, ends)
    error = math.sqrt(sum(variance(end) / count for end in ends))
    return Fall(count, first, last, max(losses), first - last > ERRORS * error)


def missed(row: Row) -> float | None:
    """Share of a step that its two parts do not add up to; negative where they exceed it."""
    if row.attention_us is None or row.other_us is None or not row.median_us:
        return None
    return 1 - (row.attention_us + row.other_us) / row.median_us


def _ratio(over: Row, under: Row) -> Value:
    """One median over the other, with its interval where both have samples."""
    ratio = over.median_us / under.median_us
    if not (over.samples and under.samples):
        return Value(ratio)
    interval = compare(over, under)
    return Value(ratio, interval.low, interval.high)


def job_of(row: Row) -> tuple:
    """What a run measures once: a later row of it replaces those before."""
    return *_model(row), row.world_size, row.recipe, cell_of(row)


def _scales(row: Row) -> tuple:
    """What one process and several have in common."""
    return *_model(row), cell_of(row), row.code, row.torch, row.driver


def _setting(row: Row) -> tuple:
    """What rows share that one table compares; not code, which a user's own method has its own."""
    machine = row.host, row.torch, row.driver
    return *_model(row), row.world_size, row.recipe, *machine


def _model(row: Row) -> tuple:
    return *problem_of(row), row.model, row.data
