"""Isolation: what takes a process down becomes a row, and the others are measured."""

import textwrap

import pytest

from bench.cells import Cell, Group
from bench.measure import Clockwork
from bench.worker import Worker, compile_ahead, compile_jobs
from methods import Problem

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


def test_compiling_ahead_survives_a_death(group):
    cells = (Cell(group.cells[0].method, "flex"), Cell("standard", "flex"))
    group = Group(**{**vars(group), "cells": cells})
    assert [cell for _, cell in compile_jobs([group])] == list(cells)
    done = []
    compile_ahead([group], 60.0, lambda: done.append(1))
    assert len(done) == 2
