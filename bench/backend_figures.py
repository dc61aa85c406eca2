"""One picture a method: its backends, and those of the baseline, against N."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.derived import BASELINE, PROBLEM, Board, Cell, boards
from bench.figures import AXES, PHASES, doubling_axis, draw_series, log_scale, tokens_per_s
from bench.record import CLOCKS, Row
from bench.report import problem_title
from bench.style import Style, save

AXIS = "seq_len"
COLOURS = ("#4a9fd8", "#d1420c", "#2f8f57", "#f0b429", "#6a3d9a", "#a08040", "#cc79a7", "#0b4f8a")
MARKERS = "soD^vPX*"


def draw_backends(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A figure for each method that two backends ran at two lengths or more.

    Returns:
        The files, .png and .svg: backends_PHASE_CLOCK_METHOD, one for each other setting (_2 ...).
    """
    folder.mkdir(parents=True, exist_ok=True)
    everything, written = boards(rows), []
    for clock in CLOCKS:
        settings: dict[tuple, list[Board]] = defaultdict(list)
        for board in everything:
            if board.head.clock == clock:
                others = tuple(getattr(board.head, x) for x in PROBLEM if x != AXIS)
                settings[others].append(board)
        numbers: dict[str, int] = defaultdict(int)
        for found in settings.values():
            found.sort(key=lambda board: board.head.seq_len)
            for name, figure in _figures(found):
                numbers[name] += 1
                stem = name + (f"_{numbers[name]}" if numbers[name] > 1 else "")
                written += save(figure, folder / stem)
    return written


def _figures(found: Sequence[Board]) -> Iterator[tuple[str, Figure]]:
    cells = dict.fromkeys(cell for board in found for cell in board.cells)
    for method, params in dict.fromkeys((c.method, c.params) for c in cells):
        if method == BASELINE:
            continue
        own = [c for c in cells if (c.method, c.params) == (method, params)]
        for phase in PHASES:
            timed = [cell for cell in own if _points(found, cell, phase) > 1]
            if len(timed) > 1:
                dense = [c for c in cells if c.method == BASELINE and _points(found, c, phase) > 1]
                stem = f"backends_{phase}_{found[0].head.clock}_{method}"
                yield stem, _figure(found, phase, timed, dense)
                break


def _points(found: Sequence[Board], cell: Cell, phase: str) -> int:
    return sum(board.us(cell, phase) is not None for board in found)


def _figure(
    found: Sequence[Board], phase: str, timed: Sequence[Cell], dense: Sequence[Cell]
) -> Figure:
    figure = Figure((7.6, 4.6), dpi=140, layout="constrained")
    axes, head = figure.subplots(), found[0].head
    across = [board.head.seq_len for board in found]
    backends = list(dict.fromkeys(cell.backend for cell in (*timed, *dense)))
    ys = []
    for cell in (*timed, *dense):
        look, sparse = backends.index(cell.backend) % len(COLOURS), cell.method != BASELINE
        style = Style(
            COLOURS[look], MARKERS[look], "-" if sparse else "--", "full" if sparse else "none"
        )  # fmt: skip
        values = [tokens_per_s(board, cell, phase) for board in found]
        draw_series(axes, across, values, style, f"{cell.method}, {cell.backend}")
        ys += [value.y for value in values if value]
    log_scale(axes, min(ys), max(ys))
    axes.yaxis.set_minor_locator(NullLocator())
    doubling_axis(axes, across)
    axes.set_xlabel(AXES[AXIS], fontsize=9)
    axes.set_ylabel("tokens/s", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3.5)
    what = f"tokens/s · {PHASES[phase]} · {timed[0].label} by backend · {head.clock} clock"
    shared = problem_title(head, without={AXIS})
    figure.suptitle(f"{what}\n{shared}", fontsize=9, x=0.02, ha="left")
    return figure
