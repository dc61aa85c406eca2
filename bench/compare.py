"""Verdicts between measurements: A.csv against B.csv, or two methods of one file."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import derived
from bench.chip import POWER_CAP, SHARED_CORES
from bench.derived import Board, Cell
from bench.notes import NOTHING, PHASE_NAMES
from bench.record import STEP, Environment, Row, read_rows
from bench.report import METHOD_WIDTH, fits, plain_table, problem_title, quantity
from bench.stats import FEW, Ratio
from bench.trainings import SPLIT, missed, tokens_per_s

LIMIT = 1.01  # a factor nearer to 1 than this is no difference
# Of two runs, whatever a cell's own samples say: no cell of the committed ones is further apart in
# any two of them (a test holds them to it), by the host clock and at the chip's power cap.
APART_ON_HOST, APART_AT_CAP = 2.5, 1.15
DISTURBED_SHARE = 0.1  # of a row's samples, from which on others that were at work count
# Two runs of one thing should agree this well in medians that are not tiny.
ALIKE, LONG = 1.02, 50.0
MOST_LINES = 6  # about cells that only one side has, or that have no time
STYLES = {"faster": "green", "slower": "red", "same": "dim", "unclear": "yellow"}
# Columns that go where the terminal is narrow, first to last.
OPTIONAL = (("A us", "B us"), ("could\nshow",), ("A\ntokens/s", "B\ntokens/s"))
LEGEND = (
    "B / A: median time of A over that of B (above 1, B is faster), and its 99 % interval. "
    "faster, slower: all of it is more than 1 % away from 1; same: all of it is within 1 %; "
    f"unclear: neither, or fewer than {FEW} samples, which make no 99 % interval. Could show: the "
    "smallest difference that such data would have told, from the interval's width and what is no "
    "difference. "
)
APART = (
    "Two runs of one thing can be further apart than any sample of theirs shows: faster and "
    f"slower take a factor of {APART_ON_HOST:g} by the host clock, {APART_AT_CAP:g} at the chip's "
    "power cap, and nothing is the same there. "
)
UNPAIRED = (
    "Samples of two runs do not pair: what changed on the machine between them is in the ratio "
    "alone, and may be 3 % by the device clock."
)
BUSY = "others were at work on the same cores"
DISTURBED = (
    f"warning: {{}} of the cells were sampled while {BUSY}, which can make a call many times too "
    "slow; they say neither faster nor slower: end that work, and measure again."
)
PAIRED = "Samples of one round are divided: what the machine went through cancels."


class Key(NamedTuple):
    """What two rows share that are compared.

    Attributes:
        problem, title: with block sizes, and with the device where two methods are compared.
        cell: without method and params where two methods are compared.
        phase: as tables name it.
    """

    problem: tuple
    title: str
    cell: Cell
    phase: str
    clock: str


class Side(NamedTuple):
    """What is compared.

    Attributes:
        whole: whether it is to have what the other has; a method runs on some backends only.
    """

    name: str
    rows: dict[Key, Row]
    whole: bool


class Pair(NamedTuple):
    """The rows of a key; `speed` is B's over A's, None where one is not ok or has no samples."""

    key: Key
    a: Row
    b: Row
    speed: Ratio | None

    @property
    def limit(self) -> float:
        return difference(self.a, self.b, self.speed.paired)


def compare(a: Side, b: Side, fail_slower: float | None, console: Console) -> int:
    """Prints what B is against A.

    Returns:
        The exit status: 1 where a whole interval has B slower by more than `fail_slower` percent,
        or, if that is given, B has no time of what A has one of and B should have, or none that
        tells anything.

    Raises:
        ValueError: `fail_slower` is no percentage, or less than any two rows could differ by;
            nothing matches, or samples are damaged.
    """
    if fail_slower is not None and not 0 <= fail_slower < math.inf:
        raise ValueError(f"--fail-slower is {fail_slower}; a percentage of 0 or more is needed")
    pairs = [_pair(key, row, b.rows[key]) for key, row in a.rows.items() if key in b.rows]
    pairs.sort(key=lambda pair: (pair.a.dtype, pair.a.head_dim, pair.a.q_heads, pair.a.seq_len))
    if not pairs:
        raise ValueError(f"nothing matches: no cell, phase and clock of {a.name} is in {b.name}")
    limit = math.inf if fail_slower is None else 1 + fail_slower / 100
    least = min((p.limit for p in pairs if p.speed), default=0.0)
    if limit < least and least > LIMIT:
        raise ValueError(
            f"--fail-slower is {fail_slower:g}; two runs of such cells tell "
            + (f"{100 * (least - 1):.0f} at least" if least < math.inf else "nothing: " + BUSY)
        )
    _print(a, b, pairs, console)
    slower = [p for p in pairs if p.speed and verdict(p.speed, max(limit, p.limit)) == "slower"]
    _print_notes([(f"slower by more than {fail_slower:g} %", p.key) for p in slower], console)
    if fail_slower is None:
        return 0
    times = {key for key, row in b.rows.items() if _status(row) == "ok"}
    timed = (key for key, row in a.rows.items() if _status(row) == "ok")
    lost = [key for key in timed if key not in times and b.whole]
    _print_notes([("no time of it in B, which fails", key) for key in lost], console)
    untold = [p.key for p in pairs if p.speed and p.limit == math.inf]
    _print_notes([("sampled beside other work, which fails", key) for key in untold], console)
    return 1 if slower or lost or untold else 0


def sides(csv: Path, other: Path | None, method: str | None, against: str | None) -> list[Side]:
    """A and B of a request: two files; or, of one file, `against` and `method`.

    Raises:
        OSError: a file cannot be read.
        ValueError: it is neither request, a file holds no results, or no such method.
    """
    if other is not None and method is None and against is None:
        return [_of_file(csv), _of_file(other)]
    if other is None and method is not None and against is not None:
        rows = read_rows(csv)
        return [_of_method(rows, name, csv) for name in (against, method)]
    raise ValueError("compare takes two files, or one file with both --method and --against")


def difference(a: Row, b: Row, paired: bool) -> float:
    """The factor from which on the speeds of two such rows differ; inf where nothing tells."""
    if paired:
        return LIMIT
    if a.clock == "host":
        if not all(map(_busy, (a, b))):
            return math.inf if disturbed(a, b) else APART_ON_HOST
        if (a.method, a.params) != (b.method, b.params):
            return LIMIT  # steps of one run, one after the other on the same chip
    return APART_AT_CAP if any(POWER_CAP in (x.throttled or "") for x in (a, b)) else LIMIT


def _busy(row: Row) -> bool:
    """Whether it is a step whose GPU waited for no launch: CUPTI did not make it longer."""
    share = missed(row) if row.phase == STEP else None
    return share is not None and abs(share) <= SPLIT


def disturbed(*rows: Row) -> bool:
    """Whether one was sampled beside other work."""
    found = [re.search(rf"{SHARED_CORES} (\d+)/(\d+)", row.throttled or "") for row in rows]
    return any(x and int(x[1]) >= DISTURBED_SHARE * int(x[2]) for x in found)


def verdict(speed: Ratio, limit: float = LIMIT) -> str:
    """faster, slower, same or unclear; never same where only a large factor is a difference."""
    if speed.rounds < FEW:
        return "unclear"
    if speed.low > limit or speed.high < 1 / limit:
        return "faster" if speed.low > limit else "slower"
    alike = limit == LIMIT and 1 / limit <= speed.low and speed.high <= limit
    return "same" if alike else "unclear"


def could_show(speed: Ratio, limit: float = LIMIT) -> float | None:
    """The smallest difference that such data would have told, as a fraction.

    On a log scale an interval that reaches h to either side of a ratio r clears the limit where
    |log r| > h + log(limit), and h is log(high / low) / 2. A true difference of just that size is
    told one time in two: half of all measured ratios fall short of the true one.
    """
    if speed.rounds < FEW or limit == math.inf:
        return None
    return limit * math.sqrt(speed.high / speed.low) - 1


def _of_file(path: Path) -> Side:
    found: dict[Key, Row] = {}
    for row in read_rows(path):
        key = _key(row, derived.cell_of(row))
        if key in found and found[key].device != row.device:
            devices = f"{found[key].device} and {row.device}"
            raise ValueError(f"{path} has cells of {devices}; compare files of one device each")
        # Two files may hold two runs of one name; without round numbers their rows do not pair.
        found[key] = replace(row, rounds=None)
    return Side(str(path), found, whole=True)


def _of_method(rows: Sequence[Row], name: str, path: Path) -> Side:
    known = dict.fromkeys(Cell(row.method, row.params, "") for row in rows)
    found = [c for c in known if c.label == name] or [c for c in known if c.method == name]
    if len(found) != 1:
        has = "several methods" if found else "no method"
        choice = " | ".join(cell.label for cell in found or known)
        raise ValueError(f"{path} has {has} {name!r}; allowed: {choice}")
    chosen = [row for row in rows if (row.method, row.params) == found[0][:2]]
    own = {_key(row, Cell("", None, row.backend), row.device): row for row in chosen}
    return Side(f"{found[0].label} in {path}", own, whole=False)


def _key(row: Row, cell: Cell, device: str | None = None) -> Key:
    title = problem_title(row, without=() if device else ("device",))
    recipe = row.recipe if row.phase == STEP else None  # of no account for a call by itself
    training = row.model, row.world_size, row.data, recipe
    problem = (row.problem, row.q_block, row.kv_block, *training, device)
    if row.model:
        told = [f"{row.model} in {row.world_size} processes", row.data, recipe]
        title = " · ".join([*filter(None, told), title])
    return Key(problem, title, cell, PHASE_NAMES.get(row.phase, row.phase), row.clock)


def _pair(key: Key, a: Row, b: Row) -> Pair:
    try:
        return Pair(key, a, b, derived.compare(a, b) if _status(a) == _status(b) == "ok" else None)
    except ValueError as error:
        raise ValueError(f"{_name(key.cell)}, {key.phase}, {key.clock} clock: {error}") from None


def _status(row: Row) -> str:
    return row.status if row.status != "ok" or (row.samples_us and row.median_us) else "no samples"


def _print(a: Side, b: Side, pairs: Sequence[Pair], console: Console) -> None:
    console.print(Text(f"A: {a.name}\nB: {b.name}", style="bold"))
    console.print(_environments(pairs), "", sep="\n")
    tables = _gathered(((p.key.title, p.key.clock), p) for p in pairs if p.speed)
    for (title, clock), group in tables.items():
        console.print(Text(title, style="bold"), Text(f"{clock} clock", style="dim"), sep="\n")
        console.print(_table(group, console), "", sep="\n")
    left = [(f"{_status(p.a)} in A, {_status(p.b)} in B", p.key) for p in pairs if not p.speed]
    left += [("only in A", key) for key in a.rows if key not in b.rows]
    left += [("only in B", key) for key in b.rows if key not in a.rows]
    _print_notes(left, console)
    if count := sum(bool(pair.speed) and pair.limit == math.inf for pair in pairs):
        console.print(Text(DISTURBED.format(count), style="yellow"))
    paired = any(pair.speed and pair.speed.paired for pair in pairs)
    wide = any(pair.speed and pair.limit > LIMIT for pair in pairs)
    legend = LEGEND + (APART if wide else "") + (PAIRED if paired else UNPAIRED)
    console.print(Text(legend, style="dim"))
    counts = Counter(verdict(p.speed, p.limit) for p in pairs if p.speed)
    told = ", ".join(f"{counts[word]} {word}" for word in STYLES)
    console.print(Text(f"B against A, {sum(counts.values())} compared: {told}", style="bold"))
    again = [p for p in pairs if p.key.cell.method and _long(p)]  # one method, in two runs
    ratios = _gathered(((p.key.clock,), p.speed.ratio) for p in again)
    for clock, found in ratios.items():
        alike = sum(1 / ALIKE <= ratio <= ALIKE for ratio in found)
        console.print(
            f"{clock[0]} clock: {alike} of {len(found)} medians of {LONG:.0f} us and more within "
            f"{ALIKE - 1:.0%} of each other", highlight=False,
        )  # fmt: skip


def _long(pair: Pair) -> bool:
    return bool(pair.speed) and min(pair.a.median_us, pair.b.median_us) >= LONG


def _environments(pairs: Sequence[Pair]) -> Text:
    """Of rows that were not sampled together: others differ in files of their methods alone."""
    apart, differing = [p for p in pairs if not (p.speed and p.speed.paired)], []
    for name in (field.name for field in fields(Environment)):
        values = [(getattr(p.a, name), getattr(p.b, name)) for p in apart]
        if found := [both for both in values if both[0] != both[1]]:
            texts = (", ".join(dict.fromkeys(map(str, side))) for side in zip(*found, strict=True))
            differing.append(f"{name} {' → '.join(texts)}")
    if not differing:
        return Text(f"environment: the same, {pairs[0].a.device}", style="dim")
    return Text(f"environments differ (A → B): {'; '.join(differing)}", style="yellow")


def _table(pairs: Sequence[Pair], console: Console) -> Table:
    rows = _texts(pairs)
    shown = [head for head in rows[0] if any(row[head] not in ("", NOTHING) for row in rows)]
    for dropped in ((), *OPTIONAL):
        shown = [head for head in shown if head not in dropped]
        table = plain_table()
        for head in shown:
            word = head in ("method", "backend", "phase")
            look = {"overflow": "fold"} if word else {"justify": "right", "no_wrap": True}
            table.add_column(head, max_width=METHOD_WIDTH, **look)
        for row in rows:
            table.add_row(*(Text(row[h], STYLES.get(row[h], "")) for h in shown))
        if fits(table, console, console.options):
            break
    return table


def _texts(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """Of each row of the table, by column."""
    variants = Counter(method for method, _ in {p.key.cell[:2] for p in pairs})
    several = {method for method, count in variants.items() if count > 1}
    return [_text(pair, pair.key.cell.method in several) for pair in pairs]


def _text(pair: Pair, labelled: bool) -> dict[str, str]:
    (key, a, b, speed), shown = pair, could_show(pair.speed, pair.limit)
    return {
        "method": key.cell.label if labelled else key.cell.method,
        "backend": key.cell.backend,
        "phase": key.phase,
        "A us": f"{a.median_us:.1f}",
        "B us": f"{b.median_us:.1f}",
        "A\ntokens/s": _tokens_per_s(a),
        "B\ntokens/s": _tokens_per_s(b),
        "speed\nB / A": f"{speed.ratio:.3f}",
        "99 %\ninterval": f"{speed.low:.3f} - {speed.high:.3f}" if speed.low else NOTHING,
        "verdict": verdict(speed, pair.limit),
        "could\nshow": NOTHING if shown is None else f"{100 * shown:.1f} %",
    }


def _print_notes(notes: Iterable[tuple[str, Key]], console: Console) -> None:
    """A line for cells that share heading, phases and clocks; problems that share those cells."""
    phases = _gathered(((head, k.title, _name(k.cell), k.clock), k.phase) for head, k in notes)
    clocks = _gathered((key, f"{', '.join(p)} by {clock}") for (*key, clock), p in phases.items())
    cells = _gathered(((head, title, by), name) for (head, title, name), by in clocks.items())
    lines = _gathered(((head, by, names), title) for (head, title, by), names in cells.items())
    told = _gathered(
        ((head,), f"{', '.join(names)} ({'; '.join(by)}): {'; '.join(titles)}")
        for (head, by, names), titles in lines.items()
    )
    for (head,), texts in told.items():
        for text in texts[:MOST_LINES]:
            console.print(Text(f"{head}: {text}"))
        if len(texts) > MOST_LINES:
            console.print(Text(f"{head}: {len(texts) - MOST_LINES} more lines of such cells"))


def _gathered(items: Iterable[tuple[Iterable, Any]]) -> dict[tuple, tuple]:
    """Key -> its values, in order of appearance."""
    found: dict[tuple, tuple] = {}
    for key, value in items:
        found[tuple(key)] = (*found.get(tuple(key), ()), value)
    return found


def _name(cell: Cell) -> str:
    return f"{cell.label} on {cell.backend}" if cell.method else cell.backend


def _tokens_per_s(row: Row) -> str:
    if row.phase == STEP:
        return quantity(tokens_per_s(row).y)
    board = Board([row])
    return quantity(board.tokens_per_s(board.cells[0]))
