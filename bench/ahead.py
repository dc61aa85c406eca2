"""What is known of cells before they are measured, by other processes on all cores."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch._dynamo.utils import counters

from bench import kernels
from bench.backends import BACKENDS, BACKWARD_PHASES, first_calls, phase_call
from bench.cells import Cell, Group
from bench.failures import CELL_ERRORS
from bench.recall import Memory, Seen
from bench.specs import parse_method
from bench.worker import SPAWN, START_LIMIT, interrupts_held, set_up_sweep
from methods import Problem


@dataclass(frozen=True)
class Known:
    """What a cell's first calls showed, now or in an earlier run.

    Attributes:
        compile_s: seconds that they took; None where the on-disk caches had everything.
        ran: the kernels of each phase; empty on a CPU.
        whole: whether no kernel's name is missed.
    """

    compile_s: float | None
    ran: Seen
    whole: bool = True


T = TypeVar("T")

MOST = 16  # processes
# Of each on a GPU: its context, and the tensors of a cell, in tensors of the queries' size.
CONTEXT_BYTES, TENSORS, SHARE_OF_MEMORY = 0.6e9, 12, 0.8

_BEFORE, _FORWARD = ("layout", "prepare"), ("fwd",)

Ahead = dict[tuple[Problem, tuple[int, int], Cell], Known]


def compile_ahead(
    groups: Sequence[Group], memory: Memory | None, time_limit: float, on_done: Callable[[], None]
) -> Ahead:
    """Compiles every cell's kernels into the on-disk caches, and looks which ones run.

    What fails here fails again, with a name, when it is measured.

    Args:
        memory: of what need not be done again.
        time_limit: seconds in which no cell ends, after which the rest is given up.
    """
    known, jobs = {}, []
    for group, cell in compile_jobs(groups):
        seen = memory and memory.recall(group, cell)
        if seen is None:
            jobs.append((group, cell))
        else:
            known[group.problem, group.block_size, cell] = Known(None, seen)
            on_done()
    finished = side_by_side(
        first_call, jobs, set_up_sweep, time_limit, on_done, room([group for group, _ in jobs])
    )
    if memory:
        memory.add((*job, found.ran) for job, found in finished if found.whole)
    for (group, cell), found in finished:
        known[group.problem, group.block_size, cell] = found
    return known


def side_by_side(
    function: Callable[..., T],
    jobs: Sequence[tuple],
    set_up: Callable[[], None],
    time_limit: float,
    on_done: Callable[[], None],
    most: int = MOST,
) -> list[tuple[tuple, T]]:
    """Jobs and what function(*job) returned, on all cores; those that failed are missing.

    Args:
        set_up: called once in every process.
        time_limit: seconds in which none ends, after which the rest is given up.
        most: processes.
    """
    found: list[tuple[tuple, T]] = []
    if not jobs:
        return found
    count = min(len(jobs), cores(), most)
    pool = ProcessPoolExecutor(count, mp_context=SPAWN, initializer=set_up)
    futures: dict[Future, tuple] = {}
    try:
        with interrupts_held():
            up = pool.submit(int)
            with suppress(BrokenProcessPool):  # one may die before all is said
                for job in jobs:
                    futures[pool.submit(function, *job)] = job
        wait([up], timeout=START_LIMIT)  # a process may need longer to come up than to do a job
        for future in _as_finished(futures, time_limit):
            if future.exception() is None:
                found.append((futures[future], future.result()))
            on_done()
    finally:
        if not all(future.done() for future in futures):
            _kill(pool)
        pool.shutdown(cancel_futures=True)
    return found


def room(groups: Sequence[Group], beside: int = 0) -> int:
    """Processes whose largest cells the device holds side by side.

    Args:
        beside: bytes that each holds besides a cell.
    """
    if not groups or groups[0].device == "cpu":
        return MOST
    largest = max(
        p.batch * p.q_heads * p.seq_len * p.head_dim * p.torch_dtype.itemsize
        for p in (group.problem for group in groups)
    )
    memory = torch.cuda.get_device_properties(groups[0].device).total_memory
    count = int(SHARE_OF_MEMORY * memory / (CONTEXT_BYTES + TENSORS * largest + beside))
    return max(1, min(MOST, count))


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def compile_jobs(groups: Sequence[Group]) -> Iterator[tuple[Group, Cell]]:
    """The cells whose first call compiles; on a GPU also those whose kernels are named.

    Whether a kernel takes a problem is asked of a GPU by the process that compiles: this one
    leaves the device alone.
    """
    for group in groups:
        for cell in group.cells:
            backend = BACKENDS[cell.backend]
            if group.device == "cpu":
                asked = backend.compiles and _wanted(group, cell)
            else:
                asked = backend.compiles or backend.few_kernels
            if asked:
                yield group, cell


def _kill(pool: ProcessPoolExecutor) -> None:
    """Ends a pool whose processes may hang; the pool itself only ever waits for them."""
    for process in list((pool._processes or {}).values()):
        process.kill()


def _as_finished(futures: Sequence[Future], limit: float) -> Iterator[Future]:
    """Futures as they end, until nothing ends for so many seconds."""
    left = set(futures)
    while left:
        done, left = wait(left, timeout=limit, return_when=FIRST_COMPLETED)
        if not done:
            return
        yield from done


def _wanted(group: Group, cell: Cell) -> list[str]:
    """The phases that run the cell's kernels."""
    backend, method = BACKENDS[cell.backend], parse_method(cell.method)
    device = torch.device(group.device)
    return [
        phase
        for phase in group.phases
        if phase not in _BEFORE and not backend.refusal(method, group.problem, device, phase)
    ]


def first_call(group: Group, cell: Cell, named: bool = True) -> Known:
    """Compiles a cell's kernels into the on-disk caches of this machine.

    Args:
        named: whether CUPTI is asked which ones run.
    """
    p, device, phases = group.problem, torch.device(group.device), _wanted(group, cell)
    if not phases:
        return Known(None, {})
    shapes = [(p.batch, h, p.seq_len, p.head_dim) for h in (p.q_heads, p.kv_heads, p.kv_heads)]
    q, k, v = (
        torch.randn(shape, device=device, dtype=p.torch_dtype, requires_grad=True)
        for shape in shapes
    )
    backend = BACKENDS[cell.backend]
    attention = backend.build(parse_method(cell.method), p, device, group.block_size)
    inputs = q, k, v, torch.randn_like(q)
    counters.clear()
    start, modules = time.perf_counter(), [kernels.generated()]
    for kind in (_FORWARD, BACKWARD_PHASES):
        first_calls(attention, inputs, [phase for phase in phases if phase in kind])
        modules.append(kernels.generated())
    seconds = time.perf_counter() - start
    seconds_if_cold = seconds if counters["inductor"]["fxgraph_cache_miss"] else None
    ran: Seen = {}
    if not (named and backend.few_kernels and device.type == "cuda"):
        return Known(seconds_if_cold, ran)
    with suppress(*CELL_ERRORS):  # names are missed, seconds are not
        for phase in phases:
            forward = phase in _FORWARD
            sources = slice(*modules[:2]) if forward else slice(*modules[1:])
            ran[phase] = kernels.ran(phase_call(attention, phase, inputs), device, sources)
    return Known(seconds_if_cold, ran, whole=len(ran) == len(phases))
