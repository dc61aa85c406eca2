"""Tables of training, from rows alone, and what is said of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from bench.compare import LIMIT
from bench.derived import BASELINE, Cell
from bench.figures import Value
from bench.record import Row
from bench.report import NOTHING, WIDE
from bench.step_attention import IDENTITY
from bench.trainings import (
    SPLIT,
    Training,
    attention_share,
    fall,
    missed,
    scaling,
    tokens_per_s,
    trainings,
    utilisation,
)

TABLE = {
    "method": "left", "backend": "left", "tokens/s": "right", "±": "right", "step": "right",
    "x fastest dense": "right", "Amdahl": "right", "zero cost": "right",
    "x same backend": "right", "% of matmul": "right", "attention": "right", "memory": "right",
    "loss": "right", "scaling": "right",
}  # fmt: skip
# Of the columns that are shown.
LEGEND = {
    "±": "the farther end of the 99 % interval",
    "x fastest dense": "speed-up of the step over `standard` on its fastest backend",
    "Amdahl": "what the speed-up of the attention call by itself allows",
    "zero cost": "what attention that costs nothing would give",
    "% of matmul": "the model's FLOPs over what a large matrix product reaches on this chip",
    "attention": "its kernels' share of the step, by their names, so that what varlen copies to "
    "pack its sequences counts as the rest",
    "loss": "of the last timed step",
    "scaling": "tokens/s over those of one process times processes",
}


def one_line(row: Row) -> str:
    """What a row says while a run goes on."""
    rate = tokens_per_s(row)
    if rate is None:
        return f"{row.status}: {row.reason}"
    return f"{rate.y:,.0f} tokens/s, {_duration(row.median_us)} a step, loss {_loss(row)}"


def print_training(rows: Sequence[Row], console: Console) -> None:
    """A table for each model and length."""
    found, shown = trainings(rows), set()
    for training in found:
        table = _table(training, rows)
        shown |= {column.header for column in table.columns}
        console.print(table)
        for cell in training.cells:
            for words in remarks(training.rows[cell]):
                console.print(f"{cell.label}, {cell.backend}: {words}")
        _print_missing(training, console)
        _print_warnings(training, console)
    if told := [f"{name}: {text}" for name, text in LEGEND.items() if name in shown]:
        console.print(f"{'. '.join(told)}.", style="dim", highlight=False)


def remarks(row: Row) -> Iterator[str]:
    """What a figure does not show: why there is none, and what is wrong with it."""
    if row.status != "ok":
        yield f"{row.status}, {row.reason}"
    elif row.reason:
        yield row.reason
    elif abs(missed(row) or 0) > SPLIT:
        yield f"steps that CUPTI looked at took {-missed(row):+.1%} of the others' time"
    if (ends := fall(row)) and not ends.clear:
        yield (
            f"the loss does not fall: {ends.first:.4g} over the first {ends.steps} steps, "
            f"{ends.last:.4g} over the last"
        )


def _print_warnings(training: Training, console: Console) -> None:
    """What cannot be right, or is not known well, and what to do about it."""
    rates = [rate for row in training.rows.values() if (rate := tokens_per_s(row))]
    wide = sum(_half_width(rate) > WIDE for rate in rates)
    remedy = "end other work on the machine, or take more --steps"
    if wide:
        console.print(f"warning: {wide} medians are known to worse than {WIDE:.0%}: {remedy}.")
    if (training.zero_cost() or 1) < 1 / LIMIT:
        console.print(f"warning: attention of zero cost was slower than {BASELINE}'s: {remedy}.")
    for cell in training.cells:
        gain, bound = training.speedup(cell), training.amdahl(cell)
        if gain and bound and (gain.low or gain.y) > (bound.high or bound.y):
            console.print(
                f"warning: {cell.label}, {cell.backend}: the step's {gain.y:.2f}x is above "
                f"Amdahl's {bound.y:.2f}x by more than the intervals: the call or the split was "
                f"taken at other clocks of the chip, or attention inside the model is faster than "
                f"its call; {remedy}."
            )


def _print_missing(training: Training, console: Console) -> None:
    """Why cells have no figure by Amdahl's law, where a device was timed at all."""
    reasons: dict[str, list[str]] = {}
    for cell in training.cells if training.calls else ():
        if (
            training.us(cell)
            and cell.method != IDENTITY.name
            and (why := training.no_amdahl(cell))
        ):
            reasons.setdefault(why, []).append(f"{cell.label} on {cell.backend}")
    for why, cells in reasons.items():
        console.print(f"no Amdahl figure of {', '.join(cells)}: {why}")


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
    bound = training.amdahl(cell) if real else None
    return [
        cell.label, cell.backend, f"{rate.y:,.0f}", f"{_half_width(rate):.1%}",
        _duration(row.median_us),
        _number(training.speedup(cell) and training.speedup(cell).y),
        _number(bound and bound.y),
        _number(training.zero_cost() if real else None),
        _number(training.us(same) and training.speedup(cell, same).y),
        _number(utilisation(row), ".1%"), _number(attention_share(row), ".1%"),
        _number(row.peak_bytes and row.peak_bytes / 2**30, ".1f", " GiB"),
        _loss(row), _number(scaling(row, rows), ".1%"),
    ]  # fmt: skip


def _duration(us: float) -> str:
    return f"{us / 1e6:.1f} s" if us >= 1e7 else f"{us / 1000:.4g} ms"


def _number(value: float | None, form: str = ".2f", unit: str = "") -> str:
    return NOTHING if value is None else f"{value:{form}}{unit}"


def _loss(row: Row) -> str:
    if not row.losses:
        return NOTHING
    ends = fall(row)
    return row.losses.rpartition(";")[2] + (" not falling" if ends and not ends.clear else "")


def title(row: Row, length: bool = True) -> str:
    """What trains, and how; without N where a figure or a table has that on an axis."""
    tokens = row.world_size * row.batch * row.seq_len
    processes = f" · {row.world_size} processes" if row.world_size > 1 else ""
    n = f" · N {row.seq_len}" if length else ""
    data = "" if row.data == "random" else f" · {row.data}"
    return f"{row.model}{n} · {tokens} tokens a step{processes} · {row.dtype}{data} · {row.device}"
