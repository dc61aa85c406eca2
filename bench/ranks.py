"""Cells of a training run in processes of their own, and what ranks of torchrun tell each other.

Every rank is two processes: one that watches and writes, and one for each cell, which may die. The
watchers meet in torchrun's store, so a rank whose process died, or ran out of memory, ends the
cell for all of them in a row that says so; nobody waits in a collective operation for ever.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
import torch._dynamo.config
import torch.distributed as dist

from bench.failures import CELL_ERRORS, one_line, status_of
from bench.record import Row
from bench.steps import Job, World, run_job
from bench.worker import SPAWN, STOP_LIMIT, how_it_died, interrupts_held, set_up

LOOK = 0.2  # seconds between looks at the other ranks
SETTLE = 3.0  # seconds in which ranks that fail together have all said so
# Of several ranks' failures the first of these is the cause of the others.
CAUSES = ("oom", "unsupported", "mismatch", "timeout", "crash")


class JobFailed(RuntimeError):
    """A cell could not be measured, for a status of the row and a reason."""

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason = status, reason


@dataclass(frozen=True)
class Ranks:
    """This rank among those of torchrun; one alone without it."""

    rank: int = 0
    local: int = 0
    size: int = 1
    store: dist.Store | None = None

    @classmethod
    def of_environment(cls) -> Ranks:
        """What torchrun, or another launcher, has set.

        Raises:
            ValueError: a variable is missing or no number.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls()
        try:
            rank, size, port = (int(os.environ[x]) for x in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            host, local = os.environ["MASTER_ADDR"], int(os.environ.get("LOCAL_RANK", rank))
        except (KeyError, ValueError) as error:
            raise ValueError(
                "WORLD_SIZE is set, but RANK, MASTER_ADDR or MASTER_PORT is not, or is no number "
                f"({error}); start by torchrun"
            ) from None
        shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, local, size, _store(host, port, serve=rank == 0 and not shared))

    def agree(self, name: str, value: object) -> object:
        """Rank 0's value (as JSON), for all ranks."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
        return json.loads(self.store.get(name))

    def end(self, status: int) -> None:
        """Says how rank 0 ended, to ranks that wait for it or have not heard what to do."""
        if self.store is not None:
            self.store.set("todo", "[]")
            self.store.set("status", str(status))

    def tell(self, cell: int, status: str, reason: str) -> None:
        """Says that this rank failed in a cell."""
        if self.store is not None:
            self.store.set(f"{cell}/failed/{self.rank}", json.dumps([status, reason]))
            self.store.set(f"{cell}/failed", "")

    def failed(self, cell: int) -> bool:
        """Whether any rank failed in a cell."""
        return self.store is not None and self.store.check([f"{cell}/failed"])

    def cause(self, cell: int) -> tuple[str, str]:
        """Status of the failure that explains the others, and what each rank had to say."""
        keys = {rank: f"{cell}/failed/{rank}" for rank in range(self.size)}
        told = {
            rank: json.loads(self.store.get(key))
            for rank, key in keys.items()
            if self.store.check([key])
        }
        status = min((status for status, _ in told.values()), key=CAUSES.index)
        return status, "; ".join(f"rank {rank}: {reason}" for rank, (_, reason) in told.items())


class Started(NamedTuple):
    """A process that waits for a job, or does it."""

    process: SPAWN.Process
    connection: Connection

    def end(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join(STOP_LIMIT)


class Apart:
    """Runs jobs in processes of their own, together with those of the other ranks.

    Args:
        ahead: whether the next job's process imports what it needs, which takes seconds, while
            the one before is at work. On a CPU it would take the cores of what is timed.
    """

    def __init__(self, ranks: Ranks, ahead: bool) -> None:
        self.ranks, self.ahead = ranks, ahead
        self._next: Started | None = None

    def __enter__(self) -> Apart:
        return self

    def __exit__(self, *error: object) -> None:
        if self._next is not None:
            self._next.end()

    def run(self, job: Job, cell: int, limit: float, announce: Callable[[str], None]) -> list[Row]:
        """A job's rows.

        Args:
            cell: its number, the same in every rank.
            limit: seconds without progress after which it is given up.

        Raises:
            JobFailed: here or in another rank.
        """
        own = self._next or self._start()
        self._next = self._start() if self.ahead else None
        try:
            return _watch(own, job, self.ranks, cell, limit, announce)
        except JobFailed as failure:
            own.process.kill()  # it may hold the device, and the others in a collective operation
            if self.ranks.store is None:
                raise
            time.sleep(SETTLE)
            raise JobFailed(*self.ranks.cause(cell)) from failure
        finally:
            own.end()

    def _start(self) -> Started:
        connection, theirs = SPAWN.Pipe()
        process = SPAWN.Process(target=_work, args=(theirs, self.ranks.rank, self.ranks.size))
        process.daemon = True
        with interrupts_held():
            process.start()
        theirs.close()
        return Started(process, connection)


def _watch(
    started: Started, job: Job, ranks: Ranks, cell: int, limit: float,
    announce: Callable[[str], None],
) -> list[Row]:  # fmt: skip
    """Follows a job to its rows; a failure of its process is told to the other ranks."""
    process, connection = started
    since, doing = time.monotonic(), "starting"
    try:
        connection.send((job, cell))
        while not ranks.failed(cell):
            if connection.poll(LOOK):
                kind, *content = connection.recv()
                if kind == "done":
                    process.join(STOP_LIMIT)  # a peer may still need it to leave in order
                    return content[0]
                if kind == "failed":
                    raise JobFailed(*content)
                since, doing = time.monotonic(), content[0]
                announce(doing)
            elif time.monotonic() - since > limit:
                raise JobFailed("timeout", f"no progress within {limit:.0f} s, in {doing}")
    except (EOFError, OSError):
        process.join(STOP_LIMIT)
        failure = JobFailed("crash", f"{how_it_died(process.exitcode)}, in {doing}")
        ranks.tell(cell, failure.status, failure.reason)
        raise failure from None
    except JobFailed as failure:
        ranks.tell(cell, failure.status, failure.reason)
        raise
    raise JobFailed("crash", "another rank failed")


def _work(connection: Connection, rank: int, size: int) -> None:
    """The process of one cell, which it is told once it has imported what it needs."""
    import torch._inductor.compile_fx  # else the first call would

    set_up()
    # A layer that is compiled anew for every other would run uncompiled from the ninth on.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # It would cut the model at buckets of gradients, and attention with it.
    torch._dynamo.config.optimize_ddp = False
    try:
        job, cell = connection.recv()
    except EOFError:
        return  # there is none
    try:
        if size > 1:
            _join(job, rank, size, cell)
        rows = run_job(job, World(rank, size), lambda text: connection.send(("doing", text)))
        if size > 1:
            dist.destroy_process_group()
        connection.send(("done", rows))
    except CELL_ERRORS as error:
        connection.send(("failed", status_of(error), one_line(error)))


def _join(job: Job, rank: int, size: int, cell: int) -> None:
    """Meets the processes of the other ranks, for this cell alone."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    device = torch.device(job.group.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if on_gpu else "gloo", store=dist.PrefixStore(f"cell/{cell}", _store(host, port)),
        rank=rank, world_size=size, device_id=device if on_gpu else None,
    )  # fmt: skip


def _store(host: str, port: int, serve: bool = False) -> dist.Store:
    """The store of all ranks, without what an earlier attempt of torchrun left in it."""
    store = dist.TCPStore(host, port, is_master=serve, wait_for_workers=False)
    return dist.PrefixStore(f"train/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
