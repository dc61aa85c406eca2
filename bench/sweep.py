"""A sweep: axes -> problem groups -> rows in a CSV, tables and figures."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import figures, masks, report
from bench.ahead import Ahead, Known, compile_ahead, compile_jobs
from bench.backend_figures import draw_backends
from bench.backends import BACKENDS
from bench.cells import Cell, Group
from bench.derived import BASELINE
from bench.measure import Clockwork
from bench.recall import Memory
from bench.record import PHASES, ROOT, Environment, Row, Store, code_hash
from bench.specs import AUTHOR_ERRORS, parameters_text, parse_method, source_file
from bench.worker import Worker
from methods import METHODS, Method, Problem

CLOCK_ASKED = {"device": "device", "kernels": "device", "host": "host"}


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Measure methods over a range of problems: table, CSV and figures.

    Every combination of the lists is measured; `standard` always, since speed-ups are held
    against it.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    """Presets, NAME:parameter=value,... or FILE.py:NAME for a method of your own."""
    backends: tuple[str, ...] | None = None
    """Ways to run them; by default what suits the device (see `list`)."""
    seq_len: tuple[int, ...] | None = None
    """Tokens a sequence; default 512 to 2048 on a CPU, 1024 to 16384 on a GPU."""
    heads: tuple[int, ...] = (8,)
    """Query heads."""
    kv_heads: tuple[int, ...] | None = None
    """Key and value heads; by default as many as query heads."""
    head_dim: tuple[int, ...] | None = None
    """Features a head; default 64 on a CPU, 128 on a GPU."""
    batch: tuple[int, ...] = (1,)
    """Sequences a call."""
    dtype: tuple[str, ...] | None = None
    """Element types; default float32 on a CPU, bfloat16 on a GPU."""
    causal: tuple[bool, ...] = (True,)
    """Whether a query sees only the past."""
    block_size: tuple[str, ...] = ("128",)
    """Blocks of the mask: ROWS or ROWSxKEYS."""
    phases: tuple[str, ...] = tuple(phase for phase in PHASES if phase != "prepare")
    """What is timed: layout, fwd, bwd, fwd_bwd; prepare is Reformer's hash, sort and gather."""
    device: str | None = None
    """cpu or cuda:0; by default a GPU where there is one."""
    rounds: int = 30
    """Interleaved rounds of samples; more, until every median of a problem is known to 1 %."""
    seconds: float = 10.0
    """Sampling of a problem ends after this time all the same, though not before eight rounds."""
    time_limit: float = 300.0
    """Seconds without progress after which a cell is given up."""
    seed: int = 0
    """Seed of inputs and of the order of samples."""
    run: str | None = None
    """Name of results/NAME.csv and plots/NAME/; default device and UTC time."""
    output: str | None = None
    """Folder that holds results/ and plots/; default this repository."""
    resume: bool = False
    """Go on with a run of that name; what is complete is not measured again, and a failure is
    complete: delete its line to have it tried again."""


def sweep(request: Sweep, console: Console) -> int:
    """Runs a sweep; returns the exit status.

    Raises:
        ValueError: the request is wrong; nothing was run or written.
    """
    groups = expand(request)
    csv_path, plots = destination(request.output, groups[0].run, request.resume)
    clockwork = Clockwork()
    with Store(csv_path) as store, _timed(csv_path.with_suffix(".time.csv"), clockwork):
        if store.damaged:
            console.print(f"damaged lines: {store.damaged}, now in {store.aside}", highlight=False)
        rows = _measure(request, groups, store, clockwork, console)
        with clockwork.on("report"):
            report.print_report(rows, console)
            drawn = figures.draw_all(rows, plots) + draw_backends(rows, plots)
            drawn += _draw_own_masks(request, rows, plots)
    _say_where(csv_path, plots, len(drawn), clockwork.spent, console)
    return 1 if any(row.status in ("mismatch", "crash") for row in rows) else 0


def destination(output: str | None, run: str, resume: bool) -> tuple[Path, Path]:
    """The results file and the folder of figures of a run.

    Raises ValueError where it exists and is not to go on, or its folders cannot be written.
    """
    base = Path(output or ROOT)
    csv_path, plots = base / "results" / f"{run}.csv", base / "plots" / run
    if csv_path.exists() and not resume:
        raise ValueError(f"{csv_path} exists; choose another --run, or go on with it by --resume")
    must_be_writable(csv_path.parent, plots.parent)
    return csv_path, plots


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
        p = Problem(seq_len=1024, q_heads=8, head_dim=16, dtype="float32")
        with suppress(*AUTHOR_ERRORS):  # it may not fit this problem
            drawn += masks.mask_figure(method, p, folder / f"mask_{label}")
    return drawn


def expand(request: Sweep) -> list[Group]:
    """Problem groups of a request, each checked as far as it can be without running.

    Raises:
        ValueError: a value is wrong, in one line.
    """
    asked = request.methods if request.methods != Sweep.methods else ()
    request = _with_defaults(request)
    for field in fields(request):
        value = getattr(request, field.name)
        if value == ():
            name = field.name.replace("_", "-")
            raise ValueError(f"--{name} is an empty list; name at least one")
        if isinstance(value, tuple):
            request = replace(request, **{field.name: tuple(dict.fromkeys(value))})
    _check_scalars(request)
    cells, groups = _cells(request), []
    blocks = [_block_size(text) for text in request.block_size]
    axes = (request.dtype, request.causal, request.head_dim, request.heads, request.batch)
    for dtype, causal, dim, heads, batch in itertools.product(*axes):
        for kv, n, block in itertools.product(
            request.kv_heads or (heads,), request.seq_len, blocks
        ):
            p = Problem(batch=batch, q_heads=heads, kv_heads=kv, seq_len=n, head_dim=dim,
                        dtype=dtype, causal=causal)  # fmt: skip
            groups.append(
                Group(problem=p, block_size=block, cells=cells, phases=request.phases,
                      device=request.device, seed=request.seed, run=request.run,
                      rounds=request.rounds, seconds=request.seconds)
            )  # fmt: skip
    for spec in asked:
        _must_fit_one(spec, [group.problem for group in groups])
    return groups


def _must_fit_one(spec: str, problems: Sequence[Problem]) -> None:
    """Where a method fits some problems, the others are rows that say why not."""
    method, refusals = parse_method(spec), []
    for p in problems:
        try:
            method.validate(p)
            return
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]


def _with_defaults(request: Sweep) -> Sweep:
    device = named_device(request.device)
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else "cpu"
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    defaults = {
        "seq_len": (1024, 4096, 16384) if on_gpu else (512, 1024, 2048),
        "head_dim": (128,) if on_gpu else (64,),
        "dtype": ("bfloat16",) if on_gpu else ("float32",),
        "run": f"{name.lower().replace(' ', '-')}-{stamp}",
        "device": str(device),
    }
    chosen = {k: v for k, v in defaults.items() if getattr(request, k) is None}
    return replace(request, **chosen | {"device": str(device)})


def named_device(text: str | None) -> torch.device:
    """The device of --device; a GPU where there is one if it is not given.

    Raises:
        ValueError: this machine has no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text is None:
        return torch.device("cuda:0" if count else "cpu")
    allowed = ["cpu", *(f"cuda:{index}" for index in range(count))]
    name = "cuda:0" if text == "cuda" else text
    if name not in allowed:
        raise ValueError(f"--device is {text!r}; this machine has {', '.join(allowed)}")
    return torch.device(name)


def _check_scalars(request: Sweep) -> None:
    for phase in request.phases:
        if phase not in PHASES:
            raise ValueError(f"--phases has {phase!r}; it takes {', '.join(PHASES)}")
    for name in ("rounds", "seconds", "time_limit"):
        if not getattr(request, name) > 0:
            given = getattr(request, name)
            raise ValueError(f"--{name.replace('_', '-')} is {given}; it must be above 0")
    if not 0 <= request.seed < 1 << 32:
        raise ValueError(f"--seed is {request.seed}; it must be 0 to {(1 << 32) - 1}")
    check_run_name(request.run)


def check_run_name(run: str) -> None:
    """Raises ValueError unless a run is named by a plain file name."""
    if Path(run).name != run or run in ("", ".", ".."):
        raise ValueError(f"--run is {run!r}; it must be a plain file name")


def _cells(request: Sweep) -> tuple[Cell, ...]:
    """Methods x backends, as far as a backend computes a method; the baseline comes first."""
    device = torch.device(request.device)
    parsed: dict[Method, str] = {}
    for spec in (BASELINE, *request.methods):
        method = parse_method(spec)
        for known, other in parsed.items():
            if known.name == method.name and type(known) is not type(method):
                raise ValueError(
                    f"--methods: {other!r} and {spec!r} are both named {known.name!r}"
                )
        parsed.setdefault(method, spec)  # one cell, however often it is named
    backends = request.backends or _default_backends(device)
    for name in backends:
        if name not in BACKENDS:
            raise ValueError(f"--backends has {name!r}; it takes {', '.join(BACKENDS)}")
        missing = BACKENDS[name].missing(device)
        if request.backends and missing:
            raise ValueError(f"--backends has {name!r}, which this machine lacks: {missing}")
    cells = tuple(
        Cell(spec, name)
        for method, spec in parsed.items()
        for name in backends
        if BACKENDS[name].computes(method)
    )
    for spec in request.methods:
        if not any(BACKENDS[name].computes(parse_method(spec)) for name in backends):
            names = ", ".join(backends)
            raise ValueError(f"--methods has {spec!r}, which none of {names} computes")
    return cells


def _default_backends(device: torch.device) -> tuple[str, ...]:
    """The fastest ways there are, as far as they are installed, and the dense peers."""
    if device.type == "cuda":
        fastest = (x for x in ("flash", "varlen", "fa4") if not BACKENDS[x].missing(device))
        return ("flex", *fastest, "sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
    return ("flex", "blockwise", "sdpa-flash")


def _block_size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    sizes = tuple(int(part) for part in parts if part.isdecimal())
    if len(sizes) != len(parts) or len(parts) > 2 or not all(16 <= x <= 4096 for x in sizes):
        raise ValueError(f"--block-size has {text!r}; it takes ROWS or ROWSxKEYS, each 16 to 4096")
    return (sizes[0], sizes[-1])


def must_be_writable(*folders: Path) -> None:
    """Makes folders. Raises ValueError where one cannot be made or written in."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ValueError(f"cannot write in {folder}: {error.strerror}") from None


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
        for group in todo:
            bar.update(task, description=f"measuring {_title(group)}")
            measured = worker.measure(group, clockwork)
            for cell in group.cells:
                about = known.get((group.problem, group.block_size, cell))
                measured[cell] = [_completed(row, about) for row in measured[cell]]
            finished = [row for cell in group.cells for row in measured[cell]]
            rows = _put(rows, finished, store)
            bar.advance(task, len(group.cells))
    return rows


def _completed(row: Row, known: Known | None) -> Row:
    """The row with what was known of its cell before it was measured."""
    if known is None:
        return row
    kernel, tiles = known.ran.get(row.phase) or (None, None)
    return replace(row, compile_s=known.compile_s, kernel=kernel, tiles=tiles)


def _put(rows: list[Row], finished: list[Row], store: Store) -> list[Row]:
    """All rows, on disk: finished ones replace those of the same cells on the same device."""
    fresh = {_cell_key(row) for row in finished}
    kept = [row for row in rows if _cell_key(row) not in fresh]
    if len(kept) == len(rows):
        store.append(finished)
    else:
        store.replace(kept + finished)
    return kept + finished


def _cell_key(row: Row) -> tuple:
    size = (row.q_block, row.kv_block)
    return row.device, row.problem, size, row.method, row.params, row.backend, row.phase


def _compile(todo: list[Group], memory: Memory, time_limit: float, bar: Progress) -> Ahead:
    task = bar.add_task("compiling ahead", total=sum(1 for _ in compile_jobs(todo)))
    return compile_ahead(todo, memory, time_limit, lambda: bar.advance(task))


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
    console.print(f"rows: {csv_path}\nfigures: {plots} ({drawn} files)", highlight=False)
    console.print(f"time: {sum(spent.values()):.0f} s ({parts})", highlight=False)
    sys.stdout.flush()
