"""Training throughput: models x lengths x methods -> rows of steps, tables and figures."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape

from bench.ahead import room, side_by_side
from bench.backends import BACKENDS
from bench.cells import Cell, Group, rows_of
from bench.derived import BASELINE
from bench.model_check import check
from bench.models import (
    MODELS,
    LanguageModel,
    Model,
    build,
    model_of_file,
    parameters,
    with_options,
)  # fmt: skip
from bench.ranks import Apart, JobFailed, Ranks
from bench.record import STEP, Environment, Row, Store, code_hash, environment
from bench.request import (
    FAST,
    MOST,
    check_resumed,
    check_run_name,
    destination,
    named_device,
    title,
)
from bench.specs import parameters_text, parse_method, source_file
from bench.step_attention import BLOCK, IDENTITY, trains
from bench.steps import Job, compile_bytes, compile_first, method_of, unfinished
from bench.style import drawn_into
from bench.text import read_text, text_name
from bench.train_figures import draw_training
from bench.train_report import one_line, print_training
from bench.trainings import job_of
from bench.worker import SPAWN, set_up_beside
from methods import METHODS, Problem

LARGE = 10**9  # parameters; from here on a model is sharded rather than copied to every GPU
ENDED = "ended by SIGTERM: another rank ended, or the run was ended"
LAST_WORD = timedelta(seconds=60)  # that other ranks wait for what rank 0 has to write


@dataclass(frozen=True, kw_only=True)
class Train:
    """Measure tokens/s of training a model, by method.

    On several GPUs: torchrun --nproc-per-node 2 -- run_bench.py train ...

    A step is forward, backward and AdamW. The same model is always measured with q + k + v in
    place of attention, too: no method gets above that.
    """

    model: str = "table2"
    """table2, olmoe-0.25b-1.75b or olmoe-1b-7b."""
    model_config: Path | None = None
    """Instead, a config.json of transformers: any causal language model with plain attention."""
    methods: tuple[str, ...] = tuple(name for name in METHODS if not trains(METHODS[name]))
    """Presets, NAME:parameter=value,... or FILE.py:NAME for a method of your own."""
    backends: tuple[str, ...] | None = None
    """Ways to run them; default flex, flash, varlen and fa4 (if installed), sdpa-flash and
    sdpa-cudnn on a GPU, blockwise and sdpa-flash on a CPU."""
    baseline: bool = True
    """Measure `standard` in any case, on every backend; without it, where the file has it."""
    seq_len: tuple[int, ...] = (1024,)
    """Tokens a sequence."""
    tokens: int | None = None
    """Tokens a step of each process: so many divided by the length are its sequences; default
    32768 on a GPU, 2048 on a CPU."""
    steps: int = 30
    """Steps that are timed."""
    warmup: int = 10
    """Steps before them."""
    learning_rate: float = 3e-4
    """Of AdamW; it stays the same."""
    text: Path | None = None
    """Train on the bytes of this file, each a token; default random tokens."""
    checkpointing: bool = False
    """Compute layers again in the backward, to save memory."""
    compiled: bool = True
    """Compile the model; without it, flex is still compiled on its own."""
    shard: bool | None = None
    """True: on several GPUs FSDP2 in place of DDP. False: DDP. Default FSDP2 for models of a
    billion parameters or more."""
    device: str | None = None
    """cpu or cuda:0; by default a GPU where there is one, and its own for every process."""
    time_limit: float = 900.0
    """Seconds without progress after which a cell is given up."""
    seed: int = 0
    """Seed of weights and tokens, the same for every method."""
    run: str | None = None
    """Name of results/NAME.csv and plots/NAME/; default train, model and UTC time."""
    output: str | None = None
    """Folder that holds results/ and plots/; default this repository."""
    resume: bool = False
    """Go on with a run of that name; what is complete is not measured again, and a failure is
    complete: delete its line to have it tried again."""


def train(request: Train, console: Console) -> int:
    """Runs the cells of a request; returns the exit status.

    Raises:
        ValueError: the request is wrong; nothing was run or written.
    """
    ranks = Ranks.of_environment()
    jobs = expand(request, ranks)
    if ranks.rank > 0:
        return _follow(jobs, request, ranks)
    status = 1
    try:
        path, plots = destination(request.output, jobs[0].group.run, request.resume)
        console.print(title(path, request.resume), highlight=False, markup=False)
        _introduce(jobs[0], ranks, console)
        with Store(path) as store:
            rows = _Run(jobs, request, ranks, store, console).measure()
        status = 1 if any(row.status in ("mismatch", "crash") for row in rows) else 0
    finally:
        ranks.end(status)  # the others wait for it, and need not for figures
    print_training(rows, console)
    drawn = draw_training(rows, plots)
    told = f"rows: {path}\n{drawn_into(plots, len(drawn))}"
    console.print(told, highlight=False, markup=False)
    return status


def expand(request: Train, ranks: Ranks) -> list[Job]:
    """Jobs of a request: at every length the baseline first and the identity last.

    Raises:
        ValueError, OSError: a value is wrong, in one line.
    """
    check_resumed(request.run, request.resume)
    _check(request)
    model, device = _model(request), _device(request, ranks)
    data = text_name(request.text) if request.text else "random"
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime())
    run = request.run or f"train-{model.name.replace(' ', '-')}-{stamp}"
    check_run_name(run)
    problems = [_problem(request, model, device, n) for n in dict.fromkeys(request.seq_len)]
    size = parameters(_checked(request, model, max(problems, key=lambda p: p.seq_len)))
    jobs = []
    for problem in problems:
        if request.text:
            read_text(request.text, problem.seq_len, model.vocabulary)
        for cell in _cells(request, device):
            group = Group(
                problem=problem, block_size=BLOCK, cells=(cell,), phases=(STEP,),
                device=str(device), seed=request.seed, rounds=request.steps, seconds=0.0, run=run,
                shared=False,
            )  # fmt: skip
            jobs.append(_job(request, group, model, size, data))
    return jobs


def _job(request: Train, group: Group, model: Model, size: int, data: str) -> Job:
    return Job(
        group=group, model=model, steps=request.steps, warmup=request.warmup,
        learning_rate=request.learning_rate, text=request.text, data=data,
        checkpointing=request.checkpointing, compiled=request.compiled,
        shard=size >= LARGE if request.shard is None else request.shard,
    )  # fmt: skip


def _device(request: Train, ranks: Ranks) -> torch.device:
    """That of this rank."""
    if ranks.size > 1 and ":" in (request.device or ""):
        raise ValueError(
            f"--device is {request.device!r}; under torchrun every process takes a GPU of its "
            "own, so leave it out, or give cuda or cpu"
        )
    device = named_device(request.device)
    several = device.type == "cuda" and ranks.size > 1
    return named_device(f"cuda:{ranks.local}") if several else device


def _problem(request: Train, model: Model, device: torch.device, seq_len: int) -> Problem:
    on_gpu = device.type == "cuda"
    tokens = request.tokens or (32768 if on_gpu else 2048)
    if seq_len < 1:
        raise ValueError(f"--seq-len has {seq_len}; it must be 1 or more")
    if tokens % seq_len:
        raise ValueError(f"--tokens is {tokens}; it must be a multiple of --seq-len {seq_len}")
    return Problem(
        batch=tokens // seq_len, q_heads=model.heads, kv_heads=model.kv_heads, seq_len=seq_len,
        head_dim=model.head_dim, dtype="bfloat16" if on_gpu else "float32",
    )  # fmt: skip


def _check(request: Train) -> None:
    for name in ("steps", "warmup", "time_limit"):
        if not 0 < (given := getattr(request, name)) <= MOST:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"{flag} is {given}; it must be above 0, and {MOST} at most")
    for name in ("learning_rate", "tokens"):
        given = getattr(request, name)
        if given is not None and not given > 0:
            raise ValueError(f"--{name.replace('_', '-')} is {given}; it must be above 0")
    for name in ("seq_len", "methods", "backends"):
        if getattr(request, name) == ():
            raise ValueError(f"--{name.replace('_', '-')} is an empty list; name at least one")
    if not 0 <= request.seed < 1 << 32:
        raise ValueError(f"--seed is {request.seed}; it must be 0 to {(1 << 32) - 1}")


def _model(request: Train) -> Model:
    if request.model_config is not None:
        if request.model != Train.model:
            raise ValueError(
                f"--model {request.model} and --model-config {request.model_config} are two "
                "models; give one"
            )
        model = model_of_file(request.model_config)
    elif request.model in MODELS:
        model = MODELS[request.model]
    else:
        raise ValueError(f"--model is {request.model!r}; it takes {', '.join(MODELS)}")
    return with_options(
        model, checkpointing=request.checkpointing, compiled=request.compiled, shard=request.shard
    )


def _checked(request: Train, model: Model, p: Problem) -> LanguageModel:
    """The model without its weights, which can be counted all the same."""
    try:
        return check(model, p)
    except ValueError as error:
        named = f"--model {request.model}"
        if request.model_config is not None:
            named = f"--model-config {request.model_config}"
        raise ValueError(f"{named}: {error}") from None


def _cells(request: Train, device: torch.device) -> list[Cell]:
    backends = tuple(dict.fromkeys(request.backends or _default_backends(device)))
    for name in backends:
        if name not in BACKENDS:
            raise ValueError(f"--backends has {name!r}; it takes {', '.join(BACKENDS)}")
        if missing := BACKENDS[name].missing(device):
            raise ValueError(f"--backends has {name!r}, which this machine lacks: {missing}")
    asked = (BASELINE, *request.methods) if request.baseline else request.methods
    specs = {parse_method(spec): spec for spec in reversed(asked)}
    cells = []
    for method, spec in reversed(specs.items()):
        if why := trains(method):
            raise ValueError(f"--methods has {spec!r}; {why}")
        able = [Cell(spec, name) for name in backends if BACKENDS[name].computes(method)]
        if not able:
            raise ValueError(f"none of --backends {', '.join(backends)} computes {spec!r}")
        cells += able
    return [*cells, Cell(IDENTITY.name, IDENTITY.name)]


def _default_backends(device: torch.device) -> tuple[str, ...]:
    if device.type == "cpu":
        return "blockwise", "sdpa-flash"
    fastest = (name for name in FAST if not BACKENDS[name].missing(device))
    return "flex", *fastest, "sdpa-flash", "sdpa-cudnn"


def _introduce(job: Job, ranks: Ranks, console: Console) -> None:
    model = build(job.model, None, 1, torch.bfloat16, torch.device("meta"), 0)
    processes = ""
    if ranks.size > 1:
        processes = f" · {ranks.size} processes, {'FSDP2' if job.shard else 'DDP'}"
    console.print(
        f"{job.model.name}: {parameters(model):,} parameters, {model.active_weights:,} of them in "
        f"the products of one token · {job.group.problem.dtype}{processes}",
        highlight=False, markup=False,
    )  # fmt: skip


def _follow(jobs: Sequence[Job], request: Train, ranks: Ranks) -> int:
    """What a rank does that writes nothing; returns its exit status.

    That of a run is rank 0's: one that ends with another would have torchrun end rank 0, too,
    which may be drawing.
    """
    with _apart(jobs, ranks) as apart:
        for number in ranks.agree("todo", None):
            try:
                apart.run(jobs[number], number, request.time_limit, lambda text: None)
            except JobFailed as failure:
                if failure.status in ("crash", "timeout"):
                    break
    try:
        ranks.store.wait(["status"], LAST_WORD)
        return 0
    except RuntimeError:
        return 1  # rank 0 is gone, or hangs


def _apart(jobs: Sequence[Job], ranks: Ranks) -> Apart:
    return Apart(ranks, ahead=jobs[0].group.device != "cpu")


@dataclass(frozen=True)
class _Run:
    """The cells of a run, one after another, and where their rows go."""

    jobs: Sequence[Job]
    request: Train
    ranks: Ranks
    store: Store
    console: Console

    def measure(self) -> list[Row]:
        """All rows of the file; those of a cell are on disk before the next begins."""
        with ProcessPoolExecutor(1, SPAWN) as pool:  # the device is not for this process
            device = torch.device(self.jobs[0].group.device)
            env = pool.submit(environment, device).result()
        rows = self.store.rows
        todo = [k for k, job in enumerate(self.jobs) if not self._complete(job, rows, env)]
        self._compile([self.jobs[number] for number in todo])
        with _apart(self.jobs, self.ranks) as apart:
            for number in self.ranks.agree("todo", todo):
                try:
                    measured, lost = self._one(number, apart, env)
                except KeyboardInterrupt as stop:
                    # torchrun ends the ranks that are left by SIGTERM; Ctrl-C is SIGINT.
                    if self.ranks.size > 1 and stop.args:
                        # Beside what an earlier run may have measured: nothing is lost for it.
                        self.store.append(self._failed(self.jobs[number], env, "crash", ENDED))
                    raise
                rows = self.store.put(rows, measured, job_of)
                self._say(measured[-1])
                if lost and self.ranks.size > 1:
                    break  # a rank is gone, and maybe its device
        return rows

    def _compile(self, jobs: Sequence[Job]) -> None:
        """One process on a GPU has nobody waiting for it, and all cores to itself."""
        if self.ranks.size > 1 or self.jobs[0].group.device == "cpu" or not self.request.compiled:
            return
        done = itertools.count(1)
        most = room([job.group for job in jobs], max(map(compile_bytes, jobs), default=0))
        with self.console.status(f"compiling {len(jobs)} cells ahead") as status:
            side_by_side(
                compile_first, [(job,) for job in jobs], set_up_beside, self.request.time_limit,
                lambda: status.update(f"compiling ahead: {next(done)} of {len(jobs)}"), most,
            )  # fmt: skip

    def _one(self, number: int, apart: Apart, env: Environment) -> tuple[list[Row], bool]:
        """Rows of a cell, and whether a process of it died."""
        job, limit = self.jobs[number], self.request.time_limit
        p, cell = job.group.problem, job.cell
        title = escape(f"N {p.seq_len}, {cell.method}, {cell.backend}")
        with self.console.status(title) as status:
            try:
                return apart.run(
                    job, number, limit, lambda text: status.update(f"{title}: {escape(text)}")
                ), False
            except JobFailed as failure:
                rows = self._failed(job, env, failure.status, failure.reason)
                return rows, failure.status in ("crash", "timeout")

    def _failed(self, job: Job, env: Environment, status: str, reason: str) -> list[Row]:
        return rows_of(job.group, env, unfinished(job, self.ranks.size, status, reason), None)

    def _complete(self, job: Job, rows: Sequence[Row], env: Environment) -> bool:
        """Whether a cell has a row of this code, environment, recipe and text.

        One that the whole run was ended in is tried again.
        """
        method, path = method_of(job.cell), source_file(job.cell.method)
        names = [f.name for f in fields(Environment) if f.name not in ("git_sha", "code")]
        wanted = {name: getattr(env, name) for name in names} | {
            "code": code_hash([path]) if path else env.code, "problem": job.group.problem,
            "method": method.name, "params": parameters_text(method), "phase": STEP,
            "backend": job.cell.backend, "model": job.model.name,
            "world_size": self.ranks.size, "data": job.data, "recipe": job.recipe,
        }  # fmt: skip
        return any(
            row.reason != ENDED and all(getattr(row, k) == v for k, v in wanted.items())
            for row in rows
        )

    def _say(self, row: Row) -> None:
        told = f"N {row.seq_len}  {row.method}  {row.backend}: {one_line(row)}"
        self.console.print(told, highlight=False, markup=False)
