"""One problem group: every cell gated, then sampled in interleaved rounds, then made rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench import chip, oracle, timing
from bench.backends import (
    BACKENDS,
    BACKWARD_PHASES,
    Attention,
    first_calls,
    forward,
    forward_backward,
    phase_call,
)
from bench.ceilings import Ceilings, cold_bytes, needed_rows
from bench.cells import Cell, Group, Prepared, failure_rows, rows_of
from bench.derived import FLOPS_PER_PAIR
from bench.failures import (
    CELL_ERRORS,
    no_tiles,
    one_line,
    out_of_memory,
    raise_if_lost,
    status_of,
)
from bench.record import Environment, Row
from bench.sampling import sample_rounds
from bench.specs import parse_method
from bench.tied import tied
from methods import Method
from methods.blocks import computed_pairs
from methods.method import static_parts

ERRORS = ("error_out", "error_dq", "error_dk", "error_dv", "error_budget")
# The gate looks at blocks of at most this many rows and keys, whatever a kernel visits.
GATE_BLOCK = 128
# It samples rows in at most this many blocks a head: its cost would go with the square of N, and
# at a million tokens be minutes a method.
GATE_ROW_BLOCKS = 1024
# Between two runs of one kernel: additions in another order, rounded to 16 bits.
GRAPH_TOLERANCE = 0.01


class Clockwork:
    """Where the time of a sweep goes: seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.spent[name] = self.spent.get(name, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Machine:
    """What is known of the device before anything is measured on it.

    Attributes:
        ceilings: None on a CPU.
        read_chip: asks the chip for clock, power and temperature.
    """

    env: Environment
    ceilings: Ceilings | None = None
    read_chip: chip.Reader = lambda: None


def measure_group(
    group: Group, machine: Machine, announce: Callable[[Cell], None], clockwork: Clockwork
) -> dict[Cell, list[Row]]:
    """Rows of every cell of a group.

    Args:
        announce: told of the cell that is about to run, so that a crash has a name.
    """
    device = torch.device(group.device)
    bench = Bench(group, device, clockwork)
    ready, alone, rows = [], [], {}
    for cell in group.cells:
        announce(cell)
        try:
            ready.append(bench.prepare(cell))
        except CELL_ERRORS as error:
            if not out_of_memory(error):
                raise
            if ready and group.shared:
                alone.append(cell)  # it may fit once the others are gone
            else:
                rows[cell] = failure_rows(group, machine.env, cell, "oom", one_line(error))
            _empty(device)
    bench.reference = None
    alone += _sample(bench, ready, machine, announce)
    # No variable of this function may hold a cell from here on: what runs alone needs its memory.
    rows |= {x.cell: rows_of(group, machine.env, x, machine.ceilings) for x in ready}
    by_cupti = any("kernels" in key for x in ready for key in x.samplers)
    del bench, ready
    static_parts.cache_clear()
    _empty(device)
    for cell in alone:
        single = replace(group, cells=(cell,), shared=False)
        if by_cupti:
            reason = "too large beside the others, and CUPTI was at work: measure it by itself"
            rows[cell] = failure_rows(group, machine.env, cell, "oom", reason)
        else:
            rows |= measure_group(single, machine, announce, clockwork)
    return rows


def _sample(
    bench: Bench, ready: list[Prepared], machine: Machine, announce: Callable[[Cell], None]
) -> list[Cell]:
    """Samples what is ready; takes out, and returns, what finds no memory for it any more."""
    short: list[Cell] = []
    running: list[Cell] = []

    def tell(cell: Cell) -> None:
        running.append(cell)
        announce(cell)

    while ready:
        running.clear()
        try:
            bench.sample(ready, machine.read_chip, tell)
            break
        except CELL_ERRORS as error:
            if not out_of_memory(error) or not running or len(ready) == 1:
                raise
        short.append(running[-1])
        ready[:] = [x for x in ready if x.cell != running[-1]]
        _empty(bench.device)
    return short


class Bench:
    """Inputs, references and gate of one group."""

    def __init__(self, group: Group, device: torch.device, clockwork: Clockwork) -> None:
        self.group, self.device, self.clockwork = group, device, clockwork
        self.p = group.problem
        self.sets = 1
        if device.type == "cuda":
            heads = self.p.q_heads + self.p.kv_heads  # without k, which some methods share with q
            size = heads * self.p.batch * self.p.seq_len * self.p.head_dim
            self.sets = timing.input_sets(size * self.p.torch_dtype.itemsize, device)
        generator = torch.Generator(device).manual_seed(group.seed)
        self.inputs = [self._draw(generator) for _ in range(self.sets)]
        self.gate_blocks = tuple(min(size, GATE_BLOCK) for size in group.block_size)
        apart = max(self.gate_blocks[0], self.p.seq_len // GATE_ROW_BLOCKS)
        self.rows = oracle.sample_rows(self.p, apart, device, group.seed)
        self.cotangent = oracle.cotangent(self.p, self.rows, device, group.seed)
        # Cells come method by method, and a reference holds float64 gradients: one is kept.
        self.reference: tuple[Method, oracle.Reference] | None = None

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        """q, k, v as leaves, and a dense gradient of the output."""
        p = self.p
        heads = (p.q_heads, p.kv_heads, p.kv_heads, p.q_heads)
        drawn = [
            torch.randn(
                (p.batch, h, p.seq_len, p.head_dim), generator=generator, device=self.device,
                dtype=torch.float64 if p.dtype == "float64" else torch.float32,
            ).to(p.torch_dtype)
            for h in heads
        ]  # fmt: skip
        return (*(x.requires_grad_() for x in drawn[:3]), drawn[3])

    def _inputs(self, method: Method) -> list[tuple[Tensor, ...]]:
        """Sets of q, k, v and gradient; k is q where a method shares them."""
        if not method.shared_qk:
            return self.inputs
        return [(q, q, v, grad_out) for q, _, v, grad_out in self.inputs]

    def prepare(self, cell: Cell) -> Prepared:
        """Builds, gates and makes samplers; whatever is refused says why."""
        method, backend = parse_method(cell.method), BACKENDS[cell.backend]
        prepared = Prepared(cell, method)
        for phase in self.group.phases:
            reason = backend.refusal(method, self.p, self.device, phase)
            if reason is not None:
                prepared.refused[phase] = ("unsupported", reason)
        wanted = [x for x in self.group.phases if x not in prepared.refused]
        if not wanted:
            return prepared
        try:
            attention = self._attention(prepared, wanted)
        except (*CELL_ERRORS, *backend.says_no) as error:
            status = status_of(error, backend.says_no)
            if status == "oom":
                raise
            raise_if_lost(self.device)
            reason = no_tiles(self.group.block_size, error) or one_line(error)
            prepared.refused |= {x: (status, reason) for x in wanted}
            return prepared
        for phase in wanted:
            if phase not in prepared.refused:
                with self.clockwork.on("capture"):
                    self._add_samplers(prepared, attention, phase)
        return prepared

    def _attention(self, prepared: Prepared, wanted: list[str]) -> Attention:
        """The cell's function, compiled, counted and gated."""
        method, backend = prepared.method, BACKENDS[prepared.cell.backend]
        attention = backend.build(method, self.p, self.device, self.group.block_size)
        inputs = self._inputs(method)
        q, k, v = (x.detach() for x in inputs[0][:3])
        state = prepared.state = method.prepare(q, k, self.p)
        if fault := method.state_fault(q, k, self.p, state):
            prepared.refused |= {x: ("mismatch", fault) for x in wanted}
            return attention
        prepared.facts["allowed_pairs"] = method.allowed_pairs(self.p, state)
        if backend.uses_blocks:
            layout = method.layout(q, k, v, self.p, state, self.group.block_size)
            prepared.kept = layout.block_mask, layout.score_mod
            heads = layout.q.shape[1]  # a kernel may see the rounds of a head as heads
            as_seen = replace(self.p, q_heads=heads, kv_heads=heads)
            prepared.facts["computed_pairs"] = computed_pairs(layout.block_mask, as_seen)
        if self.p.causal and self._sees_future(method, state):
            reason = "the mask allows keys after the query, but the problem is causal"
            prepared.refused |= {x: ("mismatch", reason) for x in wanted}
            return attention
        gradients = any(phase in BACKWARD_PHASES for phase in wanted)
        with self.clockwork.on("compile"):
            first_calls(attention, inputs[0], wanted)
        with self.clockwork.on("gate"):
            verdict = self._gate(prepared, attention, wanted)
        prepared.facts |= {name: getattr(verdict, name) for name in ERRORS}
        if not verdict.passed:
            prepared.refused |= {x: ("mismatch", verdict.reason) for x in wanted}
        elif self.device.type == "cuda":
            if gradients:
                own = sum(x.nbytes for x in {*inputs[0]})
                call = partial(forward_backward, attention, inputs[0])
                lists = prepared.list_bytes()
                prepared.facts["peak_bytes"] = own + lists + self._peak_bytes(call)
            if "layout" in wanted:
                build = partial(self._blocks, method, state)
                prepared.layout_bytes = self._peak_bytes(build)
        return attention

    def _sees_future(self, method: Method, state: Any) -> bool:
        """Whether a later key is allowed, in a few rows of every head."""
        some = self.rows[:, :: max(1, self.rows.shape[1] // 8)]
        later = torch.arange(self.p.seq_len, device=self.device) > some[..., None]
        return bool((method.rows(self.p, self.device, some, state).isfinite() & later).any())

    def _blocks(self, method: Method, state: Any) -> BlockMask:
        return method.blocks(self.p, self.device, self.group.block_size, state)

    @torch.no_grad()
    def _prepare(self, method: Method, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What a forward does before its kernel: for Reformer hash, sort and gather."""
        state = method.prepare(q, k, self.p)
        layout = method.layout(q, k, v, self.p, state, self.group.block_size)
        return layout.q, layout.k, layout.v

    def _gate(
        self, prepared: Prepared, attention: Attention, wanted: Sequence[str]
    ) -> oracle.Verdict:
        """Judges every function that will be timed: without gradients is another kernel."""
        method, state = prepared.method, prepared.state
        q, k, v, _ = self._inputs(method)[0]
        one = k is q and BACKENDS[prepared.cell.backend].ties
        if k is q and not one:  # leaves of their own, so that their gradients are judged apart
            k = q.detach().requires_grad_()
        if self.reference is None or self.reference[0] != method:
            self.reference = method, oracle.build_reference(
                method, self.p, q.detach(), k.detach(), v.detach(), self.rows, self.cotangent,
                state=state, block_size=self.gate_blocks,
            )  # fmt: skip
        reference = tied(self.reference[1]) if one else self.reference[1]
        verdicts = []
        gradients = any(phase in BACKWARD_PHASES for phase in wanted)
        if "fwd" in wanted or not gradients:
            _poison(self.device, 4 * q.numel() * q.element_size())
            out, lse = forward(attention, q.detach(), k.detach(), v.detach())
            verdicts.append(oracle.judge(reference, out, lse, None))
        if gradients:
            _poison(self.device, 4 * q.numel() * q.element_size())
            out, lse = attention(q, k, v)
            dq, dk, dv = torch.autograd.grad(out, (q, k, v), self.cotangent)
            grads = (None if one else dq, dk, dv)
            verdicts.append(oracle.judge(reference, out.detach(), lse, grads))
        worst = max(verdict.error_budget for verdict in verdicts)
        judged = next((x for x in verdicts if not x.passed), verdicts[-1])
        return replace(judged, error_budget=worst)

    def _peak_bytes(self, call: timing.Call) -> int:
        """Device memory at the peak of a call, less what was taken before it."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def _add_samplers(self, prepared: Prepared, attention: Attention, phase: str) -> None:
        if phase == "layout":
            call = partial(self._blocks, prepared.method, prepared.state)
            prepared.samplers[phase, "host"] = timing.host_sampler(call, self.device)
            return
        inputs = self._inputs(prepared.method)
        if phase == "prepare":
            calls = [partial(self._prepare, prepared.method, *x[:3]) for x in inputs]
        else:
            calls = [phase_call(attention, phase, x) for x in inputs]
        if self.device.type == "cuda":
            self._add_device_sampler(prepared, phase, calls)
        prepared.samplers[phase, "host"] = timing.host_sampler(calls[0], self.device)

    def _add_device_sampler(self, prepared: Prepared, phase: str, calls: list[Callable]) -> None:
        clock, sets = "device", len(calls)
        try:
            sampler = timing.device_sampler(calls, self.device)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            raise_if_lost(self.device)
            prepared.uncaptured[phase] = f"no graph: {one_line(error)}"
            if not self.group.cupti:
                return
            clock, sets, sampler = "kernels", 1, timing.Span(calls[0], self.device)
        prepared.samplers[phase, clock] = sampler
        if phase in FLOPS_PER_PAIR:
            prepared.cold[phase, clock] = self._cold_bytes(prepared, phase, sets)

    def _cold_bytes(self, prepared: Prepared, phase: str, sets: int) -> float:
        """Of a call; calls go round so many sets of inputs."""
        method, device = prepared.method, self.inputs[0][0].device
        if prepared.needed is None:
            prepared.needed = needed_rows(method, self.p, device, prepared.state)
        return cold_bytes(
            self.p, phase, prepared.needed, shared_qk=method.shared_qk,
            l2_bytes=timing.l2_bytes(self.device), sets=sets,
        )  # fmt: skip

    def sample(
        self, ready: Sequence[Prepared], read_chip: chip.Reader, announce: Callable[[Cell], None]
    ) -> None:
        """Samples every cell, phase and clock in rounds.

        What needs CUPTI comes last: once it was at work, every launch takes longer.
        """
        jobs = {(x, *key): sampler for x in range(len(ready))
                for key, sampler in ready[x].samplers.items()}  # fmt: skip
        for cupti in (False, True):
            chosen = {key: x for key, x in jobs.items() if (key[2] == "kernels") == cupti}
            with self.clockwork.on("sample"):
                series = sample_rounds(
                    chosen, rounds=self.group.rounds, seconds=self.group.seconds,
                    seed=self.group.seed, read_chip=read_chip,
                    announce=lambda key: announce(ready[key[0]].cell),
                )  # fmt: skip
            for (index, *key), taken in series.items():
                ready[index].series[tuple(key)] = taken
        if self.device.type == "cuda":
            for prepared in ready:
                announce(prepared.cell)
                with self.clockwork.on("gate"):
                    _check_graphs(prepared)


def _check_graphs(prepared: Prepared) -> None:
    """The gate judged calls; what was timed are graphs of them, which must give the same."""
    for (phase, clock), sampler in prepared.samplers.items():
        if clock == "device" and (error := sampler.error()) > GRAPH_TOLERANCE:
            reason = f"the captured graph's results are off by {error:.3g} from the call's"
            prepared.refused[phase] = ("mismatch", reason)
            for key in [key for key in prepared.series if key[0] == phase]:
                del prepared.series[key]


def _poison(device: torch.device, size: int) -> None:
    """Leaves NaN in memory that the allocator will hand out again: unwritten outputs show."""
    held = [torch.full((size // 4,), torch.nan, device=device) for _ in range(4)]
    del held


def _empty(device: torch.device) -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
