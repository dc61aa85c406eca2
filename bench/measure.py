"""One problem group: every cell gated, then sampled in interleaved rounds, then made rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from bench import chip, timing
from bench.backends import (
    BACKENDS,
    BACKWARD_PHASES,
    Attention,
    first_calls,
    forward_backward,
    phase_call,
)
from bench.ceilings import Ceilings, cold_bytes, needed_rows
from bench.cells import Cell, Group, Prepared, failure_rows, rows_of, utc_now
from bench.confirm import TOLERANCE, change, copies, relative_error
from bench.derived import FLOPS_PER_PAIR
from bench.failures import (
    CELL_ERRORS,
    no_tiles,
    one_line,
    out_of_memory,
    raise_if_lost,
    status_of,
)
from bench.gate import Gate, draw
from bench.record import Environment, Row
from bench.sampling import sample_rounds
from bench.specs import parse_method
from methods import Method
from methods.blocks import computed_pairs
from methods.method import static_parts

ERRORS = ("error_out", "error_dq", "error_dk", "error_dv", "error_budget")
STALE = "what was timed does not follow its inputs: other values make it off by {:.3g}"


class Clockwork:
    """Where the time of a sweep goes: seconds by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._open: tuple[str, float] | None = None

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Not within another."""
        self._open = name, time.perf_counter()
        try:
            yield
        finally:
            self.spent, self._open = self.so_far(), None

    def so_far(self) -> dict[str, float]:
        """What was spent, on what is not done yet, too."""
        if self._open is None:
            return dict(self.spent)
        name, start = self._open
        seconds = self.spent.get(name, 0.0) + time.perf_counter() - start
        return self.spent | {name: seconds}

    def add(self, spent: Mapping[str, float]) -> None:
        for name, seconds in spent.items():
            self.spent[name] = self.spent.get(name, 0.0) + seconds


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


@dataclass(frozen=True)
class Measured:
    """What came of a group.

    Attributes:
        rows: of every cell that was measured or failed.
        alone: cells that found no memory beside the others, and have no rows yet.
        traced: whether CUPTI was at work, after which launches of this process take longer.
    """

    rows: dict[Cell, list[Row]]
    alone: list[Cell]
    traced: bool


def measure_group(
    group: Group, machine: Machine, announce: Callable[[Cell], None], clockwork: Clockwork
) -> Measured:
    """Measures every cell of a group that fits beside the others.

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
    bench.gate.release()
    traced = any("kernels" in key for x in ready for key in x.samplers)
    for cupti in (False, True):  # once it was at work, every launch takes longer
        alone += _sample(bench, ready, cupti, machine, announce)
    alone += bench.confirm(ready, announce)
    stamp = utc_now()
    rows |= {x.cell: rows_of(group, machine.env, x, machine.ceilings, stamp) for x in ready}
    del bench, ready  # whatever comes next needs the memory
    static_parts.cache_clear()
    _empty(device)
    return Measured(rows, alone, traced)


def _sample(
    bench: Bench, ready: list[Prepared], cupti: bool, machine: Machine,
    announce: Callable[[Cell], None],
) -> list[Cell]:  # fmt: skip
    """Samples what is ready; takes out, and returns, what finds no memory for it any more."""
    short: list[Cell] = []
    running: list[Cell] = []

    def tell(cell: Cell) -> None:
        running.append(cell)
        announce(cell)

    while ready:
        running.clear()
        try:
            bench.sample(ready, cupti, machine.read_chip, tell)
            break
        except CELL_ERRORS as error:
            if not out_of_memory(error) or not running or len(ready) == 1:
                raise
        short.append(running[-1])
        ready[:] = [x for x in ready if x.cell != running[-1]]
        _empty(bench.device)
    return short


class Bench:
    """Inputs and gate of one group."""

    def __init__(self, group: Group, device: torch.device, clockwork: Clockwork) -> None:
        self.group, self.device, self.clockwork = group, device, clockwork
        self.p = group.problem
        self.sets = 1
        if device.type == "cuda":
            heads = self.p.q_heads + self.p.kv_heads  # without k, which some methods share with q
            size = heads * self.p.batch * self.p.seq_len * self.p.head_dim
            self.sets = timing.input_sets(size * self.p.torch_dtype.itemsize, device)
        generator = torch.Generator(device).manual_seed(group.seed)
        self.inputs = [draw(self.p, device, generator) for _ in range(self.sets)]
        self.gate = Gate(self.p, group.block_size, generator, group.seed)

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
        prepared.attention = attention
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
        pairs = prepared.facts["allowed_pairs"] = method.allowed_pairs(self.p, state)
        if not pairs:
            reason = "no query sees a key: the method allows no pair of them"
            prepared.refused |= {x: ("mismatch", reason) for x in wanted}
            return attention
        if backend.uses_blocks:
            layout = method.layout(q, k, v, self.p, state, self.group.block_size)
            prepared.kept = layout.block_mask, layout.score_mod
            heads = layout.q.shape[1]  # a kernel may see the rounds of a head as heads
            as_seen = replace(self.p, q_heads=heads, kv_heads=heads)
            prepared.facts["computed_pairs"] = computed_pairs(layout.block_mask, as_seen)
        if self.p.causal and self.gate.sees_future(method, state):
            reason = "the mask allows keys after the query, but the problem is causal"
            prepared.refused |= {x: ("mismatch", reason) for x in wanted}
            return attention
        gradients = any(phase in BACKWARD_PHASES for phase in wanted)
        with self.clockwork.on("compile"):
            first_calls(attention, inputs[0], wanted)
        with self.clockwork.on("gate"):
            verdict = self.gate.verdict(method, attention, wanted, backend.ties)
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

    def _blocks(self, method: Method, state: Any) -> BlockMask:
        return method.blocks(self.p, self.device, self.group.block_size, state)

    @torch.no_grad()
    def _prepare(self, method: Method, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """What a forward does before its kernel: for Reformer hash, sort and gather."""
        state = method.prepare(q, k, self.p)
        layout = method.layout(q, k, v, self.p, state, self.group.block_size)
        return layout.q, layout.k, layout.v

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
        prepared.timed[phase] = lambda: (0, calls[0]())
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
        else:
            prepared.timed[phase] = sampler.last
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
        self, ready: Sequence[Prepared], cupti: bool, read_chip: chip.Reader,
        announce: Callable[[Cell], None],
    ) -> None:  # fmt: skip
        """Samples in rounds what needs CUPTI, or every cell, phase and clock that does not."""
        chosen = {
            (number, *key): sampler
            for number, prepared in enumerate(ready)
            for key, sampler in prepared.samplers.items()
            if (key[1] == "kernels") == cupti
        }
        with self.clockwork.on("sample"):
            series = sample_rounds(
                chosen, rounds=self.group.rounds, seconds=self.group.seconds,
                seed=self.group.seed, read_chip=read_chip,
                announce=lambda key: announce(ready[key[0]].cell),
            )  # fmt: skip
        for (number, *key), taken in series.items():
            ready[number].series[tuple(key)] = taken

    def confirm(self, ready: list[Prepared], announce: Callable[[Cell], None]) -> list[Cell]:
        """Refuses what was timed and does not follow its inputs, which it changes for good.

        Takes out of `ready`, and returns, what finds no memory for that.
        """
        short: list[Cell] = []
        # A backward reads what its forward has kept: only its cotangent may be another.
        for part, phases in ((slice(3, 4), ("bwd",)), (slice(3), ("fwd", "fwd_bwd", "prepare"))):
            for inputs in self.inputs:
                change(inputs[part])
            for prepared in list(ready):
                if not (timed := [x for x in phases if x in prepared.timed]):
                    continue
                announce(prepared.cell)
                try:
                    with self.clockwork.on("gate"):
                        self._confirm(prepared, timed)
                    continue
                except CELL_ERRORS as error:
                    if not out_of_memory(error) or len(ready) == 1:
                        raise
                short.append(prepared.cell)
                ready.remove(prepared)  # the others may need its memory
                del prepared
                _empty(self.device)
        return short

    def _confirm(self, prepared: Prepared, phases: Sequence[str]) -> None:
        for phase in phases:
            number, results = prepared.timed[phase]()
            inputs = copies(self._inputs(prepared.method)[number])
            if phase == "prepare":
                expected = self._prepare(prepared.method, *inputs[:3])
            else:  # of a backward with its forward, which keeps nothing
                whole = "fwd_bwd" if phase == "bwd" else phase
                expected = phase_call(prepared.attention, whole, inputs)()
            if (error := relative_error(results, expected)) > TOLERANCE:
                prepared.refused[phase] = ("mismatch", STALE.format(error))
                for key in [key for key in prepared.series if key[0] == phase]:
                    del prepared.series[key]


def _empty(device: torch.device) -> None:
    """Gives back what nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
