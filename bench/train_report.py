"""Tables of training, from rows alone, and what is said of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench.compare import LIMIT
from bench.derived import BASELINE, Cell, labels
from bench.figures import Value
from bench.notes import FEW_TOLD, NOTHING, WIDE
from bench.record import Row
from bench.report import METHOD_WIDTH, fits, plain_table
from bench.stats import FEW
from bench.step_attention import IDENTITY
from bench.trainings import (
    SPLIT,
    Training,
    attention_share,
    fall,
    missed,
    products_share,
    scaling,
    tokens_per_s,
    trainings,
    utilisation,
)

# Columns, and where the terminal is narrow, the lowest goes first.
TABLE = {
    "method": 9, "backend": 9, "tokens/s": 9, "±": 8, "step": 1, "x fastest\ndense": 9,
    "Amdahl": 7, "zero\ncost": 7, "x same\nbackend": 3, "% of\nmatmul": 2, "attention": 4,
    "products": 2, "memory": 5, "loss": 6, "scaling": 9,
}  # fmt: skip
# Of the columns that are shown.
LEGEND = {
    "±": "the farther end of the 99 % interval",
    "x fastest\ndense": "speed-up of the step over `standard` on its fastest backend",
    "Amdahl": "what the speed-up of the attention call by itself allows",
    "zero\ncost": "what attention that costs nothing would give",
    "% of\nmatmul": "the model's FLOPs over what a large matrix product reaches on this chip",
    "attention": "its kernels' share of the step, by their names, so that what is copied for a "
    "kernel, as it can be on backends outside the compiled graph, counts as the rest",
    "products": "the share of matrix products that are no attention's, likewise",
    "loss": "of the last timed step",
    "scaling": "tokens/s over those of one process times processes",
}


def one_line(row: Row) -> str:
    """What a row says while a run goes on."""
    rate = tokens_per_s(row)
    if rate is None:
        return failure(row)
    return f"{rate.y:,.0f} tokens/s, {_duration(row.median_us)} a step, loss {_loss(row)}"


def print_training(rows: Sequence[Row], console: Console) -> None:
    """A table for each model and length."""
    shown: set[str] = set()
    for training in trainings(rows):
        head = training.head
        console.print(Text(title(head), style="bold"))
        console.print(Text(f"torch {head.torch} · {head.host}", style="dim"))
        shown |= _print_table(training, rows, console)
        for cell in training.cells:
            for words in remarks(training.rows[cell]):
                console.print(Text(f"{cell.label}, {cell.backend}: {words}"))
        for note in (*_missing(training), *_warnings(training)):
            console.print(Text(note))
        console.print()
    if told := [f"{_flat(name)}: {text}" for name, text in LEGEND.items() if name in shown]:
        console.print(Text(f"{'. '.join(told)}.", style="dim"))


def remarks(row: Row) -> Iterator[str]:
    """What a figure does not show: why there is none, and what is wrong with it."""
    if row.status != "ok":
        yield failure(row)
    elif row.reason:
        yield row.reason
    elif abs(missed(row) or 0) > SPLIT:
        yield f"steps that CUPTI looked at took {-missed(row):+.1%} of the others' time"
    if (ends := fall(row)) and not ends.clear:
        yield (
            f"the loss does not fall: {ends.first:.4g} over the first {ends.steps} steps, "
            f"{ends.last:.4g} over the last"
        )


def failure(row: Row) -> str:
    return f"{row.status}: {row.reason or 'no reason recorded'}"


def _warnings(training: Training) -> Iterator[str]:
    """What cannot be right, or is not known well, and what to do about it."""
    rates = [rate for row in training.rows.values() if (rate := tokens_per_s(row))]
    wide = sum(_half_width(rate) > WIDE for rate in rates)
    remedy = "end other work on the machine, or take more --steps"
    if wide:
        yield f"warning: {wide} medians are known to worse than {WIDE:.0%}: {remedy}."
    few = sum(0 < len(row.samples) < FEW for row in training.rows.values())
    if few:
        yield f"warning: {few} {FEW_TOLD}: take more --steps."
    if (training.zero_cost() or 1) < 1 / LIMIT:
        yield f"warning: attention of zero cost was slower than {BASELINE}'s: {remedy}."
    for cell in training.cells:
        gain, bound = training.speedup(cell), training.amdahl(cell)
        if gain and bound and (gain.low or gain.y) > (bound.high or bound.y):
            yield (
                f"warning: {cell.label}, {cell.backend}: the step's {gain.y:.2f}x is above "
                f"Amdahl's {bound.y:.2f}x by more than the intervals: the call or the split was "
                f"taken at other clocks of the chip, or the rest of the step is shorter than "
                f"beside dense attention; {remedy}."
            )


def _missing(training: Training) -> Iterator[str]:
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
        yield f"no Amdahl figure of {', '.join(cells)}: {why}"


def _half_width(rate: Value) -> float:
    """The farther end of the interval, as a share."""
    return max((abs(end / rate.y - 1) for end in (rate.low, rate.high) if end), default=0.0)


def _print_table(training: Training, rows: Sequence[Row], console: Console) -> set[str]:
    """Columns that say something, as far as there is room; returns their headings."""
    named = zip(training.cells, labels(training.cells), strict=True)
    texts = ([name, *_line(training, cell, rows)] for cell, name in named)
    lines = [dict(zip(TABLE, line, strict=True)) for line in texts]
    told = [name for name in TABLE if any(line[name] != NOTHING for line in lines)]
    for lowest in sorted({TABLE[name] for name in told}):
        shown = [name for name in told if TABLE[name] >= lowest]
        table = _table(shown, lines)
        if fits(table, console, console.options):
            break
    console.print(table)
    known = {cell.method: cell.params for cell in training.cells if cell.params}
    plain = {line["method"] for line in lines}
    if named := [f"{name} {params}" for name, params in known.items() if name in plain]:
        console.print(Text("parameters: " + "; ".join(named).replace(",", ", "), style="dim"))
    if hidden := [_flat(name) for name in told if name not in shown]:
        console.print(Text(f"not shown at this width: {', '.join(hidden)}", style="dim"))
    return set(shown)


def _table(shown: Sequence[str], lines: Sequence[dict[str, str]]) -> Table:
    table = plain_table()
    for name in shown:
        word = name in ("method", "backend")
        look = {"overflow": "fold"} if word else {"justify": "right", "no_wrap": True}
        table.add_column(name, max_width=METHOD_WIDTH, **look)
    for line in lines:
        table.add_row(*(Text(line[name]) for name in shown))
    return table


def _flat(heading: str) -> str:
    return heading.replace("\n", " ")


def _line(training: Training, cell: Cell, rows: Sequence[Row]) -> list[str]:
    """What the columns behind the method's say."""
    row, rate = training.rows[cell], tokens_per_s(training.rows[cell])
    if rate is None:
        return [cell.backend, row.status, *[NOTHING] * (len(TABLE) - 3)]
    real = cell.method != IDENTITY.name
    same = cell._replace(method=BASELINE, params=None)
    bound, share = training.amdahl(cell) if real else None, scaling(row, rows)
    return [
        cell.backend, f"{rate.y:,.0f}", f"{_half_width(rate):.1%}",
        _duration(row.median_us),
        _number(training.speedup(cell) and training.speedup(cell).y),
        _number(bound and bound.y),
        _number(training.zero_cost() if real else None),
        _number(training.us(same) and training.speedup(cell, same).y),
        _number(utilisation(row), ".1%"), _number(attention_share(row), ".1%"),
        _number(products_share(row), ".1%"),
        _number(row.peak_bytes and row.peak_bytes / 2**30, ".1f", " GiB"),
        _loss(row), _number(share and share.y, ".1%"),
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
