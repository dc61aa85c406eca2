"""The paper's speeds, from rows of a sweep: its micro-benchmark, and tokens/s of Table 2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields

from bench.derived import BASELINE, Board, Cell, boards, compare, problem_of
from bench.paper import MICRO_BENCHMARK, READINGS, TABLE_2_ATTENTION
from bench.record import CLOCKS, Row
from bench.specs import parameters_text
from methods import METHODS, Problem

BACKEND = "flex"  # of Table 2: the one that runs every method
POINT_METHODS = tuple(reading["SPAttention"] for reading in READINGS.values())
ATTENTION_ALONE = "attention alone"
TABLE_2_MODEL = "table2"  # of `train`
# Phases that tokens/s are taken from, the better first.
TOKENS_FROM = {"step": "a training step", "fwd_bwd": ATTENTION_ALONE}


@dataclass(frozen=True, kw_only=True)
class Point:
    """Forward + backward of one method at the micro-benchmark's shape, by one clock.

    Attributes:
        dense_us: of `standard` on the same backend; speedup is over it, with its 99 % interval.
        fastest: the fastest dense backend; over_fastest the speed-up over it.
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
    fastest: str
    over_fastest: float
    ideal_elements: float | None
    ideal_blocks: float | None


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """A line of Table 2: tokens/s of a name of the paper in one reading of that name.

    Attributes:
        reading: "as published" or "as released" (the stand-ins).
        name, method: the paper's name, and the preset.
        measured: "a training step", or "attention alone".
        ratio: over Standard. rank: 1 is the most tokens/s of the reading.
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
    tokens_per_s: float | None = None
    ratio: float | None = None
    rank: int | None = None
    reason: str | None = None


def micro_benchmark(rows: Iterable[Row], source: str) -> list[Point]:
    """A line for each clock, backend and mask of SPAttention that was timed at that shape."""
    found = [
        board
        for board in boards(rows)
        if _is_at(board.head, MICRO_BENCHMARK) and board.head.batch == MICRO_BENCHMARK.batch
    ]
    return [
        point
        for board in found
        for cell in board.cells
        if cell.method in POINT_METHODS and (point := _point(board, cell, source))
    ]


def _point(board: Board, cell: Cell, source: str) -> Point | None:
    dense, phase = next(iter(board.dense(cell.backend)), None), "fwd_bwd"
    if dense is None or not (board.us(dense, phase) and board.us(cell, phase)):
        return None
    over, under = board.row(dense, phase), board.row(cell, phase)
    interval = compare(over, under) if over.samples and under.samples else None
    fastest = board.fastest_dense(phase)
    return Point(
        device=under.device, torch=under.torch, source=source, method=cell.method,
        backend=cell.backend, clock=under.clock, dtype=under.dtype,
        blocks=f"{under.q_block}x{under.kv_block}", us=under.median_us, dense_us=over.median_us,
        speedup=over.median_us / under.median_us,
        low=interval and interval.low,
        high=interval and interval.high,
        fastest=fastest.backend,
        over_fastest=board.us(fastest, phase) / under.median_us,
        ideal_elements=board.ideal_by_elements(cell),
        ideal_blocks=board.ideal_by_blocks(cell),
    )  # fmt: skip


def throughput(rows: Sequence[Row], source: str) -> list[Throughput]:
    """Table 2, once in each reading; no line where `standard` was not timed at its shape.

    A training step is one of the paper's own model, on the most processes that it ran on.
    """
    timed = [
        r
        for r in rows
        if r.backend == BACKEND and _is_at(r, TABLE_2_ATTENTION) and _is_preset(r)
        and r.model in (None, TABLE_2_MODEL)
    ]  # fmt: skip
    for phase in TOKENS_FROM:
        for clock in CLOCKS:
            chosen = [row for row in timed if (row.phase, row.clock) == (phase, clock)]
            bases = [r for r in chosen if r.method == BASELINE and r.status == "ok"]
            if bases:
                base = max(bases, key=lambda row: row.world_size or 1)
                alike = {r.method: r for r in chosen if _run_of(r) == _run_of(base)}
                return [line for name in READINGS for line in _reading(name, alike, base, source)]
    return []


def _run_of(row: Row) -> tuple:
    """What two rows share whose times may be divided."""
    return problem_of(row), row.model, row.world_size, row.data


def _is_preset(row: Row) -> bool:
    """Whether a row's parameters are those of the preset of its name."""
    preset = METHODS.get(row.method)
    return preset is not None and row.params in (None, parameters_text(preset))


def _reading(
    reading: str, rows: Mapping[str, Row], base: Row, source: str
) -> Iterator[Throughput]:
    times = {
        method: rows[method].median_us
        for method in READINGS[reading].values()
        if method in rows and rows[method].status == "ok"
    }
    ranking, processes = sorted(times, key=times.get), base.world_size or 1
    for name, method in READINGS[reading].items():
        line = {
            "device": base.device, "torch": base.torch, "source": source, "reading": reading,
            "name": name, "method": method, "measured": TOKENS_FROM[base.phase],
            "backend": base.backend, "clock": base.clock,
        }  # fmt: skip
        if method in times:
            yield Throughput(
                **line,
                tokens_per_s=processes * base.batch * base.seq_len / times[method] * 1e6,
                ratio=base.median_us / times[method],
                rank=ranking.index(method) + 1,
            )
        else:
            status = rows[method].status if method in rows else "not measured"
            yield Throughput(**line, reason=status)


def _is_at(row: Row, p: Problem) -> bool:
    """Whether a row has the heads and lengths of a problem; batch and dtype may differ."""
    shape = {f.name for f in fields(Problem)} - {"batch", "dtype"}
    return all(getattr(row, name) == getattr(p, name) for name in shape)
