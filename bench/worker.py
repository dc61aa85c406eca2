"""The process that owns the device, and may die."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from types import TracebackType

import torch
import torch._functorch.config
import torch._inductor.config

from bench import chip, timing
from bench.ceilings import measure_ceilings
from bench.cells import Cell, Group, failure_rows
from bench.failures import CELL_ERRORS, one_line, out_of_memory
from bench.measure import Clockwork, Machine, Measured, measure_group
from bench.record import Environment, Row, environment

SPAWN = multiprocessing.get_context("spawn")
START_LIMIT = 300.0  # seconds to import and to open the device
START_TRIES = 2
STOP_LIMIT = 10.0  # seconds to clean up
PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TRACKER = threading.Lock()


class CellFailed(RuntimeError):
    """A cell took its process down; cell is None where none had begun."""

    def __init__(self, cell: Cell | None, status: str, reason: str) -> None:
        super().__init__(f"{status}: {reason}")
        self.cell, self.status, self.reason = cell, status, reason


class Worker:
    """The process that owns the device; started again after a death."""

    def __init__(self, device: str, time_limit: float, ceilings: bool = True) -> None:
        self.device, self.time_limit, self._ceilings = device, time_limit, ceilings
        self._spent = False
        self.environment = self._start()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._process.kill()  # whoever interrupts does not wait for the cell to end
        self.stop()

    def measure(self, group: Group, clockwork: Clockwork) -> dict[Cell, list[Row]]:
        """Rows of every cell of a group, those of cells that took the process down among them."""
        failed: dict[Cell, list[Row]] = {}
        tried_again = False
        if self._spent:  # CUPTI was at work there, and launches would take longer
            self.stop()
            self._start()
            self._spent = False
        while len(failed) < len(group.cells):
            cells = tuple(cell for cell in group.cells if cell not in failed)
            try:
                found = self._measure_once(replace(group, cells=cells), clockwork)
                self._spent, rows = found.traced, failed | found.rows
                for cell in found.alone:
                    single = replace(group, cells=(cell,), shared=False)
                    rows |= self.measure(single, clockwork)
                return rows
            except CellFailed as death:
                self._process.kill()
                self.stop()
                self._start()
                if death.cell is None and death.status == "crash" and not tried_again:
                    tried_again = True  # it may have been ended from outside
                    continue
                # Before any cell had begun, it is the problem itself that none can have.
                for cell in cells if death.cell is None else (death.cell,):
                    failed[cell] = failure_rows(
                        group, self.environment, cell, death.status, death.reason
                    )
        return failed

    def stop(self) -> None:
        """Ends the process: it leaves when nobody is at the other end, or is made to."""
        self._connection.close()
        self._process.join(STOP_LIMIT)
        self._process.kill()
        self._process.join(STOP_LIMIT)

    def _start(self) -> Environment:
        """A new process.

        Raises:
            ChildProcessError: none comes up.
        """
        for _ in range(START_TRIES):
            self._connection, theirs = SPAWN.Pipe()
            self._process = SPAWN.Process(
                target=_serve, args=(theirs, self.device, self._ceilings), daemon=True
            )
            with interrupts_held():
                self._process.start()
            theirs.close()
            try:
                return self._receive(None, START_LIMIT)[-1]
            except CellFailed as death:
                reason = death.reason
                self._process.kill()
                self.stop()
        raise ChildProcessError(f"no process comes up that measures on {self.device}: {reason}")

    def _measure_once(self, group: Group, clockwork: Clockwork) -> Measured:
        running: Cell | None = None
        spent: dict[str, float] = {}
        try:
            self._connection.send(group)
        except OSError:
            raise self._died(running) from None
        try:
            while True:
                kind, spent, *content = self._receive(running, self.time_limit)
                if kind == "running":
                    running = content[0]
                elif kind == "failed":
                    raise CellFailed(running, *content)
                else:
                    return content[0]
        finally:  # also of a problem that is not measured to its end
            clockwork.add(spent)

    def _receive(self, running: Cell | None, limit: float) -> tuple:
        try:
            if self._connection.poll(limit):
                return self._connection.recv()
        except (EOFError, OSError):  # closed, or in the middle of a message
            raise self._died(running) from None
        raise CellFailed(running, "timeout", f"no progress within {limit:.0f} s")

    def _died(self, running: Cell | None) -> CellFailed:
        self._process.join(STOP_LIMIT)
        return CellFailed(running, "crash", how_it_died(self._process.exitcode))


def how_it_died(exit_code: int | None) -> str:
    if exit_code is None:
        return "the process closed its connection and does not end"
    if exit_code >= 0:
        return f"the process ended with status {exit_code}"
    return f"the process was ended by {signal.Signals(-exit_code).name}"


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Processes started here never see an interrupt: their parent decides what it means."""
    _start_tracker()  # later, it would let interrupts through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """multiprocessing's: it frees what killed processes leave, and is not to tell the user so."""
    name = "PYTHONWARNINGS"
    with _TRACKER:  # several threads may each start a worker
        before = os.environ.get(name)
        os.environ[name] = ",".join(filter(None, (before, "ignore:resource_tracker:UserWarning")))
        try:
            resource_tracker.ensure_running()
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before


def set_up_sweep() -> None:
    """As `set_up_beside`; and what compiled code must agree on for the on-disk caches."""
    set_up_beside()
    torch._functorch.config.donated_buffer = False  # a backward is run again on one graph


def set_up_beside() -> None:
    """As `set_up`, for processes that compile side by side, and those that find it all on disk."""
    set_up()
    # Else each starts as many more as there are cores, which import torch first.
    torch._inductor.config.compile_threads = 1


def set_up() -> None:
    """Ends with the parent; tunes kernels alone; and has flash-attn-4 keep what it compiles."""
    end_with_parent()
    # torch times some kernels in several shapes and keeps the best on disk. What a process finds
    # that shares the device with others which compile is no more than noise: the one that
    # measures is to look for itself.
    torch._inductor.config.autotune_local_cache = False
    # flash-attn-4 compiles for seconds, and keeps nothing on disk unless told to.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    # Its compiler says so of every kernel, of an argument that its authors leave empty.
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)


def end_with_parent() -> None:
    """Has this process killed when its parent dies."""
    if sys.platform == "linux":
        # Even in the middle of a cell that never ends, when nothing else would be noticed.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != multiprocessing.parent_process().pid:
            os._exit(1)


def _serve(connection: Connection, device: str, ceilings: bool) -> None:
    set_up_sweep()
    on = torch.device(device)
    timing.use_side_stream(on)
    highest = measure_ceilings(on) if ceilings else None
    machine = Machine(environment(on), highest, chip.reader(on))
    connection.send(("ready", {}, machine.env))
    while True:
        # What was imported and compiled stays: a garbage collection need not look at it, least of
        # all in a sample.
        gc.freeze()
        try:
            group = connection.recv()
        except (EOFError, ConnectionResetError):
            return  # the parent is gone
        clockwork = Clockwork()
        tell = partial(_tell, connection, clockwork)
        try:
            found = measure_group(group, machine, partial(tell, "running"), clockwork)
        except (BrokenPipeError, ConnectionResetError):
            return  # the parent was interrupted
        except CELL_ERRORS as error:
            tell("failed", "oom" if out_of_memory(error) else "crash", one_line(error))
            return
        tell("done", found)


def _tell(connection: Connection, clockwork: Clockwork, kind: str, *content: object) -> None:
    connection.send((kind, clockwork.so_far(), *content))
