"""Every preset, element type and head dim on compiled FlexAttention, held against float64.

`python -m tests.gpu.matrix --output FILE` has the harness gate each of them at a round N and at a
ragged one with grouped heads, the forward without gradients and forward + backward, and writes a
line a cell; with `--resume` after those that FILE has. Exit status 1: a cell is neither right nor
beyond the device by one of LIMITS.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch

from bench.ahead import cores
from bench.cells import Cell, Group
from bench.measure import Clockwork
from bench.record import ROOT, Environment, Row, encode, environment
from bench.request import named_device
from bench.worker import Worker
from methods import METHODS, Problem
from methods.attend import NO_LSE
from tests.gpu.device import the_gpu

DTYPES = ("bfloat16", "float16", "float32")
HEAD_DIMS = (16, 32, 64, 96, 128, 192, 256)
SHAPES = ((1024, 8), (1001, 2))  # N, key and value heads
PHASES = ("fwd", "fwd_bwd")
COLUMNS = (
    "method", "seq_len", "q_heads", "kv_heads", "head_dim", "dtype", "causal", "phase", "status",
    "error_budget", "limit", "reason", "device", "torch", "code",
)  # fmt: skip
KEY = COLUMNS[: COLUMNS.index("status")]
TIME_LIMIT = 300.0  # seconds of one cell

# What is unsupported, by how its reason begins or what it has in it.
LIMITS = {
    "shared memory": r"out of resource: (?:shared memory,|\w+) "
                     r"Required: (?P<needed>\d+),? Hardware limit: ?(?P<had>\d+)",
    "no tiles for such blocks": "FlexAttention has no tiles on this device for blocks of",
    "no backward on a CPU": "FlexAttention has no backward on a CPU",
    "no log-sum-exp on a CPU": re.escape(NO_LSE),
}  # fmt: skip
# Where so many rows of D elements have room, the tiles do: a backward holds 128 each of q, k, v
# and dO, and products of them.
ROWS_AT_ONCE = 5 * 128


def one(
    name: str,
    p: Problem,
    phases: tuple[str, ...],
    device: str = "cuda:0",
    backend: str = "flex",
    block_size: tuple[int, int] = (128, 128),
) -> Group:
    """A cell that is gated by itself."""
    return Group(
        problem=p, block_size=block_size, cells=(Cell(name, backend),), phases=phases,
        device=device, seed=1, rounds=1, seconds=0.0, run="matrix",
    )  # fmt: skip


def matrix(
    methods: Iterable[str] = METHODS,
    dtypes: Iterable[str] = DTYPES,
    head_dims: Iterable[int] = HEAD_DIMS,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    device: str = "cuda:0",
    causal: bool = True,
) -> Iterator[Group]:
    """The cells, a phase each, the widest first: they take longest.

    A method that shares queries and keys has as many heads of both.
    """
    axes = itertools.product(sorted(head_dims, reverse=True), dtypes, shapes, methods, PHASES)
    for dim, dtype, (n, kv_heads), name, phase in axes:
        heads = 8 if METHODS[name].shared_qk else kv_heads
        p = Problem(seq_len=n, q_heads=8, kv_heads=heads, head_dim=dim, dtype=dtype, causal=causal)
        yield one(name, p, (phase,), device)


def gated(jobs: Sequence[Group]) -> Iterator[Row]:
    """A row for every cell, in order, each as soon as those before it are there.

    Many processes share the device, since nothing here is a time. One that dies is a `crash`.
    """
    if not jobs:
        return
    idle: SimpleQueue[Worker] = SimpleQueue()

    def measured(job: Group) -> Row:
        worker = idle.get()
        try:
            (rows,) = worker.measure(job, Clockwork()).values()
        finally:
            idle.put(worker)
        return next((row for row in rows if row.status != "ok"), rows[0])

    count = min(len(jobs), cores())
    with ThreadPoolExecutor(count) as pool:
        start = partial(Worker, jobs[0].device, TIME_LIMIT, ceilings=False)
        workers = [future.result() for future in [pool.submit(start) for _ in range(count)]]
        for worker in workers:
            idle.put(worker)
        yield from pool.map(measured, jobs)
        # A process is killed when the thread ends that started it: these may clean up.
        list(pool.map(Worker.stop, workers))


def limit(row: Row) -> str | None:
    """What an `unsupported` cell is beyond, by torch's or the harness's reason, or None."""
    if row.status != "unsupported":
        return None
    for name, pattern in LIMITS.items():
        if found := re.search(pattern, row.reason or ""):
            sizes = {key: int(x) for key, x in found.groupdict().items()}
            least = ROWS_AT_ONCE * row.head_dim * row.problem.torch_dtype.itemsize
            if not sizes or sizes["had"] < min(sizes["needed"], least):
                return name
    return None


def sound(row: Row) -> bool:
    """Whether a cell is right, or beyond its device by one of LIMITS."""
    if row.status == "ok":
        return row.error_budget <= 1
    return limit(row) is not None


def outcome(row: Row) -> str:
    """A cell's status, and the name of the limit that it is beyond."""
    found = limit(row)
    return f"{row.status}, {found}" if found else row.status


def line(row: Row) -> list[object]:
    """A row as COLUMNS have it."""
    found = {"limit": limit(row)}
    return [encode(found[x] if x in found else getattr(row, x)) for x in COLUMNS]


def key(job: Group) -> list[str]:
    """KEY of a cell, as it stands in a file."""
    (cell,), (phase,) = job.cells, job.phases
    values = asdict(job.problem) | {"method": cell.method, "phase": phase}
    return [str(encode(values[x])) for x in KEY]


def found_in(path: Path, env: Environment) -> list[list[str]]:
    """The whole lines of a file, of this device and torch, that say nothing wrong.

    Of whatever code, which they name: a matrix takes longer than a day's changes leave it.

    Raises:
        ValueError: it is no table of this script.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        header, *lines = csv.reader(file)
    if tuple(header) != COLUMNS:
        raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}")
    whole = [dict(zip(COLUMNS, x, strict=True)) for x in lines if len(x) == len(COLUMNS)]
    here = [x for x in whole if (x["device"], x["torch"]) == (env.device, env.torch)]
    return [list(x.values()) for x in here if x["status"] == "ok" or x["limit"]]


def write_before(path: Path, lines: Sequence[Sequence[str]]) -> None:
    """At once, so that a file is never without them."""
    beside = path.with_suffix(".new")
    with beside.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *lines])
    beside.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "matrix.csv")
    parser.add_argument("--device", help="the GPU by default")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--head-dim", nargs="+", type=int, default=HEAD_DIMS)
    parser.add_argument("--resume", action="store_true", help="keep the lines of FILE")
    given = parser.parse_args()
    device = str(named_device(given.device) if given.device else the_gpu(parser))
    before = found_in(given.output, environment(torch.device(device))) if given.resume else []
    known = [x[: len(KEY)] for x in before]
    jobs = list(matrix(given.methods, given.dtype, given.head_dim, device=device))
    jobs = [job for job in jobs if key(job) not in known]
    outcomes, wrong = Counter(), 0
    write_before(given.output, before)
    with given.output.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        for row in gated(jobs):
            writer.writerow(line(row))
            file.flush()
            outcomes[outcome(row)] += 1
            wrong += not sound(row)
            print(*line(row)[:-3], flush=True)
    print(f"{len(jobs)} cells, {wrong} wrong:", *(f"{n} {x};" for x, n in outcomes.most_common()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
