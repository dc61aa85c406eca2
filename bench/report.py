"""Tables in the terminal and in the README, drawn from rows alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from bench.derived import Board, Cell, Gain, boards, labels, problem_of
from bench.notes import NOTHING, PHASE_NAMES, half_width, notes, styled
from bench.record import STEP, Row

METHOD_WIDTH = 34
LEGEND = (
    "Times are medians, ± the farther end of the 99 % interval. Speed-ups (x) are over "
    "`standard`, on the same backend and on the fastest dense one, of fwd+bwd; f: of fwd, where "
    "fwd+bwd was not measured for both. Ideal: pairs of `standard` over pairs of the method, by "
    "elements and by blocks that a kernel visits. Efficiency: x same backend over ideal by blocks "
    "(by elements on a backend without block lists). TFLOP/s: 4 D flops an allowed pair forward, "
    "14 D fwd+bwd."
)
OF_MATMUL = " % of matmul: of the rate that a large matrix product reaches on the same chip."


def print_report(rows: Sequence[Row], console: Console) -> None:
    for renderable in tables(rows):
        console.print(renderable)


def tables(rows: Sequence[Row]) -> list[RenderableType]:
    """One table a problem and clock, then the legend; each fits itself to the width it gets."""
    on_device = {
        problem_of(row)
        for row in rows
        if (row.clock, row.phase, row.status) == ("device", "fwd_bwd", "ok")
    }
    found = [
        BoardTable(board, board.head.clock != "host" or problem_of(board.head) not in on_device)
        for board in boards(rows)
    ]
    layouts = _layouts(rows)
    if not found:
        if rows and all(row.phase == STEP for row in rows):
            return []  # which a training's own tables show
        return layouts or [Text("\n".join(["No measurement to show.", *_refusals(rows)]))]
    legend = LEGEND + (OF_MATMUL if any(row.matmul_tflop_s for row in rows) else "")
    return [*found, *layouts, Text(legend, style="dim")]


def _layouts(rows: Sequence[Row]) -> list[RenderableType]:
    """What building the block lists took, once a problem: a table for all lengths."""
    grouped: dict[str, dict[tuple[str, int], tuple[str, str]]] = {}
    built = [row for row in rows if row.phase == "layout" and row.median_us]
    cells = list(dict.fromkeys(Cell(row.method, row.params, "") for row in built))
    names = dict(zip(cells, labels(cells), strict=True))
    for row in built:
        label = names[Cell(row.method, row.params, "")]
        texts = grouped.setdefault(problem_title(row, without=["seq_len"]), {})
        texts[label, row.seq_len] = f"{row.median_us:.0f}", _spread(row)
    found: list[RenderableType] = []
    for title, texts in grouped.items():
        lengths = sorted({n for _, n in texts})
        table = plain_table()
        table.add_column("method", overflow="fold", max_width=METHOD_WIDTH)
        for n in lengths:
            table.add_column(f"N {n}", justify="right", no_wrap=True)
        parts = 2 if len(lengths) <= 3 else 1  # beside more there is no room for intervals
        for label in dict.fromkeys(label for label, _ in texts):
            times = (texts.get((label, n), (NOTHING,)) for n in lengths)
            table.add_row(label, *("".join(x[:parts]) for x in times))
        head = Text(f"block lists, built once a problem, us by the host clock\n{title}", "bold")
        found += [head, table, Text()]
    return found


def _refusals(rows: Sequence[Row]) -> Iterator[str]:
    """Why there is nothing to show."""
    for row in {(row.method, row.backend, row.phase): row for row in rows}.values():
        told = f"{row.status}: {row.reason or NOTHING}"
        if row.status == "ok":
            told = "measured; it is shown as a part of fwd, beside it"
        yield f"{row.method} on {row.backend}, {row.phase}: {told}"


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        texts: the cells' texts, in the order of Board.cells.
        keep: where the terminal is narrow, the lowest goes first.
    """

    header: str
    texts: list[str]
    keep: int

    @property
    def name(self) -> str:
        return self.header.replace("-\n", "").replace("\n", " ")

    @property
    def empty(self) -> bool:
        return all(text == NOTHING for text in self.texts)


@dataclass(frozen=True)
class BoardTable:
    """A table that drops columns, least important first, rather than wrapping.

    Attributes:
        tokens: whether tokens/s belongs here; one clock a problem gives them, the device's first.
    """

    board: Board
    tokens: bool

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        columns = [column for column in _columns(self.board, self.tokens) if not column.empty]
        for lowest in sorted({column.keep for column in columns}):
            shown = [column for column in columns if column.keep >= lowest]
            table = _table(self.board, shown)
            if fits(table, console, options):
                break
        yield Text(problem_title(self.board.head, without=["device"]), style="bold")
        yield Text(self._subtitle(), style="dim")
        yield table
        if hidden := [column.name for column in columns if column not in shown]:
            yield Text(f"not shown at this width: {', '.join(hidden)}", style="dim")
        yield from notes(self.board)
        yield Text()

    def _subtitle(self) -> str:
        clock = self.board.head.clock
        tokens = f", tokens/s by the {clock} clock" if self.tokens and clock != "device" else ""
        return f"{clock} clock{tokens} · {self.board.head.device}"


def plain_table() -> Table:
    """Without columns: the look of every table on a terminal."""
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)


def fits(table: Table, console: Console, options: ConsoleOptions) -> bool:
    """Whether nothing of a table is cut or wrapped at a width."""
    unbounded = options.update(max_width=1000)
    return Measurement.get(console, unbounded, table).maximum <= options.max_width


def problem_title(row: Row, *, without: Container[str] = ()) -> str:
    """A problem in words, less the fields in `without`: those that a figure has on an axis."""
    parts = {
        "seq_len": f"N {row.seq_len}",
        "batch": f"batch {row.batch}",
        "q_heads": f"{row.q_heads} heads",
        "kv_heads": f"{row.kv_heads} kv heads" if row.kv_heads != row.q_heads else None,
        "head_dim": f"head_dim {row.head_dim}",
        "dtype": row.dtype,
        "causal": "causal" if row.causal else "not causal",
        "q_block": f"blocks {row.q_block}x{row.kv_block}",
        "device": row.device,
    }
    return " · ".join(text for name, text in parts.items() if text and name not in without)


def _columns(board: Board, tokens: bool) -> list[Column]:
    def each(header: str, keep: int, text: Callable[[Cell], str]) -> Column:
        return Column(header, [text(cell) for cell in board.cells], keep)

    rates = [rate.value for cell in board.cells if (rate := board.tflop_per_s(cell))]
    digits = 1 if min(rates, default=1) >= 1 else 3  # of a CPU
    columns = [
        _times(board, "fwd", 9),
        _times(board, "bwd", 5),
        _times(board, "fwd_bwd", 9),
        each("tokens/s", 8, lambda cell: quantity(board.tokens_per_s(cell))),
        each("x same\nbackend", 9, lambda cell: _gain(board.over_same_backend(cell))),
        each("x fastest\ndense", 7, lambda cell: _gain(board.over_fastest_dense(cell))),
        each("ideal\nelements", 3, lambda cell: _number(board.ideal_by_elements(cell), 2)),
        each("ideal\nblocks", 4, lambda cell: _number(board.ideal_by_blocks(cell), 2)),
        each("effi-\nciency", 6, lambda cell: _gain(board.efficiency(cell))),
        each("TFLOP/s", 2, lambda cell: _gain(board.tflop_per_s(cell), digits)),
        each("% of\nmatmul", 3, lambda cell: _gain(board.percent_of_matmul(cell), 1)),
        each("peak\nmemory", 1, lambda cell: _bytes(board.peak_bytes(cell))),
    ]
    return [column for column in columns if tokens or column.header != "tokens/s"]


def _table(board: Board, columns: Sequence[Column]) -> Table:
    table = plain_table()
    table.add_column("method", overflow="fold", max_width=METHOD_WIDTH)
    table.add_column("backend", no_wrap=True)
    for column in columns:
        table.add_column(column.header, justify="right", no_wrap=True)
    sizes = Counter(cell.backend for cell in board.cells)
    following = [*board.cells[1:], board.cells[-1]]
    for index, (cell, label) in enumerate(zip(board.cells, labels(board.cells), strict=True)):
        texts = [styled(column.texts[index]) for column in columns]
        after = following[index].backend
        apart = cell.backend != after and max(sizes[cell.backend], sizes[after]) > 1
        table.add_row(label, cell.backend, *texts, end_section=apart)
    return table


def _times(board: Board, phase: str, keep: int) -> Column:
    """Medians in one unit, to be compared by eye; a status where there is none."""
    timed = [us for cell in board.cells if (us := board.us(cell, phase))]
    unit, scale = ("ms", 1e-3) if max(timed, default=0) >= 10_000 else ("us", 1.0)
    smallest = min(timed, default=1) * scale
    digits = min(3, max(0, 2 - math.floor(math.log10(smallest))))
    texts = []
    for cell in board.cells:
        row = board.row(cell, phase)
        if row is None or (row.status == "ok" and row.median_us is None):
            texts.append(NOTHING)
        elif row.status != "ok":
            texts.append(row.status)
        else:
            texts.append(f"{row.median_us * scale:.{digits}f}{_spread(row)}")
    return Column(f"{PHASE_NAMES[phase]}\n{unit}", texts, keep)


def _spread(row: Row) -> str:
    if row.ci_low_us is None or row.ci_high_us is None:
        return " " * 6
    percent = 100 * half_width(row)
    return f" {f'±{percent:.{0 if percent >= 9.95 else 1}f}%':>5}"


def _gain(gain: Gain | None, digits: int = 2) -> str:
    """What says nothing is of fwd+bwd, and as wide, so that points stay aligned."""
    if gain is None:
        return NOTHING
    return f"{gain.value:.{digits}f}{'f' if gain.phase == 'fwd' else ' '}"


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def quantity(value: float | None) -> str:
    """Three digits and a unit: 37.6 M."""
    if value is None:
        return NOTHING
    scale, unit = next((x for x in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if value >= x[0]), (1, ""))
    digits = max(0, 2 - math.floor(math.log10(value / scale)))
    return f"{value / scale:.{digits}f} {unit}".rstrip()


def _bytes(count: int | None) -> str:
    if count is None:
        return NOTHING
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
