"""A sweep: problem groups -> rows in a CSV, tables and figures."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import figures, masks, report
from bench.ahead import Ahead, Known, compile_ahead, compile_jobs
from bench.backend_figures import draw_backends
from bench.cells import Group
from bench.measure import Clockwork
from bench.recall import Memory
from bench.record import Environment, Row, Store, code_hash
from bench.request import Sweep, destination, expand, left_out, title
from bench.specs import AUTHOR_ERRORS, parameters_text, parse_method, source_file
from bench.style import drawn_into
from bench.worker import Worker

CLOCK_ASKED = {"device": "device", "kernels": "device", "host": "host"}


def sweep(request: Sweep, console: Console) -> int:
    """Runs a sweep; returns the exit status.

    Raises:
        ValueError: the request is wrong; nothing was run or written.
    """
    groups = expand(request)
    csv_path, plots = destination(request.output, groups[0].run, request.resume)
    clockwork = Clockwork()
    _say(console, title(csv_path, request.resume))
    with Store(csv_path) as store, _timed(csv_path.with_suffix(".time.csv"), clockwork):
        if store.damaged:
            _say(console, f"damaged lines: {store.damaged}, now in {store.aside}")
        if missing := left_out(request):
            _say(console, missing)
        rows = _measure(request, groups, store, clockwork, console)
        with clockwork.on("report"):
            report.print_report(rows, console)
            drawn = figures.draw_all(rows, plots) + draw_backends(rows, plots)
            drawn += _draw_own_masks(request, rows, plots)
    _say_where(csv_path, plots, len(drawn), clockwork.spent, console)
    return 1 if any(row.status in ("mismatch", "crash") for row in rows) else 0


def _draw_own_masks(request: Sweep, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Pictures of methods from files of the user's own, which a results file does not hold.

    Their code runs in this process, so only what came through a measurement is drawn.
    """
    sound = {(row.method, row.params) for row in rows if row.status == "ok"}
    sound -= {(row.method, row.params) for row in rows if row.status in ("crash", "timeout")}
    drawn = []
    for spec in filter(source_file, request.methods):
        method = parse_method(spec)
        if (method.name, parameters_text(method)) not in sound:
            continue
        label = re.sub(r"[^\w=.-]+", "_", f"{method.name} {parameters_text(method) or ''}".strip())
        p = replace(masks.PICTURED, q_heads=request.heads[0], kv_heads=request.heads[0])
        with suppress(*AUTHOR_ERRORS):  # it may not fit this problem
            drawn += masks.mask_figure(method, p, folder / f"mask_{label}")
    return drawn


def _measure(
    request: Sweep, groups: list[Group], store: Store, clockwork: Clockwork, console: Console
) -> list[Row]:
    """Measures what is not complete yet; every group's rows are on disk before the next."""
    rows = store.rows
    with clockwork.on("start"):
        worker = Worker(groups[0].device, request.time_limit)
    with worker, _progress(console) as bar:
        todo = [group for group in groups if not _complete(group, rows, worker.environment)]
        with clockwork.on("compile ahead"):
            known = _compile(todo, Memory(worker.environment), request.time_limit, bar)
        task = bar.add_task("measuring", total=sum(len(group.cells) for group in todo))
        for number, group in enumerate(todo, 1):
            bar.update(task, description=f"measuring {_title(group)}")
            if not console.is_terminal:  # where no bar is seen to move
                _say(console, f"measuring {_title(group)}: problem {number} of {len(todo)}")
            measured = worker.measure(group, clockwork)
            for cell in group.cells:
                about = known.get((group.problem, group.block_size, cell))
                measured[cell] = [_completed(row, about) for row in measured[cell]]
            finished = [row for cell in group.cells for row in measured[cell]]
            rows = store.put(rows, finished, _cell_key)
            bar.advance(task, len(group.cells))
    return rows


def _completed(row: Row, known: Known | None) -> Row:
    """The row with what was known of its cell before it was measured."""
    if known is None:
        return row
    kernel, tiles = known.ran.get(row.phase) or (None, None)
    return replace(row, compile_s=known.compile_s, kernel=kernel, tiles=tiles)


def _cell_key(row: Row) -> tuple:
    size = (row.q_block, row.kv_block)
    return row.device, row.problem, size, row.method, row.params, row.backend, row.phase


def _compile(todo: list[Group], memory: Memory, time_limit: float, bar: Progress) -> Ahead:
    count = sum(1 for _ in compile_jobs(todo))
    if count == 0:
        return {}
    task = bar.add_task("compiling ahead", total=count)
    if not bar.console.is_terminal:
        _say(bar.console, f"compiling {count} cells ahead")
    known = compile_ahead(todo, memory, time_limit, lambda: bar.advance(task))
    if missing := count - len(known):
        bar.console.print(f"{missing} of {count} cells were not compiled ahead: see their rows")
    return known


def _complete(group: Group, rows: Sequence[Row], env: Environment) -> bool:
    """Whether every cell, phase and clock of a group has a row of this code and environment."""
    same = [f.name for f in fields(Environment) if f.name not in ("git_sha", "code")]
    have = {
        # `kernels` stands in for `device` where a call cannot be captured.
        (row.method, row.params, row.backend, row.phase, CLOCK_ASKED[row.clock], row.code)
        for row in rows
        if row.problem == group.problem
        and (row.q_block, row.kv_block) == group.block_size
        and all(getattr(row, name) == getattr(env, name) for name in same)
    }
    for cell in group.cells:
        method, path = parse_method(cell.method), source_file(cell.method)
        code = code_hash([path]) if path else env.code
        for phase in group.phases:
            for clock in group.clocks(phase):
                key = (method.name, parameters_text(method), cell.backend, phase, clock, code)
                if key not in have:
                    return False
    return True


def _title(group: Group) -> str:
    p = group.problem
    return f"N {p.seq_len}, heads {p.q_heads}, dim {p.head_dim}, {p.dtype}"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), console=console,
    )  # fmt: skip


@contextmanager
def _timed(path: Path, clockwork: Clockwork) -> Iterator[None]:
    """Keeps what a run spent its time on, behind earlier runs; an interrupted one's, too."""
    started, stamp = time.perf_counter(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    try:
        yield
    finally:
        clockwork.spent["rest"] = time.perf_counter() - started - sum(clockwork.spent.values())
        lines = [f"{stamp},{name},{seconds:.2f}\n" for name, seconds in clockwork.spent.items()]
        with suppress(OSError), path.open("a") as file:  # a full disk has been said already
            file.writelines(lines if file.tell() else ["time_utc,spent_on,seconds\n", *lines])


def _say_where(
    csv_path: Path, plots: Path, drawn: int, spent: dict[str, float], console: Console
) -> None:
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in spent.items())
    _say(console, f"rows: {csv_path}\n{drawn_into(plots, drawn)}")
    _say(console, f"time: {sum(spent.values()):.0f} s ({parts})")


def _say(console: Console, text: str) -> None:
    """A line as it is: a path may have brackets."""
    console.print(text, highlight=False, markup=False)
    sys.stdout.flush()
