"""The README's tables of speeds, in Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from bench.backends import BACKENDS
from bench.compare import LIMIT
from bench.derived import BASELINE, Board, Cell, boards, compare, in_order, labels
from bench.notes import NOTHING
from bench.paper import MICRO_BENCHMARK
from bench.profile import BETWEEN, OTHERS, Line, calls, shown
from bench.record import CLOCKS, Row
from bench.report import problem_title, quantity
from bench.tables import markdown
from methods import METHODS

# Heads and N, and how many times as fast as dense attention the fastest way was to be there.
TARGETS = {(8, 4096): 4.2, (8, 16384): 5.8, (16, 32768): 13}
WIDTH = 60  # of a kernel's name
WIDE = 0.04  # an interval that is shown, as a share of the ratio
INTERVALS = f", with its 99 % interval where that is wider than {WIDE:.0%} or holds 1"


def times(ratio: float, low: float | None, high: float | None) -> str:
    """A speed-up, with its interval where that is wide, or where it may be none."""
    unsure = low and high and (high / low > 1 + WIDE or low <= 1 <= high)
    return f"{ratio:.2f}x" + (f", {low:.2f} to {high:.2f}" if unsure else "")


def headline_markdown(
    rows: Iterable[Row], *, backend: str, clock: str | None = None, **fixed: object
) -> str:
    """The README's table: methods down, N across; tokens/s and speed-up of fwd+bwd.

    Args:
        backend: of the methods and of the `standard` that they are compared with; a last line has
            the fastest dense backend of all.
        clock: the first of CLOCKS that has such a row, where not given.
        fixed: fields of Row that choose one problem a length, as in `q_heads=8, head_dim=128`.

    Raises:
        ValueError: no row is left, or those left differ in more than N.
    """
    chosen = [
        row
        for row in rows
        if row.phase == "fwd_bwd"
        and (row.backend == backend or row.method == BASELINE)
        and all(getattr(row, name) == value for name, value in fixed.items())
    ]
    clocks = [c for c in CLOCKS if c in {r.clock for r in chosen if r.backend == backend}]
    clock = clock or next(iter(clocks), None)
    found = [board for board in boards(chosen) if board.head.clock == clock]
    if not found or not any(cell.backend == backend for b in found for cell in b.cells):
        raise ValueError(f"no fwd_bwd row of backend {backend!r} by clock {clock!r} with {fixed}")
    titles = {problem_title(board.head, without=["seq_len"]) for board in found}
    if len(titles) > 1:
        raise ValueError(f"the rows differ in more than N: {'; '.join(sorted(titles))}")
    found.sort(key=lambda board: board.head.seq_len)
    heads = ["method", *(f"N = {board.head.seq_len}" for board in found)]
    table = markdown(heads, _headline_lines(found, backend))
    return "\n".join([*table, "", _headline_caption(found, backend)])


def _headline_lines(found: Sequence[Board], backend: str) -> Iterator[Sequence[str]]:
    cells = list(dict.fromkeys(c for board in found for c in board.cells if c.backend == backend))
    methods = in_order(cell.method for cell in cells)
    cells.sort(key=lambda cell: methods.index(cell.method))
    for cell, label in zip(cells, labels(cells), strict=True):
        yield [f"`{label}`", *(_headline_cell(board, cell) for board in found)]
    dense = [board.fastest_dense("fwd_bwd") for board in found]
    if any(cell is not None and cell.backend != backend for cell in dense):
        texts = (
            f"{quantity(board.tokens_per_s(cell))} ({cell.backend})" if cell else NOTHING
            for board, cell in zip(found, dense, strict=True)
        )  # fmt: skip
        yield ["fastest dense", *texts]


def _headline_cell(board: Board, cell: Cell) -> str:
    row, gain = board.row(cell, "fwd_bwd"), board.over_same_backend(cell, "fwd_bwd")
    if row is not None and row.status != "ok":
        return row.status
    speedup = f" ({gain.value:.2f}x)" if gain and cell.method != BASELINE else ""
    return quantity(board.tokens_per_s(cell)) + speedup


def _headline_caption(found: Sequence[Board], backend: str) -> str:
    head = found[0].head
    dense = [(board.row(cell, "fwd_bwd"), cell) for board in found for cell in board.dense()]
    runs = {cell.backend: row.run for row, cell in dense if row}
    own, others = ([x for x in runs if (runs[x] == head.run) == same] for same in (True, False))
    told = f"{', '.join(own)}{'; of another run ' if others else ''}{', '.join(others)}"
    dense = f" Dense backends: {told}." if len(runs) > 1 else ""
    return (
        f"Tokens/s, forward + backward, on `{backend}` by the {head.clock} clock; in "
        f"brackets the speed-up over `{BASELINE}` on the same backend.{dense} "
        f"{problem_title(head, without=['seq_len'])} · torch {head.torch}."
    )


def answer(lengths: list[Row], backends: list[Row], sweeps: list[Row]) -> str:
    """Right, fast, and what stops it: of `spattention` at the paper's point.

    Args:
        lengths, backends: rows of the sweeps behind the headline and the fastest backends.
        sweeps: of all runs, of which those with the point say what an eager caller waits.
    """
    rows = [row for row in (*lengths, *backends) if row.status != "unsupported"]
    cells: dict[tuple, bool] = {}
    for row in rows:
        cell = row.run, row.problem, row.method, row.params, row.backend
        cells[cell] = cells.get(cell, True) and row.status == "ok"
    count = f"{sum(cells.values())} of {len(cells)} cells"
    worst = max(row.error_budget for row in rows if row.status == "ok")
    device, best = _point(lengths, "device"), _point(backends, "device")
    flex, own = Cell("spattention", None, "flex"), best.fastest("spattention", "fwd_bwd")
    rival = best.fastest_dense("fwd_bwd")
    over_rival = best.over_fastest_dense(own, "fwd_bwd").value
    waits, rest = waited(sweeps)
    gain = device.over_same_backend(flex, "fwd_bwd").value
    return "\n".join((
        f"- **Right?** Outputs and gradients of {count} of the sweeps behind this table and that "
        f"of the fastest backends agree with float64; the worst took {worst:.0%} of its error "
        f"budget.",
        f"- **Fast?** `spattention` is {gain:.2f} times as fast as `standard` on `flex`, and on "
        f"its fastest backend ({own.backend}) {over_rival:.2f} times as fast as dense attention "
        f"on its own ({rival.backend}), by the device clock. An eager caller, who waits for "
        f"launches too, sees {min(waits):.2f} to {max(waits):.2f} times on `flex` in "
        f"{len(waits)} runs; over dense attention on what is fastest for such callers it is "
        f"{min(rest):.2f} to {max(rest):.2f} times in {len(rest)} runs, since its launches take "
        f"longer than its kernels: compile the model, or replay graphs.",
        f"- **What stops it?** Its pairs would allow {device.ideal_by_elements(flex):.2f} times, "
        f"the blocks that a kernel must visit {device.ideal_by_blocks(flex):.2f}; it reaches "
        f"{device.efficiency(flex, 'fwd_bwd').value:.0%} of that.",
    ))  # fmt: skip


def _point(rows: Iterable[Row], clock: str) -> Board:
    """The paper's point by a clock."""
    chosen = (row for row in rows if (row.q_heads, row.seq_len, row.head_dim) == (8, 4096, 128))
    (found,) = (board for board in boards(chosen) if board.head.clock == clock)
    return found


def waited(sweeps: Iterable[Row]) -> tuple[list[float], list[float]]:
    """Speed-ups of `spattention` on flex at the paper's point by the host clock, run by run.

    Over `standard` on flex; and over the fastest dense backend, in runs that have one which is for
    dense attention, rather than for any method.
    """
    method = METHODS["spattention"]
    runs: dict[tuple, list[Row]] = {}
    for row in sweeps:
        if row.problem == MICRO_BENCHMARK and (row.phase, row.clock) == ("fwd_bwd", "host"):
            runs.setdefault((row.run, row.code), []).append(row)
    over_own, over_fastest = [], []
    for board in map(Board, runs.values()):
        us = board.us(Cell("spattention", None, "flex"), "fwd_bwd")
        dense = {cell.backend: board.us(cell, "fwd_bwd") for cell in board.dense()}
        times = {name: x for name, x in dense.items() if x}
        if us and dense.get("flex"):
            over_own.append(dense["flex"] / us)
            if not all(BACKENDS[name].computes(method) for name in times):
                over_fastest.append(min(times.values()) / us)
    return over_own, over_fastest


def clocks(rows: list[Row]) -> str:
    """The paper's point by both clocks, over `standard` on flex; what sparsity would allow."""
    found = [_point(rows, clock) for clock in ("device", "host")]
    lines = []
    for cell in found[0].cells:
        times = []
        for board in found:
            base, row = (board.row(x, "fwd_bwd") for x in (board.dense("flex")[0], cell))
            gain = compare(base, row)
            spread = f", {gain.low:.2f} to {gain.high:.2f}" if board.head.clock == "host" else ""
            times.append(f"{row.median_us:.0f} us ({gain.ratio:.2f}x{spread})")
        ideals = (found[0].ideal_by_elements(cell), found[0].ideal_by_blocks(cell))
        ideal = ", ".join(f"{x:.2f}x" if x else NOTHING for x in ideals)
        lines.append((f"`{cell.method}`", cell.backend, times[0], ideal, times[1]))
    heads = ("method", "backend", "device clock", "ideal by pairs, blocks", "host clock")
    counts = [len(found[1].row(x, "fwd_bwd").samples) for x in found[1].cells]
    many = f"{min(counts)}" if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    told = f"Medians by the host clock are of {many} samples."
    return "\n".join([*markdown(heads, lines, numbers=(2, 3, 4)), "", told])


def by_heads(rows: list[Row]) -> str:
    """Speed-ups on `flex`, and the time of `standard` there, by head dim, N and heads."""
    found = [board for board in boards(rows) if board.head.clock == "device"]
    found.sort(key=lambda board: (board.head.head_dim, board.head.seq_len, board.head.q_heads))
    shapes = (board.head for board in found)
    heads = [f"D = {x.head_dim}, N = {x.seq_len}, H = {x.q_heads}" for x in shapes]
    lines = []
    for cell in (cell for cell in found[0].cells if cell.backend == "flex"):
        texts = []
        for board in found:
            us, gain = board.us(cell, "fwd_bwd"), board.over_same_backend(cell, "fwd_bwd")
            own = us and f"{us / 1000:.2f} ms"
            texts.append(own if cell.method == BASELINE else gain and f"{gain.value:.2f}x")
        lines.append((f"`{cell.method}`", *(text or NOTHING for text in texts)))
    return "\n".join(markdown(("method", *heads), lines))


def fastest(rows: list[Row]) -> str:
    """The fastest backend of dense attention and of each method, and their ratio, by N."""
    found = [board for board in boards(rows) if board.head.clock == "device"]
    found.sort(key=lambda board: (board.head.q_heads, board.head.seq_len))
    heads = [f"H = {board.head.q_heads}, N = {board.head.seq_len}" for board in found]
    lines = (
        (f"`{method}`", *(_fastest_cell(board, method) for board in found))
        for method in in_order(row.method for row in rows)
    )
    return "\n".join(markdown(("fastest backend", *heads), lines))


def _fastest_cell(board: Board, method: str) -> str:
    """Time, the backends that share the first place, the ratio, and a wide one's interval."""
    best = board.fastest(method, "fwd_bwd")
    if best is None:
        return NOTHING
    row, dense = (board.row(x, "fwd_bwd") for x in (best, board.fastest_dense("fwd_bwd")))
    rivals = [x for x in board.cells if x.method == method and board.us(x, "fwd_bwd")]
    slower = {x: compare(board.row(x, "fwd_bwd"), row).low for x in rivals if x != best}
    names = " or ".join([best.backend, *(x.backend for x, low in slower.items() if low < LIMIT)])
    text = f"{row.median_us:.0f} us, {names}"
    if method == BASELINE:
        return text
    gain = compare(dense, row)
    return f"{text} ({times(gain.ratio, gain.low, gain.high)})"


def targets(rows: list[Row]) -> str:
    """Aimed at and reached: `spattention` over dense attention, each on its fastest backend."""
    found = {(board.head.q_heads, board.head.seq_len, board.head.clock): board
             for board in boards(rows)}  # fmt: skip
    lines = []
    for (heads, n), aim in TARGETS.items():
        for clock in ("device", "host"):
            board = found[heads, n, clock]
            best = [board.fastest(name, "fwd_bwd") for name in (BASELINE, "spattention")]
            cells = [f"{board.us(cell, 'fwd_bwd'):.0f} us, {cell.backend}" for cell in best]
            gain = compare(*(board.row(cell, "fwd_bwd") for cell in best))
            reached = f"{gain.ratio:.2f}x ({gain.low:.2f} to {gain.high:.2f})"
            aimed = f"{aim}x" if clock == "device" else ""
            lines.append((f"H = {heads}, N = {n}", clock, *cells, reached, aimed))
    columns = ("point", "clock", "dense", "`spattention`", "times as fast", "aim")
    return "\n".join(markdown(columns, lines, numbers=range(2, 6)))


def profiles(lines: Iterable[Line], least: float = 0.02) -> str:
    """Kernels of each call of a profile, the longest first: microseconds and share."""
    found = calls(lines)
    heads = _call_names([call[0] for call in found])
    parts = [{kernel: us for kernel, _, us in shown(call, least)} for call in found]
    kernels = sorted({x for part in parts for x in part}, key=lambda x: _place(x, parts))
    table = []
    for kernel in kernels:
        cells = [
            f"{part[kernel]:.0f} us, {part[kernel] / call[0].call_us:.0%}"
            if kernel in part
            else "-"
            for part, call in zip(parts, found, strict=True)
        ]
        name = kernel if len(kernel) <= WIDTH else f"{kernel[:WIDTH]}..."
        table.append((name, *cells))
    return "\n".join(markdown(("kernel", *heads), table))


def _call_names(firsts: Sequence[Line]) -> list[str]:
    """What tells calls apart, their length and phase in any case; and how long they take."""
    facts = {
        "method": "`{}`", "backend": "{}", "q_heads": "H = {}", "seq_len": "N = {}",
        "q_block": "blocks of {}", "phase": "{}",
    }  # fmt: skip
    kept = {"seq_len", "phase"}
    told = [name for name in facts if name in kept or len({getattr(x, name) for x in firsts}) > 1]
    return [
        f"{', '.join(facts[name].format(getattr(x, name)) for name in told)}: {x.call_us:.0f} us"
        for x in firsts
    ]


def _place(kernel: str, parts: list[dict[str, float]]) -> tuple[bool, bool, float]:
    """The longest kernels first; what is put together, and what lies between, last."""
    return kernel == BETWEEN, kernel == OTHERS, -max(part.get(kernel, 0.0) for part in parts)


def rounds(rows: list[Row]) -> str:
    """Reformer by its rounds of hashing: time and speed-up over `standard` on `flex`.

    Where it was timed, then the part of the forward that hashes, sorts and gathers.
    """
    found = [board for board in boards(rows) if board.head.clock == "device"]
    found.sort(key=lambda board: board.head.seq_len)
    lines = []
    for cell in found[0].cells:
        if cell.method == BASELINE:
            continue
        rounds, cells = re.search(r"n_rounds=\d+", cell.params)[0], []
        for board in found:
            us, share = board.us(cell, "fwd_bwd"), board.prepare_share(cell)
            gain = board.us(board.dense("flex")[0], "fwd_bwd") / us
            before = "" if share is None else f", {share:.0%}"
            cells.append(f"{us / 1000:.2f} ms ({gain:.2f}x){before}")
        lines.append((f"`{rounds}`", *cells))
    heads = ("`reformer`", *(f"N = {board.head.seq_len}" for board in found))
    return "\n".join(markdown(heads, lines))


def stand_ins(rows: list[Row]) -> str:
    """The released stand-ins beside the methods that they stand for: pairs, blocks and time."""
    published = ("longformer", "bigbird", "reformer")
    lengths = (4096, 16384, 32768)
    found = {
        (row.method, row.seq_len): row
        for row in rows
        if (row.phase, row.clock, row.backend) == ("fwd_bwd", "device", "flex")
    }
    lines = []
    for name in (x for own in published for x in (own, f"mehc_{own}")):
        cells = []
        for n in lengths:
            row, dense = found[name, n], found["standard", n]
            allowed = 100 * row.allowed_pairs / dense.allowed_pairs
            computed = 100 * row.computed_pairs / dense.computed_pairs
            cells.append(f"{allowed:.1f} %, {computed:.1f} %, {row.median_us / 1000:.2f} ms")
        lines.append((f"`{name}`", *cells))
    heads = ("method", *(f"N = {n}: pairs, blocks, time" for n in lengths))
    return "\n".join(markdown(heads, lines))
