"""Figures from rows alone: curves over N and over heads, a PNG and an SVG each."""

from __future__ import annotations

import itertools
import math
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from bench.derived import BASELINE, PROBLEM, Board, Cell, boards, compare
from bench.masks import draw_masks
from bench.record import CLOCKS, Row
from bench.report import problem_title
from bench.style import FASTEST_DENSE, Style, save, styles

COLUMNS, PANELS = 3, 6
LEGEND_INCHES = 2.2
PHASES = {"fwd_bwd": "forward + backward", "fwd": "forward"}
AXES = {"seq_len": "sequence length N (k = 1024)", "q_heads": "query heads"}


class Value(NamedTuple):
    """What is drawn for a cell, with the ends of its 99 % interval where they are known."""

    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Kind:
    """One sort of figure.

    Attributes:
        name: how its files begin.
        axis: the field across: "seq_len" or "q_heads".
        label: of the y axis.
        value: (board, cell, phase, backend of the baseline) -> Value or None.
        scale: of the y axis: a function (axes, smallest, largest).
        unity: what a line at 1 means, or None for no line; the baseline itself is then left out.
        ideal: whether the ideal speed-up is drawn too.
        rival: whether the fastest dense backend is drawn too.
    """

    name: str
    axis: str
    label: str
    value: Callable[[Board, Cell, str, str], Value | None]
    scale: Callable[[Axes, float, float], None]
    unity: str | None = None
    ideal: bool = False
    rival: bool = True


def _time(board: Board, cell: Cell, phase: str, backend: str) -> Value | None:
    us, row = board.us(cell, phase), board.row(cell, phase)
    return us and Value(us, row.ci_low_us, row.ci_high_us)


def tokens_per_s(board: Board, cell: Cell, phase: str, backend: str = "") -> Value | None:
    time = _time(board, cell, phase, backend)
    tokens = board.head.batch * board.head.seq_len * 1e6
    # The slow end of the time is the low end of the rate.
    return time and Value(*(x and tokens / x for x in (time.y, time.high, time.low)))


def _speedup(board: Board, cell: Cell, phase: str, backend: str) -> Value | None:
    dense = next(iter(board.dense(backend)), None)
    if not (dense and board.us(dense, phase) and board.us(cell, phase)):
        return None
    over, under = board.row(dense, phase), board.row(cell, phase)
    ratio = over.median_us / under.median_us
    if not (over.samples and under.samples):
        return Value(ratio)
    interval = compare(over, under)
    return Value(ratio, interval.low, interval.high)


def _efficiency(board: Board, cell: Cell, phase: str, backend: str) -> Value | None:
    speedup, ideal = _speedup(board, cell, phase, backend), board.ideal(cell)
    return Value(*(x and x / ideal for x in speedup)) if speedup and ideal else None


def log_scale(axes: Axes, smallest: float, largest: float) -> None:
    axes.set_yscale("log")
    span = largest / smallest
    subs = (1, 1.5, 2, 3, 4, 5, 7) if span < 6 else (1, 2, 5) if span < 300 else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))


def _seconds(axes: Axes, smallest: float, largest: float) -> None:
    log_scale(axes, smallest, largest)
    engineering = EngFormatter(unit="s")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda us, _: engineering(us * 1e-6)))


def factor_scale(axes: Axes, smallest: float, largest: float) -> None:
    axes.set_yscale("log", base=2)
    halves = () if largest > 16 * smallest else (1.5,)
    ticks = sorted(f * 2.0**power for f in (1, *halves) for power in range(-10, 16))
    seen = [tick for tick in ticks if smallest / 2 <= tick <= 2 * largest]  # others take time, too
    axes.yaxis.set_major_locator(FixedLocator(seen))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))


def _share(axes: Axes, smallest: float, largest: float) -> None:
    axes.set_ylim(0, max(1.1, 1.1 * largest))


KINDS = (
    Kind("tokens_per_s", "seq_len", "tokens/s", tokens_per_s, log_scale),
    Kind(
        "speedup", "seq_len", "speed-up over standard", _speedup, factor_scale, BASELINE,
        ideal=True,
    ),
    Kind(
        "efficiency", "seq_len", "measured / ideal speed-up", _efficiency, _share, "ideal",
        rival=False,
    ),
    Kind("time_by_heads", "q_heads", "time", _time, _seconds),
)  # fmt: skip


def draw_all(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Every figure that the rows have at least two points for, and the masks of their methods.

    Returns:
        The files, each as .png and .svg: KIND_PHASE_CLOCK_BACKEND with a panel for each other
        setting (and _2, _3 ... beyond 6 panels), and mask_METHOD.
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything = boards(rows)
    looks = styles(cell for board in everything for cell in board.cells)
    written = []
    for clock in CLOCKS:
        found = [board for board in everything if board.head.clock == clock]
        cells = [cell for board in found for cell in board.cells]
        for backend in dict.fromkeys(c.backend for c in cells if c.method != BASELINE):
            for kind in KINDS:
                for stem, figure in _figures(kind, found, backend, looks):
                    written += save(figure, folder / stem)
    return written + draw_masks(rows, folder)


def _figures(
    kind: Kind, found: Sequence[Board], backend: str, looks: dict[str, Style]
) -> Iterator[tuple[str, Figure]]:
    """File names without suffix, and figures: of forward + backward where the backend has it."""
    own = {c for board in found for c in board.cells if c.backend == backend}
    sparse = [cell for cell in own if cell.method != BASELINE]
    phase = next((x for x in PHASES if any(b.us(c, x) for b in found for c in sparse)), "fwd")
    panels: dict[tuple, list[Board]] = defaultdict(list)
    for board in sorted(found, key=lambda board: getattr(board.head, kind.axis)):
        if own.intersection(board.cells):
            panels[_setting(kind, board.head)].append(board)
    drawn = [
        panel
        for panel in panels.values()
        if sum(any(kind.value(b, c, phase, backend) for c in sparse) for b in panel) > 1
    ]
    for page, start in enumerate(range(0, len(drawn), PANELS), 1):
        stem = f"{kind.name}_{phase}_{found[0].head.clock}_{backend}"
        drawing = Drawing(kind, backend, phase, drawn[start : start + PANELS], looks)
        yield stem + (f"_{page}" if page > 1 else ""), drawing.figure()


def _setting(kind: Kind, row: Row) -> tuple:
    """The problem less the axis; as many kv heads as heads counts as one setting."""
    values = {name: getattr(row, name) for name in PROBLEM if name != kind.axis}
    if row.kv_heads == row.q_heads:
        values["kv_heads"] = None
    return tuple(values.items())


@dataclass(frozen=True)
class Drawing:
    """One figure: panels of boards in the order of the axis, one legend, title and caption."""

    kind: Kind
    backend: str
    phase: str
    panels: list[list[Board]]
    looks: dict[str, Style]

    def figure(self) -> Figure:
        columns = min(COLUMNS, len(self.panels))
        rows = -(-len(self.panels) // columns)
        width = 5.4 if columns == 1 else 3.5 * columns
        figure = Figure((LEGEND_INCHES + width, 1.3 + 3.0 * rows), dpi=140, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False, sharey=self._shares_y)
        axes = list(grid.flat)
        for place, panel in zip(axes, self.panels, strict=False):
            self._draw(place, panel)
        for place in axes[len(self.panels) :]:
            place.remove()
        self._scale(axes[: len(self.panels)])
        self._explain(figure, axes[: len(self.panels)])
        return figure

    def _draw(self, axes: Axes, panel: Sequence[Board]) -> None:
        across = [getattr(board.head, self.kind.axis) for board in panel]
        for cell in self._cells(panel):
            if self.kind.unity and cell.method == BASELINE:
                continue
            look = self.looks[cell.label]
            values = [self.kind.value(board, cell, self.phase, self.backend) for board in panel]
            draw_series(axes, across, values, look, _legend_text(cell.label))
            if self.kind.ideal:
                ideal = [board.ideal(cell) or np.nan for board in panel]
                axes.plot(across, ideal, "--", color=look.colour, linewidth=1, zorder=1)
        if self.kind.rival:
            dense = [board.fastest_dense(self.phase) for board in panel]
            if any(cell is not None and cell.backend != self.backend for cell in dense):
                pairs = zip(panel, dense, strict=True)
                values = [c and self.kind.value(b, c, self.phase, self.backend) for b, c in pairs]
                draw_series(
                    axes, across, values, FASTEST_DENSE, "standard on the\nfastest backend"
                )
        if self.kind.unity:
            axes.axhline(1, color="#000000", linewidth=1, zorder=1, label=self.kind.unity)
        doubling_axis(axes, _apart(across))
        axes.set_xlim(across[0] / 1.3, across[-1] * 1.3)

    def _cells(self, panel: Sequence[Board]) -> list[Cell]:
        order = list(self.looks)
        cells = {c for board in panel for c in board.cells if c.backend == self.backend}
        return sorted(cells, key=lambda cell: order.index(cell.label))

    def _scale(self, axes: Sequence[Axes]) -> None:
        for group in [axes] if self._shares_y else [[place] for place in axes]:
            lines = [line for place in group for line in place.lines]
            ys = np.concatenate([np.asarray(line.get_ydata(), float) for line in lines])
            for place in group:
                self.kind.scale(place, np.nanmin(ys), np.nanmax(ys))
                place.yaxis.set_minor_locator(NullLocator())

    @property
    def _shares_y(self) -> bool:
        """Panels of several lengths have times too far apart for one axis."""
        return self.kind.axis == "seq_len"

    @cached_property
    def _varying(self) -> set[str]:
        """Fields of the problem that the panels do not share."""
        settings = [dict(_setting(self.kind, panel[0].head)) for panel in self.panels]
        varying = {n for n in settings[0] if len({setting[n] for setting in settings}) > 1}
        # A title names both sides of a block at once.
        return varying | ({"q_block"} if "kv_block" in varying else set())

    def _title(self, panel: Sequence[Board]) -> str:
        return problem_title(panel[0].head, without={*PROBLEM} - self._varying)

    def _explain(self, figure: Figure, axes: Sequence[Axes]) -> None:
        for index, (place, panel) in enumerate(zip(axes, self.panels, strict=True)):
            place.set_title(textwrap.fill(self._title(panel), 36), fontsize=9)
            place.set_xlabel(AXES[self.kind.axis], fontsize=9)
            if index % COLUMNS == 0:
                place.set_ylabel(self.kind.label, fontsize=9)
        head = self.panels[0][0].head
        what = (self.kind.label, PHASES[self.phase], self.backend, f"{head.clock} clock")
        shared = problem_title(head, without={self.kind.axis, *self._varying})
        room = int(13 * (figure.get_figwidth() - LEGEND_INCHES))
        lines = [line for text in (" · ".join(what), shared) for line in textwrap.wrap(text, room)]
        figure.suptitle("\n".join(lines), fontsize=10, x=0.02, ha="left")
        figure.supxlabel("\n".join(self._caption()), fontsize=8, color="#444444")
        self._legend(figure, axes)

    def _legend(self, figure: Figure, axes: Sequence[Axes]) -> None:
        entries = {}
        for place in axes:
            handles, labels = place.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        if self.kind.ideal:
            entries["ideal, by colour"] = Line2D([], [], color="#444444", linestyle="--", lw=1)
        figure.legend(
            entries.values(), entries.keys(), loc="outside right upper", fontsize=8,
            frameon=False, handlelength=3.5,
        )  # fmt: skip
        height = 0.3 + sum(0.2 + 0.14 * label.count("\n") for label in entries)
        figure.set_figheight(max(height, figure.get_figheight()))

    def _caption(self) -> Iterator[str]:
        """What the bars are, and why there are gaps."""
        ideal = " Ideal: by blocks (by elements where the backend has none)."
        yield "Bars: 99 % interval." + (ideal if self.kind.unity else "")
        missing: dict[tuple[str, str, str], list[str]] = defaultdict(list)
        for panel in self.panels:
            title = f" ({self._title(panel)})" if len(self.panels) > 1 else ""
            for board, cell in itertools.product(panel, self._cells(panel)):
                row = board.row(cell, self.phase)
                if row is not None and row.status != "ok":
                    place = length_text(getattr(board.head, self.kind.axis))
                    missing[cell.label, row.status, title].append(place)
        symbol = "N" if self.kind.axis == "seq_len" else "heads"
        for (label, status, title), places in missing.items():
            yield f"No point: {label}, {status} at {symbol} = {', '.join(places)}{title}"


def draw_series(
    axes: Axes, across: Sequence[int], values: Sequence[Value | None], look: Style, label: str
) -> None:
    """A line with gaps where there is no value, and bars where there is an interval."""
    ys = [value.y if value else np.nan for value in values]
    if np.isnan(ys).all():
        return
    axes.plot(
        across, ys, color=look.colour, marker=look.marker, linestyle=look.line, label=label,
        fillstyle=look.fill, linewidth=1.6, markersize=5.5, markeredgewidth=1.2,
    )  # fmt: skip
    known = [(x, v) for x, v in zip(across, values, strict=True) if v and v.low and v.high]
    if known:
        # A ratio of medians can lie just outside the interval of its common rounds.
        reach = [(max(0, v.y - v.low), max(0, v.high - v.y)) for _, v in known]
        xs, centres = [x for x, _ in known], [v.y for _, v in known]
        axes.errorbar(
            xs, centres, np.transpose(reach), fmt="none", ecolor=look.colour, elinewidth=1,
            capsize=2.5,
        )  # fmt: skip


def doubling_axis(axes: Axes, ticks: Sequence[int]) -> None:
    """Numbers across that double from tick to tick, and a grid behind what is drawn."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: length_text(round(x))))
    axes.set_axisbelow(True)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.tick_params(labelsize=8)


def length_text(count: int) -> str:
    return f"{count // 1024}k" if count >= 1024 and count % 1024 == 0 else str(count)


def _apart(ticks: Iterable[int]) -> list[int]:
    """Those of the ticks that leave room for their labels on a logarithmic axis."""
    ticks = sorted(set(ticks))
    room = math.log(ticks[-1] / ticks[0]) / 9
    kept = ticks[:1]
    for tick in ticks[1:]:
        if math.log(tick / kept[-1]) >= room:
            kept.append(tick)
    return kept


def _legend_text(label: str) -> str:
    """A method's name, and its parameters on lines of their own."""
    name, _, parameters = label.partition(":")
    return "\n".join([name, *textwrap.wrap(parameters.replace(",", ", "), 24)])
