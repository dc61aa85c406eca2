"""What is said below a table of the terminal: its gaps, and what to make of its figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from rich.text import Text

from bench.chip import POWER_CAP, SHARED_CORES
from bench.derived import BASELINE, ROUNDS, Board, Cell, Gain, compare, labels
from bench.record import Row
from bench.stats import FEW

NOTHING = "-"  # where a table has no figure
PHASE_NAMES = {"fwd": "fwd", "bwd": "bwd", "fwd_bwd": "fwd+bwd"}
WIDE = 0.05  # from here on an interval, to its farther side, deserves a word
FEW_TOLD = (
    f"medians are of fewer than {FEW} samples, whose range stands for the interval and is less "
    "sure than 99 %"
)
STYLES = {
    "mismatch": "bold red", "crash": "bold red", "oom": "yellow", "timeout": "yellow",
    "unsupported": "dim", NOTHING: "dim",
}  # fmt: skip


def notes(board: Board) -> Iterator[Text]:
    """Below the table: parameters, why cells have no figures, and what cannot be right."""
    known = {cell.method: cell for cell in board.cells if cell.params}
    plain = set(labels(board.cells))
    if named := [f"{name} {cell.params}" for name, cell in known.items() if name in plain]:
        yield Text("parameters: " + "; ".join(named).replace(",", ", "), style="dim")
    yield from _prepared(board)
    yield from _fastest(board)
    yield from _reasons(board)
    yield from _too_good(board)
    yield from _disturbed(board)


def _prepared(board: Board) -> Iterator[Text]:
    found = [(cell, board.prepare_share(cell)) for cell in board.cells]
    if told := [f"{x.label} on {x.backend} {share:.0%}" for x, share in found if share]:
        yield Text("hash, sort and gather, of fwd: " + ", ".join(told), style="dim")


def _fastest(board: Board) -> Iterator[Text]:
    """The backend of choice of each method that was timed on several, or those of choice."""
    timed = {p: [c for c in board.cells if board.us(c, p)] for p in ("fwd_bwd", "fwd")}
    phase = "fwd_bwd" if timed["fwd_bwd"] else "fwd"
    chosen: dict[str, list[str]] = {}
    for cell, label in zip(board.cells, labels(board.cells), strict=True):
        same = [x for x in timed[phase] if x._replace(backend=cell.backend) == cell]
        if len(same) > 1 and min(same, key=lambda x: board.us(x, phase)) == cell:
            equal = [x.backend for x in same if not _surely_slower(board, x, cell, phase)]
            chosen.setdefault(" or ".join(equal), []).append(label)
    if any(name != BASELINE for names in chosen.values() for name in names):
        told = "; ".join(f"{', '.join(names)} on {where}" for where, names in chosen.items())
        yield Text(f"fastest {PHASE_NAMES[phase]}: {told}")


def _surely_slower(board: Board, cell: Cell, fastest: Cell, phase: str) -> bool:
    """Whether the whole interval of its time over that of the fastest lies above 1."""
    rows = [board.row(x, phase) for x in (cell, fastest)]
    if cell == fastest or not all(row.samples for row in rows):
        return cell != fastest
    return (compare(*rows).low or 0) > 1


def _reasons(board: Board) -> Iterator[Text]:
    """One line a reason, for however many cells share it."""
    affected: dict[tuple, dict[tuple, None]] = defaultdict(dict)
    for cell in board.cells:
        for phase, name in PHASE_NAMES.items():
            row = board.row(cell, phase)
            if row is not None and row.status != "ok":
                key = (row.status, row.reason or "no reason recorded", cell.backend)
                affected[key][cell, name] = None
    for (status, reason, backend), found in affected.items():
        phases = ", ".join(dict.fromkeys(name for _, name in found))
        cells = list(dict.fromkeys(cell for cell, _ in found))
        everywhere = len(cells) > 1 and cells == [c for c in board.cells if c.backend == backend]
        methods = "all methods" if everywhere else ", ".join(labels(cells))
        yield styled(status).append(f": {methods} on {backend} ({phases}): {reason}")


def _too_good(board: Board) -> Iterator[Text]:
    """One warning a backend whose methods beat their ideal, with what to do about it."""
    found = defaultdict(list)
    for cell, label in zip(board.cells, labels(board.cells), strict=True):
        for phase in ("fwd", "fwd_bwd"):
            efficiency = board.efficiency(cell, phase)
            if efficiency and _surely_above_1(board, cell, efficiency):
                found[cell.backend].append(
                    f"{label} {efficiency.value:.2f} ({PHASE_NAMES[phase]})"
                )
    for backend, cells in found.items():
        fastest = board.fastest_dense("fwd_bwd") or board.fastest_dense("fwd")
        remedy = (
            "measure another dense backend too (--backends)"
            if fastest.backend == backend
            else f"compare with {fastest.backend}, the fastest dense one here"
        )
        yield Text(
            f"warning: efficiency above 1 on {backend}, which the pairs do not allow: "
            f"{', '.join(cells)}. Either `{BASELINE}` on {backend} is slow at this shape: "
            f"{remedy}; or its samples were disturbed: measure again on an idle machine.",
            style="yellow",
        )


def _surely_above_1(board: Board, cell: Cell, efficiency: Gain) -> bool:
    """Whether the whole interval is, where there are samples to have one."""
    if round(efficiency.value, 2) <= 1:
        return False
    dense = board.dense(cell.backend)[0]
    rows = [board.row(x, efficiency.phase) for x in (dense, cell)]
    if not all(row.samples for row in rows):
        return True
    speed = compare(*rows)
    return efficiency.value * (speed.low or speed.ratio) / speed.ratio > 1


def _disturbed(board: Board) -> Iterator[Text]:
    """What was not quiet while the cells were measured, and what to do about it."""
    rows = [row for c in board.cells for x in PHASE_NAMES if (row := board.row(c, x)) is not None]
    wide = sum(row.median_us is not None and half_width(row) > WIDE for row in rows)
    few = sum(0 < len(row.samples) < FEW for row in rows)
    runs = {tuple(getattr(row, name) for name in ROUNDS) for row in rows if row.rounds}
    shared, capped = (
        sum(what in (row.throttled or "") for row in rows) for what in (SHARED_CORES, POWER_CAP)
    )
    warnings = {
        "samples were discarded, since the chip was slowed down from outside (heat or power "
        "supply): let it cool, or use another one, and measure again.":
            sum(row.discarded for row in rows),
        f"medians are known to worse than {WIDE:.0%}: end other work on the machine, or take "
        "longer (--seconds).": wide,
        f"{FEW_TOLD}: take more --rounds.": few,
        "runs are in this table, so that its speed-ups hold what has changed between them, too: "
        "name all --methods and --backends in one request.": len(runs) if len(runs) > 1 else 0,
        "rows were sampled while others were at work on the same cores, which can make a call "
        "many times too slow: end them, and measure again.": shared,
    }  # fmt: skip
    for text, count in warnings.items():
        if count:
            yield Text(f"warning: {count} {text}", style="yellow")
    if capped:
        yield Text(
            f"{capped} rows met the chip's power cap, which is normal in large dense cells.",
            style="dim",
        )


def half_width(row: Row) -> float:
    """The farther end of the interval from the median, over the median."""
    if row.ci_low_us is None or row.ci_high_us is None:
        return 0.0
    farther = max(row.median_us - row.ci_low_us, row.ci_high_us - row.median_us)
    return farther / row.median_us


def styled(text: str) -> Text:
    """A status, or what stands in a table where there is no figure, in its colour."""
    return Text(text, style=STYLES.get(text, ""))
