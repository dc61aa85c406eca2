"""Isolation: what takes a process down becomes a row, and the others are measured."""

import os
import pickle
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bench.worker as worker_module
from bench.ahead import compile_ahead, compile_jobs, side_by_side
from bench.cells import Cell, Group
from bench.measure import Clockwork, Measured
from bench.record import ROOT, environment
from bench.worker import CellFailed, Worker, set_up_sweep
from methods import Problem
from tests.bench.rows import make_row

DEADLY = """
    import os, signal, time
    from dataclasses import dataclass
    from typing import ClassVar
    from methods import Method

    @dataclass(frozen=True)
    class Deadly(Method):
        name: ClassVar[str] = "deadly"
        paper: ClassVar[str] = "none"
        how: str = "kill"

        def mask_mod(self, p, device, state=None):
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "hang":
                time.sleep(600)
            raise RuntimeError("CUDA error: device-side assert triggered")

    METHOD = Deadly()
"""


@pytest.fixture
def group(tmp_path):
    path = tmp_path / "deadly.py"
    path.write_text(textwrap.dedent(DEADLY))
    ways = ("kill", "hang", "assert")
    deadly = [Cell(f"{path}:METHOD:how={how!r}", "blockwise") for how in ways]
    return Group(
        problem=Problem(seq_len=64, q_heads=2, head_dim=16, dtype="float32"),
        block_size=(32, 32), cells=(deadly[0], Cell("standard", "blockwise"), *deadly[1:]),
        phases=("fwd", "bwd"), device="cpu", seed=0, rounds=2, seconds=0.0, run="test",
    )  # fmt: skip


def test_a_kill_a_hang_and_a_lost_device_are_rows(group):
    worker = Worker("cpu", time_limit=5.0)
    try:
        rows = worker.measure(group, Clockwork())
    finally:
        worker.stop()
    killed, standard, hung, lost = (rows[cell] for cell in group.cells)
    assert {(row.status, row.reason) for row in killed} == {
        ("crash", "the process was ended by SIGKILL")
    }
    assert {(row.status, row.reason) for row in hung} == {("timeout", "no progress within 5 s")}
    assert {row.status for row in lost} == {"crash"}
    assert "device-side assert" in lost[0].reason
    assert [(row.phase, row.status, len(row.samples)) for row in standard] == [
        ("fwd", "ok", 2), ("bwd", "ok", 2),
    ]  # fmt: skip
    assert len({row.code for row in standard + killed}) == 2  # the user's file counts as code


def statuses(rows):
    return {row.status for cell in rows.values() for row in cell}


def test_a_worker_that_was_ended_between_groups_costs_no_row(group):
    sound = replace(group, cells=group.cells[1:2])
    with Worker("cpu", time_limit=60.0) as worker:
        worker._process.kill()
        worker._process.join()
        assert statuses(worker.measure(sound, Clockwork())) == {"ok"}
        assert worker._process.is_alive()
    assert not worker._process.is_alive()


def test_a_problem_that_ends_the_process_twice_is_rows(group, monkeypatch):
    deaths = []

    def die(self, group, clockwork):
        deaths.append(group)
        raise CellFailed(None, "crash", "no memory")

    monkeypatch.setattr(Worker, "_measure_once", die)
    monkeypatch.setattr(Worker, "_start", lambda self: self._process)
    monkeypatch.setattr(Worker, "_process", NoProcess(), raising=False)
    monkeypatch.setattr(Worker, "_connection", NoProcess(), raising=False)
    worker = Worker("cpu", time_limit=60.0)
    worker.environment = environment(torch.device("cpu"))
    assert statuses(worker.measure(group, Clockwork())) == {"crash"}
    assert len(deaths) == 2


class NoProcess:
    def kill(self): ...
    def join(self, limit=None): ...
    def close(self): ...


def test_a_worker_that_never_comes_up_is_one_error(monkeypatch):
    monkeypatch.setattr(worker_module, "_serve", dying)
    with pytest.raises(
        ChildProcessError, match="measures on cpu: the process ended with status 3"
    ):
        Worker("cpu", time_limit=60.0)


def dying(connection, device, ceilings):
    os._exit(3)


def test_a_worker_in_an_endless_cell_ends_with_its_parent(group, tmp_path):
    script = tmp_path / "sweep.py"
    script.write_text(
        textwrap.dedent("""
        import os, pickle, sys, threading, time
        from bench.measure import Clockwork
        from bench.worker import Worker

        def leave(worker):
            print(worker._process.pid, flush=True)
            time.sleep(2)
            os.kill(os.getpid(), 9)

        if __name__ == "__main__":
            worker = Worker("cpu", time_limit=600.0)
            threading.Thread(target=leave, args=(worker,)).start()
            with open(sys.argv[1], "rb") as file:
                worker.measure(pickle.load(file), Clockwork())
    """)
    )
    (tmp_path / "group").write_bytes(pickle.dumps(replace(group, cells=group.cells[2:3])))
    answer = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "group")], stdout=subprocess.PIPE,
        text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert answer.returncode == -9
    pid, deadline = int(answer.stdout), time.monotonic() + 10
    while _runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(pid)


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def setting(name: str) -> object:
    return getattr(torch._inductor.config, name)


def test_processes_side_by_side_take_over_no_tuned_shape_and_start_no_others():
    jobs = [("autotune_local_cache",), ("compile_threads",)]
    found = side_by_side(setting, jobs, set_up_sweep, 60.0, lambda: None)
    assert {name: value for (name,), value in found} == {
        "autotune_local_cache": False, "compile_threads": 1
    }  # fmt: skip


def test_compiling_ahead_survives_a_death(group):
    cells = (Cell(group.cells[0].method, "flex"), Cell("standard", "flex"))
    group = Group(**{**vars(group), "cells": cells})
    assert [cell for _, cell in compile_jobs([group])] == list(cells)
    done = []
    compile_ahead([group], None, 60.0, lambda: done.append(1))
    assert len(done) == 2


def test_a_process_that_used_cupti_measures_nothing_more(monkeypatch, group):
    traced = iter([False, True, False, False])
    cell = group.cells[1]
    with Worker("cpu", time_limit=60.0) as worker:
        monkeypatch.setattr(
            Worker, "_measure_once",
            lambda *job: Measured({cell: [make_row()]}, [], next(traced)),
        )  # fmt: skip
        processes = []
        for _ in range(4):
            worker.measure(replace(group, cells=(cell,)), Clockwork())
            processes.append(worker._process.pid)
    assert processes[0] == processes[1] != processes[2] == processes[3]


def test_what_found_no_memory_beside_others_has_a_process_that_cupti_left_alone(
    monkeypatch, group
):
    asked = []

    def once(worker, given, clockwork):
        asked.append((given.cells, given.shared, worker._process.pid))
        rows = {given.cells[0]: [make_row()]}
        return Measured(rows, list(given.cells[1:]), traced=given.shared)

    with Worker("cpu", time_limit=60.0) as worker:
        monkeypatch.setattr(Worker, "_measure_once", once)
        given = replace(group, cells=group.cells[:2])
        assert set(worker.measure(given, Clockwork())) == set(given.cells)
    (first, second) = asked
    assert first[:2] == (given.cells, True) and second[:2] == (given.cells[1:], False)
    assert first[2] != second[2]


def test_a_problem_that_is_not_measured_to_its_end_has_its_time_counted(group):
    clockwork = Clockwork()
    with Worker("cpu", time_limit=2.0) as worker, pytest.raises(CellFailed, match="timeout"):
        worker._measure_once(replace(group, cells=group.cells[1:3]), clockwork)
    assert clockwork.spent["gate"] > 0


def test_what_is_not_done_has_its_time_counted_too():
    clockwork = Clockwork()
    with clockwork.on("gate"):
        pass
    with clockwork.on("sample"):
        assert clockwork.spent.keys() == {"gate"}
        first, then = clockwork.so_far(), clockwork.so_far()
        assert 0 < first["sample"] < then["sample"]
    assert clockwork.so_far() == clockwork.spent and clockwork.spent["sample"] > then["sample"]


def test_threads_start_workers_side_by_side():
    """Each sets a variable of the environment for a while, and puts it back."""

    def start(_):
        for _ in range(500):
            worker_module._start_tracker()

    before = dict(os.environ)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(start, range(8)))
    assert dict(os.environ) == before
