"""One model under one method: gated, then trained and timed, in a process of its own.

Weights, gradients and the optimiser's moments are bfloat16 on a GPU and float32 on a CPU. A step
is forward, backward and AdamW, on new tokens every time.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from bench import chip, timing
from bench.ahead import first_call
from bench.ceilings import measure_ceilings
from bench.cells import Cell, Group, Prepared, rows_of
from bench.failures import CELL_ERRORS, one_line, raise_if_lost
from bench.measure import ERRORS, Clockwork, Machine, measure_group
from bench.models import Model, build, compile_model, parameters, recompute_layers
from bench.record import STATUSES, STEP, Row, environment
from bench.sampling import Series
from bench.specialisation import Specialised
from bench.specs import parse_method
from bench.step_attention import IDENTITY, step_attention
from bench.step_kernels import kernel_split
from bench.text import read_text
from bench.trained_heads import INITIAL, MOST_TOKENS, TRAINED, head_measures, written
from methods import Method

BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
RANK_APART = 1_000_003  # seeds of neighbouring ranks; a CPU takes 32 bits of a seed
GATE = "allowed_pairs", "computed_pairs", *ERRORS
# Of the size of hidden states, that a layer and its backward hold; most where experts are many.
LAYER_TENSORS = 64
# Of the attention call by itself, whose speed-up bounds that of a step.
CALL_ROUNDS, CALL_SECONDS = 10, 2.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """One cell of a training run.

    Attributes:
        group: with one cell; batch is the sequences of each process.
        steps: that are timed, after `warmup` others.
        text: trains on its bytes; random tokens where None.
        data: how rows name it.
        checkpointing: whether layers are computed again in the backward.
        shard: FSDP2 in place of DDP, where there are several processes.
    """

    group: Group
    model: Model
    steps: int
    warmup: int
    learning_rate: float
    text: Path | None
    checkpointing: bool
    compiled: bool
    shard: bool
    data: str = "random"

    @property
    def cell(self) -> Cell:
        return self.group.cells[0]

    @property
    def recipe(self) -> str:
        """What a row's losses follow from, and how many steps it is of."""
        return (
            f"steps={self.steps},warmup={self.warmup},learning_rate={self.learning_rate:g},"
            f"seed={self.group.seed}"
        )


@dataclass(frozen=True)
class World:
    """This process among those that train together."""

    rank: int = 0
    size: int = 1

    def maxima(self, values: Sequence[float], device: torch.device) -> list[float]:
        return self._reduced(values, device, dist.ReduceOp.MAX)

    def means(self, values: Sequence[float], device: torch.device) -> list[float]:
        return [x / self.size for x in self._reduced(values, device, dist.ReduceOp.SUM)]

    def _reduced(
        self, values: Sequence[float], device: torch.device, by: dist.ReduceOp
    ) -> list[float]:
        if self.size == 1:
            return list(values)
        together = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(together, by)
        return together.tolist()


def method_of(cell: Cell) -> Method:
    return IDENTITY if cell.method == IDENTITY.name else parse_method(cell.method)


def unfinished(job: Job, world_size: int, status: str, reason: str) -> Prepared:
    """What is known of a cell that could not be measured."""
    prepared = Prepared(job.cell, method_of(job.cell))
    prepared.facts = _about(job, world_size)
    prepared.refused[STEP] = (status, reason)
    return prepared


def _about(job: Job, world_size: int) -> dict:
    return {
        "model": job.model.name, "world_size": world_size, "data": job.data, "recipe": job.recipe
    }  # fmt: skip


def run_job(job: Job, world: World, announce: Callable[[str], None]) -> list[Row]:
    """Rows of one cell: of the attention call by itself, and of the step.

    Args:
        announce: told of what is about to happen.
    """
    device = torch.device(job.group.device)
    timing.use_side_stream(device)  # what is captured cannot be on the default one
    machine = Machine(environment(device), measure_ceilings(device), chip.reader(device))
    prepared = Prepared(job.cell, method_of(job.cell), facts=_about(job, world.size))
    rows: list[Row] = []
    if prepared.method != IDENTITY:
        announce("the gate")
        rows = _call_rows(job, world.size, machine, announce)
        timing.release()  # a step's peak is the model's own
        prepared.facts |= {name: getattr(rows[0], name) for name in GATE}
        if why := _no_step(rows, world, device):
            prepared.refused[STEP] = why
    else:
        prepared.facts["allowed_pairs"] = 0
    if device.type == "cuda":
        torch.cuda.set_stream(torch.cuda.default_stream(device))
    if STEP not in prepared.refused:
        _Training(job, world, device, prepared).measure(announce)
    return rows + rows_of(job.group, machine.env, prepared, machine.ceilings)


def _no_step(rows: Sequence[Row], world: World, device: torch.device) -> tuple[str, str] | None:
    """Status and reason where the call by itself rules out a step: on one rank, on all."""
    # No other: a call that no graph can hold has no device time, but trains all the same.
    call = next(row for row in rows if row.clock == "host")
    worst = STATUSES[round(world.maxima([float(STATUSES.index(call.status))], device)[0])]
    if call.status != "ok":
        return call.status, f"attention by itself: {call.reason}"
    return (worst, "attention by itself, on another rank") if worst != "ok" else None


def _call_rows(
    job: Job, world_size: int, machine: Machine, announce: Callable[[str], None]
) -> list[Row]:
    """The attention call at the model's own shape, judged and timed as a sweep does it.

    But never by CUPTI: the steps that follow in this process would take longer.
    """
    group = replace(
        job.group, phases=("fwd_bwd",), rounds=CALL_ROUNDS, seconds=CALL_SECONDS, shared=False,
        cupti=False,
    )  # fmt: skip
    measured = measure_group(group, machine, lambda _: announce("the gate"), Clockwork())
    return [replace(row, **_about(job, world_size)) for row in measured.rows[job.cell]]


def compile_bytes(job: Job) -> int:
    """What `compile_first` holds besides the attention call, about: weights and activations."""
    p, single = job.group.problem, job.model.shortened(1)
    size = parameters(build(single, lambda q, k, v: v, 1, p.torch_dtype, torch.device("meta"), 0))
    held = 2 * size + LAYER_TENSORS * p.batch * p.seq_len * job.model.hidden
    return held * p.torch_dtype.itemsize


def compile_first(job: Job) -> None:
    """Fills the on-disk caches for a job: its attention call, and one layer of its model."""
    device, p = torch.device(job.group.device), job.group.problem
    method = method_of(job.cell)
    attention = step_attention(method, job.cell.backend, p, device, compiled=True)
    if method != IDENTITY:
        first = replace(job.group, phases=("fwd_bwd",))
        first_call(first, job.cell, named=False)
    single = job.model.shortened(1)
    model = build(single, attention.call, p.seq_len, p.torch_dtype, device, job.group.seed)
    compile_model(model, attention)
    ids = torch.zeros(p.batch, p.seq_len, dtype=torch.long, device=device)
    model.hidden(ids).sum().backward()


class _Training:
    """A model, its optimiser and its tokens."""

    def __init__(self, job: Job, world: World, device: torch.device, prepared: Prepared) -> None:
        self.job, self.world, self.device, self.prepared = job, world, device, prepared
        p = job.group.problem
        attention = step_attention(
            prepared.method, job.cell.backend, p, device, job.compiled
        )  # fmt: skip
        model = build(
            job.model, attention.call, p.seq_len, p.torch_dtype, device, job.group.seed
        )  # fmt: skip
        flops = model.step_flops(job.model, p.batch, p.seq_len, prepared.facts["allowed_pairs"])
        prepared.facts |= {"parameters": parameters(model), "model_flops": flops}
        shard = job.shard and world.size > 1
        if job.compiled:
            compile_model(model, attention)
        if job.checkpointing:
            recompute_layers(model)
        self.model = _spread(model, world, device, shard)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=job.learning_rate, betas=BETAS, weight_decay=WEIGHT_DECAY,
            fused=True,
        )  # fmt: skip
        self.next_tokens = tokens(job, world, device)
        self.losses: list[Tensor] = []

    def step(self) -> None:
        ids, targets = self.next_tokens()
        loss = self.model(ids, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.detach())

    def measure(self, announce: Callable[[str], None]) -> None:
        """Fills in what the row of the step holds."""
        facts, device = self.prepared.facts, self.device
        heads = self._heads(INITIAL, announce)
        for number in range(self.job.warmup):
            announce(f"step {number + 1} of the warm-up")
            self.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        # A reader of its own: another would tell of what compiled the model.
        times, readings = step_times(
            self.step, device, self.job.steps, chip.reader(device), lambda: announce("a step")
        )
        times = self.world.maxima(times, device)  # a step ends with the last process
        losses = self.world.means([float(loss) for loss in self.losses], device)
        if device.type == "cuda":
            peak = float(torch.cuda.max_memory_allocated(device))
            facts["peak_bytes"] = round(self.world.maxima([peak], device)[0])
        facts["losses"] = ";".join(f"{loss:.5g}" for loss in losses)
        if wrong := [k for k, loss in enumerate(losses, 1) if not abs(loss) < float("inf")]:
            self.prepared.refused[STEP] = ("mismatch", f"the loss of step {wrong[0]} is no number")
            facts["losses"] = None
            return
        self.prepared.series[STEP, "host"] = kept(times, readings, self.world, device)
        if heads and (after := self._heads(TRAINED, announce)):
            facts["heads"] = written(heads + after)
        if self.world.size > 1:
            return  # messages to the others run beside attention, and wait for them in kernels
        announce("the profiled steps")
        self._split(median(times))

    def _heads(self, weights: str, announce: Callable[[str], None]) -> list[Specialised]:
        """How much the heads of every layer differ now; random tokens teach them nothing."""
        job, method = self.job, self.prepared.method
        long = job.group.problem.seq_len > MOST_TOKENS
        if job.text is None or self.world.size > 1 or method == IDENTITY or long:
            return []
        announce(f"the heads, {weights}")
        # Of every method the same tokens, and others than those of the first step.
        others = replace(job, group=replace(job.group, seed=job.group.seed + 1))
        ids, _ = tokens(others, self.world, self.device)()
        try:
            return head_measures(self.model, job.model, method, job.group, ids, weights)
        except CELL_ERRORS as error:  # a step that was timed is not lost for it
            raise_if_lost(self.device)
            self.prepared.uncaptured[STEP] = f"heads not measured: {one_line(error)}"
            return []

    def _split(self, step_us: float) -> None:
        """By kernels, where that can be: a step that was timed is not lost for it.

        The profiler makes later launches slower, so it comes last.
        """
        facts, is_attention = self.prepared.facts, self.prepared.method != IDENTITY
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # CUPTI asks the device for memory, not torch
        try:
            facts |= kernel_split(self.step, self.device, step_us, is_attention)._asdict()
            if facts["step_kernels"] and facts["attention_us"] is None:
                self.prepared.uncaptured[STEP] = "not split: no kernel is named for attention"
        except CELL_ERRORS as error:
            raise_if_lost(self.device)
            self.prepared.uncaptured[STEP] = f"not split by kernels: {one_line(error)}"


def kept(
    times: Sequence[float], readings: Sequence[chip.Reading | None], world: World,
    device: torch.device,
) -> Series:  # fmt: skip
    """The steps that count: those in which no process's chip was slowed down."""
    slowed = world.maxima([float(x is not None and x.slowed) for x in readings], device)
    series = Series(discarded=round(sum(slowed)))
    for number, (us, reading) in enumerate(zip(times, readings, strict=True)):
        if not slowed[number]:
            series.keep(number, us, reading)
    return series


def _spread(
    model: nn.Module, world: World, device: torch.device, shard: bool
) -> nn.Module:  # fmt: skip
    """The model over all processes; gradients are averaged."""
    if world.size == 1:
        return model
    if shard:
        for layer in model.layers:
            fully_shard(layer)
        return fully_shard(model)
    own = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=own, gradient_as_bucket_view=True)


def tokens(job: Job, world: World, device: torch.device) -> Callable[[], tuple[Tensor, Tensor]]:
    """What gives the next batch: ids and next ids, int64 [B, N], on the device.

    The same for every method, and for every process other tokens.

    Raises:
        OSError, ValueError: the text cannot be used.
    """
    p = job.group.problem
    generator = torch.Generator(device).manual_seed(job.group.seed + RANK_APART * world.rank)
    if job.text is None:

        def draw() -> Tensor:
            shape = (p.batch, p.seq_len + 1)
            return torch.randint(
                job.model.vocabulary, shape, generator=generator, device=device
            )  # fmt: skip
    else:
        text = read_text(job.text, p.seq_len, job.model.vocabulary).to(device)
        places = torch.arange(p.seq_len + 1, device=device)

        def draw() -> Tensor:
            last = len(text) - p.seq_len
            starts = torch.randint(last, (p.batch, 1), generator=generator, device=device)
            return text[starts + places].long()

    def following() -> tuple[Tensor, Tensor]:
        drawn = draw()
        return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()

    return following


def step_times(
    step: Callable[[], None], device: torch.device, count: int, read_chip: chip.Reader,
    announce: Callable[[], None],
) -> tuple[list[float], list[chip.Reading | None]]:  # fmt: skip
    """Microseconds from the end of one step to the end of the next, and the chip's state then.

    A step is launched before the end of the last one is waited for: a training loop, too, does
    not wait for its loss.
    """
    marks, readings = [_mark(device)], []
    for _ in range(count):
        announce()
        step()
        marks.append(_mark(device))
        if device.type == "cuda":
            marks[-2].synchronize()
        readings.append(read_chip())
    if device.type == "cpu":
        return [(b - a) * 1e6 for a, b in itertools.pairwise(marks)], readings
    marks[-1].synchronize()
    return [a.elapsed_time(b) * 1e3 for a, b in itertools.pairwise(marks)], readings


def _mark(device: torch.device) -> torch.cuda.Event | float:
    if device.type == "cpu":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event
