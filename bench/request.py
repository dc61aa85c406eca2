"""What may be asked of a sweep: its flags, and the groups of cells that follow from them."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from bench.backends import BACKENDS
from bench.cells import Cell, Group
from bench.derived import BASELINE
from bench.record import PHASES, ROOT
from bench.specs import parse_method
from methods import METHODS, Method, Problem

MOST = 1_000_000  # seconds and rounds: what no run reaches
FAST = "flash", "varlen", "fa4"  # backends that not every GPU has


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Measure methods over a range of problems: table, CSV and figures.

    Every combination of the lists is measured, and `standard` with it.
    """

    methods: tuple[str, ...] = tuple(METHODS)
    """Presets, NAME:parameter=value,... or FILE.py:NAME for a method of your own."""
    baseline: bool = True
    """Measure `standard` in any case, which speed-ups are held against; without it, lengths are
    in reach at which dense attention takes minutes a call."""
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
    """Interleaved rounds of samples, however long they last: 8 at least make 99 % intervals."""
    seconds: float = 10.0
    """Further rounds of a problem end after this time, or once every median is known to 1 %."""
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


def expand(request: Sweep) -> list[Group]:
    """Problem groups of a request, each checked as far as it can be without running.

    Raises:
        ValueError: a value is wrong, in one line.
    """
    check_resumed(request.run, request.resume)
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
            p = _problem(batch=batch, q_heads=heads, kv_heads=kv, seq_len=n, head_dim=dim,
                         dtype=dtype, causal=causal)  # fmt: skip
            groups.append(
                Group(problem=p, block_size=block, cells=cells, phases=request.phases,
                      device=request.device, seed=request.seed, run=request.run,
                      rounds=request.rounds, seconds=request.seconds)
            )  # fmt: skip
    for spec in asked:
        _must_fit_one(spec, [group.problem for group in groups])
    return groups


def _problem(**values: Any) -> Problem:
    """What is wrong with it is said of the options that it was asked for by."""
    try:
        return Problem(**values)
    except ValueError as error:
        names = re.compile("|".join(rf"\b{name}\b" for name in values))
        flags = {"q_heads": "heads"}
        told = names.sub(lambda x: f"--{flags.get(x[0], x[0]).replace('_', '-')}", str(error))
        raise ValueError(told) from None


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
        given = getattr(request, name)
        if not 0 < given <= MOST:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {given}; it must be above 0, and {MOST} at most")
    if not 0 <= request.seed < 1 << 32:
        raise ValueError(f"--seed is {request.seed}; it must be 0 to {(1 << 32) - 1}")
    check_run_name(request.run)


def check_resumed(run: str | None, resume: bool) -> None:
    """Raises ValueError where nothing says which run to go on with."""
    if resume and run is None:
        raise ValueError("--resume goes on with a run, so it needs its name: --run NAME")


def check_run_name(run: str) -> None:
    """Raises ValueError unless a run is named by a plain file name."""
    if Path(run).name != run or run in ("", ".", ".."):
        raise ValueError(f"--run is {run!r}; it must be a plain file name")


def _cells(request: Sweep) -> tuple[Cell, ...]:
    """Methods x backends, as far as a backend computes a method; the baseline comes first."""
    device = torch.device(request.device)
    parsed: dict[Method, str] = {}
    for spec in (*[BASELINE] * request.baseline, *request.methods):
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
        fastest = (x for x in FAST if not BACKENDS[x].missing(device))
        return ("flex", *fastest, "sdpa-flash", "sdpa-cudnn", "sdpa-efficient")
    return ("flex", "blockwise", "sdpa-flash")


def left_out(request: Sweep) -> str | None:
    """Named backends that compute no method; or those of all that this machine lacks, and why."""
    if request.backends:
        methods = [parse_method(spec) for spec in (BASELINE, *request.methods)]
        methods = methods[not request.baseline :]
        idle = [x for x in request.backends if not any(map(BACKENDS[x].computes, methods))]
        return f"left out: {', '.join(idle)} (computes none of the methods)" if idle else None
    device = named_device(request.device)
    if device.type != "cuda":
        return None
    reasons: dict[str, list[str]] = {}
    for name in FAST:
        if missing := BACKENDS[name].missing(device):
            reasons.setdefault(missing, []).append(name)
    told = (f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
    return f"left out: {'; '.join(told)}" if reasons else None


def _block_size(text: str) -> tuple[int, int]:
    parts = text.split("x")
    sizes = tuple(int(part) for part in parts if part.isdecimal())
    if len(sizes) != len(parts) or len(parts) > 2 or not all(16 <= x <= 4096 for x in sizes):
        raise ValueError(f"--block-size has {text!r}; it takes ROWS or ROWSxKEYS, each 16 to 4096")
    return (sizes[0], sizes[-1])


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


def title(csv_path: Path, resume: bool) -> str:
    """Which run it is, in a line; a name that was mistyped beside --resume shows in it."""
    begins = "; there is none to go on with, so it begins" * (resume and not csv_path.exists())
    return f"run {csv_path.stem}: {csv_path}{begins}"


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
