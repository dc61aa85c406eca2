"""The paper's speeds, from rows of a sweep: its micro-benchmark, and tokens/s of Table 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import permutations

from bench.cells import SLOWED
from bench.compare import verdict
from bench.derived import BASELINE, Board, Cell, boards, compare, problem_of
from bench.paper import MICRO_BENCHMARK, READINGS, TABLE_2_ATTENTION
from bench.record import CLOCKS, STEP, Row
from bench.specs import parameters_text
from bench.stats import Ratio
from bench.step_attention import trains
from methods import METHODS, Problem

BACKEND = "flex"  # of Table 2: the one that runs every method
EAGER = "eager"  # FlexAttention as the released code calls it
POINT_METHODS = tuple(reading["SPAttention"] for reading in READINGS.values())
TRAINING, ATTENTION_ALONE = "a training step", "attention alone"
AS_RELEASED = "a training step, FlexAttention not compiled"
TABLE_2_MODEL = "table2"  # of `train`
UNCOMPILED_MODEL = f"{TABLE_2_MODEL} uncompiled"  # by --no-compiled
# What tokens/s are measured by -> phase, model and backend of its rows.
TOKENS_FROM = {
    TRAINING: (STEP, TABLE_2_MODEL, BACKEND),
    AS_RELEASED: (STEP, UNCOMPILED_MODEL, EAGER),
    ATTENTION_ALONE: ("fwd_bwd", None, BACKEND),
}
NAMED = {preset for reading in READINGS.values() for preset in reading.values()}
NOT_MEASURED = "not measured"


@dataclass(frozen=True, kw_only=True)
class Point:
    """Forward + backward of one method at the micro-benchmark's shape, by one clock.

    Attributes:
        dense_us: of `standard` on the same backend; speedup is over it, with its 99 % interval.
        fastest: the fastest dense backend; over_fastest the speed-up over it. Both are None where
            no other backend was timed beside this one.
        ideal_elements, ideal_blocks: bounds of the speed-up, by pairs and by touched blocks.
    """

    device: str
    torch: str
    source: str
    method: str
    backend: str
    clock: str
    dtype: str
    blocks: str
    us: float
    dense_us: float
    speedup: float
    low: float | None
    high: float | None
    fastest: str | None
    over_fastest: float | None
    ideal_elements: float | None
    ideal_blocks: float | None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """A line of Table 2: tokens/s of a name of the paper in one reading of that name.

    Attributes:
        reading: "as published" or "as released" (the stand-ins).
        name, method: the paper's name, and the preset.
        measured: a key of TOKENS_FROM.
        processes, tokens: GPUs, and tokens of one step or call on all of them.
        data: of training: "random", or the name of a text.
        common_rounds: whether the samples of all methods come from the same rounds.
        ratio: over Standard, with its 99 % interval, which rows without samples lack.
        rank_low: 1 and the methods of the reading that samples tell to be faster by 1 %.
        rank_high: the methods of the reading that samples do not tell to be slower by 1 %, itself
            included. Both are among the methods of the reading that were measured.
        reason: why there are no figures, which are then None.
    """

    device: str
    torch: str
    source: str
    reading: str
    name: str
    method: str
    measured: str
    backend: str
    clock: str
    dtype: str
    processes: int
    tokens: int
    data: str | None
    common_rounds: bool
    tokens_per_s: float | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    rank_low: int | None = None
    rank_high: int | None = None
    reason: str | None = None


def micro_benchmark(rows: Iterable[Row], source: str) -> list[Point]:
    """A line for each clock, backend and mask of SPAttention that was timed at that shape.

    Of several runs the last one's; what says that CUPTI made it too long is no time.
    """
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        at_point = _is_at(row, MICRO_BENCHMARK) and row.batch == MICRO_BENCHMARK.batch
        if at_point and SLOWED not in (row.reason or ""):
            runs.setdefault(_run_of(row), []).append(row)
    in_time = sorted(runs.values(), key=lambda run: max(row.time_utc for row in run))
    points = (
        _point(board, cell, source)
        for run in in_time
        for board in boards(run)
        for cell in board.cells
        if cell.method in POINT_METHODS
    )
    last = {(x.device, x.dtype, x.clock, x.backend, x.method, x.blocks): x for x in points if x}
    return list(last.values())


def _point(board: Board, cell: Cell, source: str) -> Point | None:
    dense, phase = next(iter(board.dense(cell.backend)), None), "fwd_bwd"
    if dense is None or not (board.us(dense, phase) and board.us(cell, phase)):
        return None
    over, under = board.row(dense, phase), board.row(cell, phase)
    interval = _speed(under, over)
    alone = {cell.backend for cell in board.dense()} == {cell.backend}
    fastest = None if alone else board.fastest_dense(phase)
    return Point(
        device=under.device, torch=under.torch, source=source, method=cell.method,
        backend=cell.backend, clock=under.clock, dtype=under.dtype,
        blocks=f"{under.q_block}x{under.kv_block}", us=under.median_us, dense_us=over.median_us,
        speedup=over.median_us / under.median_us,
        low=interval and interval.low,
        high=interval and interval.high,
        fastest=fastest and fastest.backend,
        over_fastest=fastest and board.us(fastest, phase) / under.median_us,
        ideal_elements=board.ideal_by_elements(cell),
        ideal_blocks=board.ideal_by_blocks(cell),
    )  # fmt: skip


def throughput(rows: Sequence[Row], source: str) -> list[Throughput]:
    """Table 2 by training steps, compiled and as released, and by attention alone, each in both
    readings.

    There are no lines where `standard` was not timed at its shape. A training step is one of the
    paper's own model.
    """
    timed = [row for row in rows if _is_at(row, TABLE_2_ATTENTION) and _is_preset(row)]
    lines: list[Throughput] = []
    for measured, (phase, model, backend) in TOKENS_FROM.items():
        kind = {(phase, backend, None), (phase, backend, model)}
        run = _best_run([row for row in timed if (row.phase, row.backend, row.model) in kind])
        for reading in READINGS if run else ():
            lines += _reading(reading, measured, run, source)
    return lines


def _best_run(rows: Sequence[Row]) -> dict[str, Row]:
    """Method -> row, of one run with `standard`, by the first clock there is.

    Of several the one that measured most names of the table, then on the most processes, then
    the last.
    """
    runs: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        runs.setdefault((row.clock, *_run_of(row)), {})[row.method] = row
    whole = [run for run in runs.values() if BASELINE in run and run[BASELINE].status == "ok"]

    def worth(run: Mapping[str, Row]) -> tuple[int, int, int, str]:
        base = run[BASELINE]
        named = sum(row.status == "ok" and row.method in NAMED for row in run.values())
        return -CLOCKS.index(base.clock), named, base.world_size or 1, base.time_utc

    return max(whole, key=worth, default={})


def _run_of(row: Row) -> tuple:
    """What rows share whose times may be divided."""
    ran = row.run, row.code, row.host, row.torch
    return *problem_of(row), row.model, row.world_size, row.data, *ran


def _speed(row: Row, over: Row) -> Ratio | None:
    """How many times as fast as the other; None where one has no samples."""
    return compare(over, row) if over.samples and row.samples else None


def _is_preset(row: Row) -> bool:
    """Whether a row's parameters are those of the preset of its name."""
    preset = METHODS.get(row.method)
    return preset is not None and row.params in (None, parameters_text(preset))


def _reading(
    reading: str, measured: str, run: Mapping[str, Row], source: str
) -> Iterator[Throughput]:
    names, base = READINGS[reading], run[BASELINE]
    timed = {m: run[m] for m in names.values() if m in run and run[m].status == "ok"}
    ranks = _ranks(timed)
    tokens = (base.world_size or 1) * base.batch * base.seq_len
    for name, method in names.items():
        line = {
            "device": base.device, "torch": base.torch, "source": source, "reading": reading,
            "name": name, "method": method, "measured": measured,
            "backend": base.backend, "clock": base.clock, "dtype": base.dtype,
            "processes": base.world_size or 1, "tokens": tokens, "data": base.data,
            "common_rounds": all(row.rounds for row in timed.values()),
        }  # fmt: skip
        if method not in timed:
            yield Throughput(**line, reason=_reason(run.get(method), method, measured))
            continue
        speed = None if method == BASELINE else _speed(timed[method], base)
        low, high = ranks[method]
        yield Throughput(
            **line,
            tokens_per_s=tokens / timed[method].median_us * 1e6,
            ratio=base.median_us / timed[method].median_us,
            low=speed and speed.low, high=speed and speed.high,
            rank_low=low, rank_high=high,
        )  # fmt: skip


def _ranks(rows: Mapping[str, Row]) -> dict[str, tuple[int, int]]:
    """First and last rank that samples leave each method."""
    ranks = {method: [1, len(rows)] for method in rows}
    for fast, slow in permutations(rows, 2):
        speed = _speed(rows[fast], rows[slow])
        if speed is not None and verdict(speed) == "faster":
            ranks[fast][1] -= 1
            ranks[slow][0] += 1
    return {method: (low, high) for method, (low, high) in ranks.items()}


def _reason(row: Row | None, method: str, measured: str) -> str:
    if row is not None:
        return row.status
    cannot = trains(METHODS[method]) if measured != ATTENTION_ALONE else None
    return f"{NOT_MEASURED}: {cannot}" if cannot else NOT_MEASURED


def _is_at(row: Row, p: Problem) -> bool:
    """Whether a row has the heads and lengths of a problem; batch and dtype may differ."""
    shape = {f.name for f in fields(Problem)} - {"batch", "dtype"}
    return all(getattr(row, name) == getattr(p, name) for name in shape)
