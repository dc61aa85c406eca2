"""Training from rows alone: tokens/s, speed-ups beside their two ceilings, tables and figures.

The ceilings of a speed-up over the fastest dense step. Zero cost: the dense step over the step of
the same model with q + k + v in place of attention. Amdahl: T / (T - A + A / s), with T the dense
step, A its time in kernels of attention, and s the speed-up of the attention call by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator
from rich import box
from rich.console import Console
from rich.table import Table

from bench.compare import LIMIT
from bench.derived import BASELINE, PROBLEM, Cell, boards, compare, in_order
from bench.figures import Value, doubling_axis, draw_series, factor_scale, log_scale
from bench.record import STEP, Row
from bench.report import WIDE, labels
from bench.step_attention import IDENTITY
from bench.style import Style, save, styles

NOTHING = "-"
SPLIT = 0.03  # share of a step by which its two parts may miss it without a word
TABLE = {
    "method": "left", "backend": "left", "tokens/s": "right", "±": "right", "step": "right",
    "x fastest dense": "right", "Amdahl": "right", "zero cost": "right",
    "x same backend": "right", "% of matmul": "right", "attention": "right", "memory": "right",
    "loss": "right", "scaling": "right",
}  # fmt: skip
LEGEND = (
    "± the farther end of the 99 % interval. x: speed-up of the step over `standard` on its "
    "fastest backend, and on the same one. Amdahl: what the speed-up of the attention call by "
    "itself allows; zero cost: what attention that costs nothing would give. % of matmul: of the "
    "rate of a large matrix product on this chip. attention: its share of the step, by kernel. "
    "loss: of the last timed step. scaling: tokens/s over those of one process times processes."
)
CEILING = Style("#000000", "|", (0, (1, 1)))


class Training:
    """Steps of one model at one length, and the attention calls that they made.

    Whatever a row lacks, or is not `ok` for, comes out as None.

    Attributes:
        head: any row of a step.
        cells: by METHOD_ORDER, the identity last.
    """

    def __init__(self, steps: Sequence[Row], calls: dict[Cell, float]) -> None:
        self.head, self.calls = steps[0], calls
        self.rows = {_cell(row): row for row in steps}
        order = in_order(row.method for row in steps if row.method != IDENTITY.name)
        order.append(IDENTITY.name)
        self.cells = sorted(self.rows, key=lambda cell: order.index(cell.method))

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
        ratio = self.us(over) / self.us(cell)
        if not (self.rows[over].samples and self.rows[cell].samples):
            return Value(ratio)
        interval = compare(self.rows[over], self.rows[cell])
        return Value(ratio, interval.low, interval.high)

    def zero_cost(self) -> float | None:
        dense, bare = self.us(self.dense), self.us(self.best(IDENTITY.name, None))
        return dense / bare if dense and bare else None

    def amdahl(self, cell: Cell) -> float | None:
        step, calls = self.us(self.dense), [self.calls.get(c) for c in (self.dense, cell)]
        share = step and self.rows[self.dense].attention_us
        if not share or not all(calls):
            return None
        return step / (step - share + share * calls[1] / calls[0])


def trainings(rows: Iterable[Row]) -> list[Training]:
    """One for each model, number of processes and problem, in order of appearance."""
    rows = list(rows)
    grouped: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.phase == STEP:
            grouped.setdefault(_setting(row), []).append(row)
    calls: dict[tuple, dict[Cell, float]] = {}
    for board in reversed(boards(rows)):  # the device's clock comes first and counts
        timed = {cell: us for cell in board.cells if (us := board.us(cell, "fwd_bwd"))}
        key = tuple(getattr(board.head, name) for name in PROBLEM)
        calls.setdefault(key, {}).update(timed)
    return [Training(steps, calls.get(key[: len(PROBLEM)], {})) for key, steps in grouped.items()]


def tokens_per_s(row: Row) -> Value | None:
    """Over all processes, with the ends of the 99 % interval."""
    if row.status != "ok" or not row.median_us:
        return None
    tokens = row.world_size * row.batch * row.seq_len * 1e6
    return Value(*(us and tokens / us for us in (row.median_us, row.ci_high_us, row.ci_low_us)))


def utilisation(row: Row) -> float | None:
    """Model FLOPs over what a large matrix product reaches on the same chip in that time."""
    if row.status != "ok" or not (row.median_us and row.model_flops and row.matmul_tflop_s):
        return None
    return row.model_flops / row.median_us * 1e-6 / row.matmul_tflop_s


def scaling(row: Row, rows: Iterable[Row]) -> float | None:
    """Tokens/s over those of one process of the same cell times the number of processes."""
    if row.world_size == 1 or not (own := tokens_per_s(row)):
        return None
    for other in rows:
        if other.world_size == 1 and _cell(other) == _cell(row):
            same = _setting(other)[:-1] == _setting(row)[:-1]
            if same and (single := tokens_per_s(other)):
                return own.y / (row.world_size * single.y)
    return None


def missed(row: Row) -> float | None:
    """Share of the step that its two parts do not add up to; negative where they exceed it."""
    if row.attention_us is None or not row.median_us:
        return None
    return 1 - (row.attention_us + row.other_us) / row.median_us


def one_line(row: Row) -> str:
    """What a row says while a run goes on."""
    rate = tokens_per_s(row)
    if rate is None:
        return f"{row.status}: {row.reason}"
    return f"{rate.y:,.0f} tokens/s, {row.median_us / 1000:.4g} ms a step, loss {_loss(row)}"


def print_training(rows: Sequence[Row], console: Console) -> None:
    """A table for each model and length."""
    found = trainings(rows)
    for training in found:
        console.print(_table(training, rows))
        for cell in training.cells:
            row = training.rows[cell]
            if row.status != "ok":
                console.print(f"{cell.label}, {cell.backend}: {row.status}, {row.reason}")
            elif abs(missed(row) or 0) > SPLIT:
                console.print(f"{cell.label}, {cell.backend}: attention and the other kernels "
                              f"leave {missed(row):.1%} of the step")  # fmt: skip
        _print_warnings(training, console)
    if found:
        console.print(LEGEND, style="dim")


def _print_warnings(training: Training, console: Console) -> None:
    """What cannot be right, or is not known well, and what to do about it."""
    rates = [rate for row in training.rows.values() if (rate := tokens_per_s(row))]
    wide = sum(_half_width(rate) > WIDE for rate in rates)
    remedy = "end other work on the machine, or take more --steps"
    if wide:
        console.print(f"warning: {wide} medians are known to worse than {WIDE:.0%}: {remedy}.")
    if (training.zero_cost() or 1) < 1 / LIMIT:
        console.print(f"warning: attention of zero cost was slower than {BASELINE}'s: {remedy}.")


def _half_width(rate: Value) -> float:
    """The farther end of the interval, as a share."""
    return max((abs(end / rate.y - 1) for end in (rate.low, rate.high) if end), default=0.0)


def _table(training: Training, rows: Sequence[Row]) -> Table:
    head = training.head
    table = Table(title=title(head), title_justify="left", box=box.SIMPLE_HEAD)
    lines = [_line(training, cell, rows) for cell in training.cells]
    for place, (name, justify) in enumerate(TABLE.items()):
        if any(line[place] != NOTHING for line in lines):
            table.add_column(name, justify=justify)
    for line in lines:
        kept = [any(other[k] != NOTHING for other in lines) for k in range(len(TABLE))]
        table.add_row(*(text for text, keep in zip(line, kept, strict=True) if keep))
    return table


def _line(training: Training, cell: Cell, rows: Sequence[Row]) -> list[str]:
    row, rate = training.rows[cell], tokens_per_s(training.rows[cell])
    if rate is None:
        return [cell.label, cell.backend, row.status, *[NOTHING] * (len(TABLE) - 3)]
    real = cell.method != IDENTITY.name
    same = cell._replace(method=BASELINE, params=None)
    share = row.attention_us and row.attention_us / row.median_us
    return [
        cell.label, cell.backend, f"{rate.y:,.0f}", f"{_half_width(rate):.1%}",
        f"{row.median_us / 1000:.4g} ms",
        _number(training.speedup(cell) and training.speedup(cell).y),
        _number(training.amdahl(cell) if real else None),
        _number(training.zero_cost() if real else None),
        _number(training.us(same) and training.speedup(cell, same).y),
        _number(utilisation(row), ".1%"), _number(share, ".1%"),
        _number(row.peak_bytes and row.peak_bytes / 2**30, ".1f", " GiB"),
        _loss(row), _number(scaling(row, rows), ".1%"),
    ]  # fmt: skip


def _number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return NOTHING if value is None else f"{value:{form}}{unit}"


def _loss(row: Row) -> str:
    return row.losses.rpartition(";")[2] if row.losses else NOTHING


def title(row: Row, length: bool = True) -> str:
    """What trains, and how; without N where a figure or a table has that on an axis."""
    tokens = row.world_size * row.batch * row.seq_len
    processes = f" · {row.world_size} processes" if row.world_size > 1 else ""
    n = f" · N {row.seq_len}" if length else ""
    return f"{row.model}{n} · {tokens} tokens a step{processes} · {row.dtype} · {row.device}"


def draw_training(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Tokens/s and speed-up over N, each method on its fastest backend, and losses over steps.

    Returns:
        The files: training_tokens_per_s_MODEL_PROCESSES and so on, each as .png and .svg.
    """
    grouped: dict[tuple, list[Training]] = {}
    for training in trainings(rows):
        head = training.head
        key = (head.model, head.world_size, head.device, head.batch * head.seq_len)
        grouped.setdefault(key, []).append(training)
    written = []
    for (model, world, *_), found in grouped.items():
        folder.mkdir(parents=True, exist_ok=True)
        found.sort(key=lambda training: training.head.seq_len)
        stem = f"{model.replace(' ', '-')}_{world}"
        looks = styles(cell for training in found for cell in training.cells)
        if len(found) > 1:
            written += save(_rates(found, looks), folder / f"training_tokens_per_s_{stem}")
            written += save(_speedups(found, looks), folder / f"training_speedup_{stem}")
        for training in found:
            if training.head.data != "random":
                name = f"training_loss_{stem}_{training.head.seq_len}"
                written += save(_losses(training, looks), folder / name)
    return written


def _rates(found: Sequence[Training], looks: dict[str, Style]) -> Figure:
    figure, axes = _figure(found, "tokens/s")
    across, drawn = [training.head.seq_len for training in found], []
    for (method, params), name in _methods(found).items():
        best = [training.best(method, params) for training in found]
        values = [c and tokens_per_s(t.rows[c]) for t, c in zip(found, best, strict=True)]
        bare = method == IDENTITY.name
        look = CEILING if bare else looks[Cell(method, params, "").label]
        draw_series(axes, across, values, look, "attention of zero cost" if bare else name)
        drawn += [value.y for value in values if value]
    return _finished(figure, axes, drawn, log_scale)


def _speedups(found: Sequence[Training], looks: dict[str, Style]) -> Figure:
    figure, axes = _figure(found, "speed-up over the fastest dense")
    across, drawn = [training.head.seq_len for training in found], [1.0]
    for (method, params), name in _methods(found).items():
        if method in (BASELINE, IDENTITY.name):
            continue
        look = looks[Cell(method, params, "").label]
        best = [training.best(method, params) for training in found]
        values = [c and t.speedup(c) for t, c in zip(found, best, strict=True)]
        bounds = [c and t.amdahl(c) for t, c in zip(found, best, strict=True)]
        draw_series(axes, across, values, look, name)
        axes.plot(across, [x or np.nan for x in bounds], "--", color=look.colour, lw=1)
        drawn += [value.y for value in values if value] + [x for x in bounds if x]
    axes.plot([], [], "--", color="#444444", linewidth=1, label="Amdahl, by colour")
    ceiling = [bound and Value(bound) for bound in (t.zero_cost() for t in found)]
    draw_series(axes, across, ceiling, CEILING, "attention of zero cost")
    axes.axhline(1, color="#000000", linewidth=1, zorder=1, label=BASELINE)
    drawn += [bound.y for bound in ceiling if bound]
    return _finished(figure, axes, drawn, factor_scale)


def _losses(training: Training, looks: dict[str, Style]) -> Figure:
    figure = Figure((7.6, 4.3), dpi=140, layout="constrained")
    axes = figure.subplots()
    for (method, params), name in _methods([training]).items():
        best = training.best(method, params)
        if best is None or not training.rows[best].losses or method == IDENTITY.name:
            continue
        losses = [float(loss) for loss in training.rows[best].losses.split(";")]
        axes.plot(range(1, len(losses) + 1), losses, color=looks[best.label].colour, lw=1,
                  linestyle=looks[best.label].line, label=name)  # fmt: skip
    axes.set_xlabel("step", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    figure.suptitle(f"{title(training.head)}\n{training.head.data}", fontsize=9, x=0.02, ha="left")
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _methods(found: Iterable[Training]) -> dict[tuple[str, str | None], str]:
    """Methods and parameters, and how a legend names them: by parameters only where it must."""
    cells = [cell for training in found for cell in training.cells]
    return dict(zip((cell[:2] for cell in cells), labels(cells), strict=True))


def _figure(found: Sequence[Training], label: str) -> tuple:
    figure = Figure((7.6, 4.3), dpi=140, layout="constrained")
    axes = figure.subplots()
    axes.set_ylabel(label, fontsize=9)
    axes.set_xlabel("sequence length N (k = 1024)", fontsize=9)
    doubling_axis(axes, [training.head.seq_len for training in found])
    figure.suptitle(title(found[0].head, length=False), fontsize=9, x=0.02, ha="left")
    return figure, axes


def _finished(figure: Figure, axes: object, drawn: Sequence[float], scale: object) -> Figure:
    if drawn:
        scale(axes, min(drawn), max(drawn))
    axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside right upper", fontsize=8, frameon=False, handlelength=3.5)
    figure.supxlabel("Each method on its fastest backend. Bars: 99 % interval.", fontsize=8)
    return figure


def _cell(row: Row) -> Cell:
    return Cell(row.method, row.params, row.backend)


def _setting(row: Row) -> tuple:
    return (*(getattr(row, name) for name in PROBLEM), row.model, row.data, row.world_size)
