"""Where a call's time goes, kernel by kernel: python run_bench.py profile."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench import timing
from bench.ahead import compile_ahead, side_by_side
from bench.cells import Cell, Group, Prepared
from bench.failures import CELL_ERRORS, one_line, status_of
from bench.kernels import described
from bench.measure import Bench, Clockwork
from bench.record import ROOT, code_hash
from bench.request import Sweep, expand, must_be_writable, named_device
from bench.specs import parameters_text, source_file
from bench.tables import read_table, write_table
from bench.worker import set_up_sweep
from methods import Problem

REPLAYS = 10
TIME_LIMIT = 300.0  # seconds without progress
SHOWN = 0.01  # of a call's time; in print, what takes less is one line
BETWEEN, OTHERS = "between kernels", "others"
USUAL_BLOCKS = (128, 128)  # of which no title speaks
Refused = tuple[str, str, str]  # a call, its status and the reason


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of calls goes, kernel by kernel (CUDA).

    Every call passes the check that a sweep makes, and is what a sweep times by the device clock.
    """

    methods: tuple[str, ...]
    """Presets, NAME:parameter=value,... or FILE.py:NAME for a method of your own."""
    backends: tuple[str, ...] = ("flex",)
    """Ways to run them (see `list`)."""
    seq_len: tuple[int, ...] = (4096,)
    """Tokens a sequence."""
    heads: tuple[int, ...] = (8,)
    """Query heads."""
    kv_heads: tuple[int, ...] | None = None
    """Key and value heads; by default as many as query heads."""
    head_dim: tuple[int, ...] = (128,)
    """Features a head."""
    batch: tuple[int, ...] = (1,)
    """Sequences a call."""
    dtype: tuple[str, ...] = ("bfloat16",)
    """Element types."""
    causal: tuple[bool, ...] = (True,)
    """Whether a query sees only the past."""
    block_size: tuple[str, ...] = ("128",)
    """Blocks of the mask: ROWS or ROWSxKEYS."""
    phases: tuple[str, ...] = ("fwd_bwd",)
    """What is profiled: fwd, bwd, fwd_bwd, prepare."""
    device: str | None = None
    """cuda:0 by default."""
    run: str | None = None
    """Name of results/NAME.csv; default profile and UTC time."""
    output: str | None = None
    """Folder that holds results/; default this repository."""


@dataclass(frozen=True, kw_only=True)
class Line(Problem):
    """A kernel's part of a call's time, or what lies between the kernels.

    Attributes:
        clock: device, or kernels for what no CUDA graph can capture; of `call_us`.
        launches: a call.
        us: microseconds a call; of BETWEEN the call's less all kernels', below 0 where they
            overlap.
        call_us: of the whole call, without the profiler where the clock is device.
    """

    q_block: int
    kv_block: int
    device_name: str
    torch: str
    code: str
    method: str
    params: str | None
    backend: str
    phase: str
    clock: str
    kernel: str
    launches: float
    us: float
    call_us: float


def profile(request: Profile, console: Console) -> int:
    """Runs a profile; returns the exit status.

    Raises:
        ValueError: the request is wrong, or there is no CUDA device; nothing was run or written.
    """
    groups = _groups(request)
    path = Path(request.output or ROOT) / "results" / f"{groups[0].run}.csv"
    if path.exists():
        raise ValueError(f"{path} exists; choose another --run")
    must_be_writable(path.parent)
    compile_ahead(groups, None, TIME_LIMIT, lambda: None)
    # In a process of its own: a kernel may take it down or hang, and this one opens no device.
    jobs = [(group,) for group in groups]
    found = side_by_side(profile_group, jobs, set_up_sweep, TIME_LIMIT, lambda: None, most=1)
    lines = [line for _, (of_group, _) in found for line in of_group]
    write_table(path, lines, Line)
    print_profile(lines, console)
    refused = [failure for _, (_, of_group) in found for failure in of_group]
    done = [group for (group,), _ in found]
    reason = f"no answer: its process ended, or took more than {TIME_LIMIT:.0f} s"
    for group in (group for group in groups if group not in done):
        refused += [(_title_of(group, cell), "crash", reason) for cell in group.cells]
    for failure in refused:
        console.print(escape(": ".join(failure)), highlight=False)
    console.print(f"lines: {path}", highlight=False)
    return 1 if any(status in ("mismatch", "crash") for _, status, _ in refused) else 0


def _groups(request: Profile) -> list[Group]:
    """A sweep's groups, without a baseline that nobody asked for."""
    device = named_device(request.device)
    if device.type != "cuda":
        raise ValueError(f"profile needs a CUDA device; it would run on {device}")
    if "layout" in request.phases:
        raise ValueError("--phases has 'layout', which runs on the host; sweep times it")
    run = request.run or time.strftime("profile-%Y%m%dT%H%M%S", time.gmtime())
    return expand(Sweep(**vars(request) | {"run": run, "device": str(device), "baseline": False}))


def profile_group(group: Group) -> tuple[list[Line], list[Refused]]:
    """Lines of every cell of a group, and what is not profiled and why."""
    device = torch.device(group.device)
    timing.use_side_stream(device)
    bench, lines, refused = Bench(group, device, Clockwork()), [], []
    for cell in group.cells:
        try:
            prepared = bench.prepare(cell)
            refused += [
                (_title_of(group, cell, phase), *why) for phase, why in prepared.refused.items()
            ]
            lines += _lines(group, prepared, device)
        except CELL_ERRORS as error:
            refused.append((_title_of(group, cell), status_of(error), one_line(error)))
    return lines, refused


def _lines(group: Group, prepared: Prepared, device: torch.device) -> Iterator[Line]:
    """A line for each kernel of each phase, and one for what lies between them."""
    user_file = source_file(prepared.cell.method)
    about = dict(
        device_name=torch.cuda.get_device_name(device), torch=torch.__version__,
        code=code_hash([user_file] if user_file else []), method=prepared.method.name,
        params=parameters_text(prepared.method), backend=prepared.cell.backend,
        q_block=group.block_size[0], kv_block=group.block_size[1], **asdict(group.problem),
    )  # fmt: skip
    for (phase, clock), sampler in prepared.samplers.items():
        if clock == "host":
            continue
        call_us = statistics.median(sampler() for _ in range(REPLAYS))
        spent, launches = kernels_of(sampler)
        for name, us in spent.most_common():
            yield Line(phase=phase, clock=clock, kernel=name, launches=launches[name], us=us,
                       call_us=call_us, **about)  # fmt: skip
        yield Line(phase=phase, clock=clock, kernel=BETWEEN, launches=0.0,
                   us=call_us - spent.total(), call_us=call_us, **about)  # fmt: skip


def kernels_of(sampler: timing.Replay | timing.Span) -> tuple[Counter[str], Counter[str]]:
    """Microseconds and launches a call, by kernel."""
    spent, launches = Counter(), Counter()
    share = 1 / (REPLAYS * sampler.count)
    for _ in range(REPLAYS):
        for event in sampler.events():
            name = described(event.name)
            spent[name] += event.time_range.elapsed_us() * share
            launches[name] += share
    return spent, launches


def is_profile(path: Path) -> bool:
    """Whether a file is a profile's, rather than a sweep's."""
    with path.open(errors="replace") as file:  # it may be anything
        return file.readline().strip().split(",") == [field.name for field in fields(Line)]


def read_profile(path: Path) -> list[Line]:
    """The lines of a file that `profile` wrote; raises as `read_table`."""
    return read_table(path, Line)


def calls(lines: Iterable[Line]) -> list[list[Line]]:
    """Lines by the call that they are of."""
    found: dict[Line, list[Line]] = {}
    for line in lines:
        found.setdefault(replace(line, kernel="", launches=0.0, us=0.0), []).append(line)
    return list(found.values())


def shown(lines: Sequence[Line], least: float = SHOWN) -> list[tuple[str, float, float]]:
    """Kernel, launches and microseconds of a call; those below a share of it are put together."""
    kernels = [x for x in lines if x.kernel != BETWEEN]
    large = [x for x in kernels if x.us >= least * x.call_us]
    small = [x for x in kernels if x not in large]
    rows = [(x.kernel, x.launches, x.us) for x in large]
    if small:
        rows.append((OTHERS, sum(x.launches for x in small), sum(x.us for x in small)))
    return rows + [(x.kernel, 0.0, x.us) for x in lines if x.kernel == BETWEEN]


def print_profile(lines: Iterable[Line], console: Console) -> None:
    for call in calls(lines):
        first = call[0]
        blocks = first.q_block, first.kv_block
        name = _title(Cell(first.method, first.backend), first, blocks, first.phase)
        title = escape(f"{name}: {first.call_us:.1f} us by the {first.clock} clock")
        table = Table("kernel", "launches", "us", "share", title=title, title_justify="left")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, launches, us in shown(call):
            count = f"{launches:.3g}" if launches else ""
            table.add_row(escape(name), count, f"{us:.1f}", f"{us / first.call_us:.1%}")
        console.print(table)


def _title_of(group: Group, cell: Cell, phase: str = "") -> str:
    return _title(cell, group.problem, group.block_size, phase)


def _title(cell: Cell, p: Problem, blocks: tuple[int, int], phase: str) -> str:
    size = f"N = {p.seq_len}, heads {p.q_heads}, dim {p.head_dim}, {p.dtype}"
    other = "" if blocks == USUAL_BLOCKS else f"blocks {blocks[0]}x{blocks[1]}"
    return ", ".join(filter(None, (f"{cell.method} on {cell.backend}", phase, size, other)))
