"""The command: every table and figure of the paper that this machine can make."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from rich.console import Console

from bench.complexity import complexity
from bench.paper import MICRO_BENCHMARK, TABLE_2_ATTENTION
from bench.paper_claims import Results, claims
from bench.paper_figures import draw_complexity, draw_mask_figures, draw_specialisation
from bench.paper_page import page
from bench.paper_speeds import (
    EAGER,
    POINT_METHODS,
    TOKENS_FROM,
    Throughput,
    micro_benchmark,
    throughput,
)
from bench.record import ROOT, read_rows
from bench.request import Sweep, check_run_name
from bench.specialisation import specialisation
from bench.sweep import sweep
from bench.tables import read_table, write_table
from bench.trained_heads import after_training

COMMITTED = ROOT / "results" / "h200"
SPEEDS, TRAININGS = "paper_speeds.csv", "train*.csv"


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Make the tables and figures of the SPAttention paper again, theirs beside ours.

    Attention is measured where there is a GPU; training steps are those of results/train*.csv.
    What there is none of comes from the committed rows of an H200. Everything else is counted and
    drawn on the CPU.
    """

    rows: tuple[Path, ...] | None = None
    """Take the speeds from these results files instead, and measure nothing. Each table of speeds
    comes from one of them, the one that has most of it."""
    run: str = "paper"
    """Name of results/NAME/ and plots/NAME/; what an earlier run left there is made anew."""
    output: Path | None = None
    """Folder that holds results/ and plots/; default this repository."""


def reproduce(request: Paper, console: Console) -> int:
    """Writes tables, figures and the page; returns the exit status.

    Raises:
        ValueError: the request is wrong.
        OSError: a file cannot be read or written.
    """
    started = time.perf_counter()
    check_run_name(request.run)
    base = request.output or ROOT
    files, status = _files(request, base, console)
    read = [(read_rows(file), _shown(file)) for file in files]
    tables, plots = base / "results" / request.run, base / "plots" / request.run
    for folder in (tables, plots):
        folder.mkdir(parents=True, exist_ok=True)
    results = Results(
        complexity=complexity(),
        micro_benchmark=max((micro_benchmark(*file) for file in read), key=len, default=[]),
        throughput=fullest([throughput(*file) for file in read]),
        specialisation=list(specialisation()),
        trained_heads=[line for file in read for line in after_training(*file)],
    )
    write_results(results, tables)
    draw(read_results(tables), plots)
    _say(results, tables, plots, console)
    console.print(f"{time.perf_counter() - started:.0f} s", highlight=False)
    return status


def write_results(results: Results, folder: Path) -> None:
    """NAME.csv for each table."""
    for name, kind in _kinds().items():
        write_table(folder / f"{name}.csv", getattr(results, name), kind)


def read_results(folder: Path) -> Results:
    """What `write_results` wrote.

    Raises:
        OSError: a table cannot be read.
        ValueError: a table is not one of this version.
    """
    found = {n: read_table(folder / f"{n}.csv", kind) for n, kind in _kinds().items()}
    return Results(**found)


def draw(results: Results, folder: Path) -> None:
    """Figures, and the page that shows them, as README.md."""
    draw_mask_figures(folder)
    draw_complexity(results.complexity, folder / "complexity")
    draw_specialisation(results.specialisation, folder / "specialisation")
    (folder / "README.md").write_text(page(results))


def _kinds() -> dict[str, type]:
    hints = get_type_hints(Results)
    return {field.name: get_args(hints[field.name])[0] for field in fields(Results)}


def _files(request: Paper, base: Path, console: Console) -> tuple[list[Path], int]:
    """The results files that speeds come from, and the exit status."""
    if request.rows is not None:
        return list(request.rows), 0
    if torch.cuda.is_available():
        file, status = _measured(f"{request.run}_speeds", base, console)
        trained = sorted((base / "results").glob(TRAININGS))
        return [file, *(trained or sorted(COMMITTED.glob(TRAININGS)))], status
    console.print("skipped: measuring the micro-benchmark and Table 2 needs a GPU",
                  highlight=False)  # fmt: skip
    return [x for name in (SPEEDS, TRAININGS) for x in sorted(COMMITTED.glob(name))], 0


def fullest(found: Sequence[list[Throughput]]) -> list[Throughput]:
    """Training steps and attention alone, each from the file that measured most of its lines."""
    tables = (
        [[x for x in lines if x.measured == measured] for lines in found]
        for measured in TOKENS_FROM
    )
    return [
        line
        for of_files in tables
        for line in max(of_files, key=lambda lines: sum(not x.reason for x in lines), default=[])
    ]


def _measured(run: str, base: Path, console: Console) -> tuple[Path, int]:
    """Sweeps both shapes; then, in the same file, the micro-benchmark by `eager`.

    That is how the released code calls its masks; it is slow, so no other cell is run by it.
    """
    shapes = (TABLE_2_ATTENTION, MICRO_BENCHMARK)
    asked = Sweep(
        seq_len=tuple(p.seq_len for p in shapes),
        heads=tuple({p.q_heads for p in shapes}),
        head_dim=tuple({p.head_dim for p in shapes}),
        run=run,
        output=str(base),
        resume=True,
    )
    uncompiled = replace(
        asked, methods=POINT_METHODS, backends=(EAGER,), seq_len=(MICRO_BENCHMARK.seq_len,),
        phases=("fwd_bwd",),
    )  # fmt: skip
    status = max(sweep(request, console) for request in (asked, uncompiled))
    return base / "results" / f"{run}.csv", status


def _shown(path: Path) -> str:
    """A path as the page names it: within the repository, or its name alone."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _say(results: Results, tables: Path, plots: Path, console: Console) -> None:
    reasons = [f"{c.method} at N = {c.seq_len}, H = {c.q_heads}: {c.reason}"
               for c in results.complexity if c.reason]  # fmt: skip
    reasons += [f"{x.name} {x.reading} in Table 2 by {x.measured}: {x.reason}"
                for x in results.throughput if x.reason]  # fmt: skip
    if not results.trained_heads:
        reasons.append("head specialisation after training: no model was trained on a text")
    for reason in reasons:
        console.print(f"skipped: {reason}", highlight=False)
    for claim in claims(results):
        text = claim.text.replace("`", "")
        console.print(f"[bold]{claim.place}:[/] {text}", highlight=False)
        console.print(f"    the paper: {claim.theirs}", highlight=False)
        console.print(f"    here:      {claim.ours.replace('`', '')}", highlight=False)
    timed = (*results.micro_benchmark, *results.throughput, *results.trained_heads)
    sources = sorted({f"{x.source} ({x.device})" for x in timed})
    console.print(f"speeds:  {', '.join(sources) or 'none'}", highlight=False)
    console.print(f"tables:  {tables}", highlight=False)
    console.print(f"figures: {plots}, with the page {plots / 'README.md'}", highlight=False)
