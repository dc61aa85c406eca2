"""The matrix of cells that a GPU gates: which they are, and what may be unsupported."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace

import pytest
import torch

from bench.record import environment
from methods import METHODS
from tests.bench.rows import make_row
from tests.gpu import matrix as module
from tests.gpu.matrix import COLUMNS, LIMITS, limit, main, matrix, sound

TRITON = (
    "InductorError: RuntimeError: No valid triton configs. OutOfResources: out of resource: "
    "shared memory, Required: 246784, Hardware limit: {}. Reducing block sizes or `num_stages`"
)
LAUNCHER = (
    "InductorError: OutOfMemoryError: out of resource: triton_tem_fused_flex_attention_backward_1 "
    "Required: 294912 Hardware limit:{} Reducing block sizes or `num_stages` may help."
)


def test_every_preset_type_and_width_is_there_once_a_phase():
    jobs = list(matrix())
    about = {(job.problem, job.cells, job.phases) for job in jobs}
    assert len(about) == len(jobs) == len(METHODS) * 3 * 7 * 2 * 2
    assert {job.problem.kv_heads for job in jobs if job.problem.seq_len == 1001} == {2, 8}
    for job in jobs:
        METHODS[job.cells[0].method].validate(job.problem)


@pytest.mark.parametrize("text", [TRITON, LAUNCHER])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "room", "beyond"),
    [
        ("bfloat16", 192, 232448, True), ("bfloat16", 192, 166912, True),
        ("bfloat16", 128, 166912, False), ("bfloat16", 128, 101376, True),
        ("bfloat16", 64, 101376, False), ("float32", 64, 166912, False),
        ("float32", 96, 232448, True), ("float32", 256, 300_000, False),
    ],
)  # fmt: skip
def test_wide_rows_may_lack_shared_memory(text, dtype, head_dim, room, beyond):
    """By the room that torch names, whatever the chip; less than is needed, it must be."""
    row = make_row(status="unsupported", reason=text.format(room), dtype=dtype, head_dim=head_dim)
    assert (limit(row) == "shared memory") == sound(row) == beyond


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ({"error_budget": 0.9}, True),
        ({"error_budget": 1.1}, False),
        ({"status": "mismatch", "error_budget": 7.0, "reason": "dq of batch 0"}, False),
        ({"status": "crash", "reason": LAUNCHER.format(1)}, False),
        ({"status": "unsupported", "reason": "InductorError: no such lowering"}, False),
        ({"status": "unsupported", "reason": "out of resource: threads, Required: 9, "
                                             "Hardware limit: 8"}, False),
        ({"status": "unsupported", "reason": "FlexAttention has no backward on a CPU"}, True),
    ],
)  # fmt: skip
def test_a_cell_is_right_or_says_a_known_reason(found, right):
    assert sound(make_row(head_dim=256, **found)) == right


def test_lines_are_written_and_a_wrong_one_is_an_exit_status(tmp_path, monkeypatch, capsys):
    reason = TRITON.format(232448)
    rows = [
        make_row(error_budget=0.5),
        make_row(dtype="float32", status="unsupported", reason=reason),
        make_row(status="crash", reason="the process was ended by SIGSEGV"),
    ]
    path = tmp_path / "x.csv"
    monkeypatch.setattr(sys, "argv", ["matrix", "--device", "cpu", "--output", str(path)])
    for count, status in ((2, 0), (3, 1)):
        monkeypatch.setattr(module, "gated", lambda jobs, count=count: iter(rows[:count]))
        assert main() == status
    assert "1 ok; 1 unsupported, shared memory; 1 crash;" in capsys.readouterr().out
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS and len(lines) == 3
    assert [x["limit"] for x in lines] == ["", "shared memory", ""]
    assert lines[1]["reason"] == reason and lines[0]["device"] == "Chip X"
    assert set(LIMITS) >= {x["limit"] for x in lines} - {""}


def test_a_resumed_matrix_keeps_what_was_right(tmp_path, monkeypatch):
    path, asked = tmp_path / "x.csv", []
    env = replace(environment(torch.device("cpu")), device="Chip X", torch="2.13.0")
    monkeypatch.setattr(module, "environment", lambda device: env)
    argv = ["matrix", "--device", "cpu", "--methods", "standard", "--head-dim", "64",
            "--dtype", "float32", "--output", str(path)]  # fmt: skip
    cell = {"method": "standard", "seq_len": 1024, "head_dim": 64, "dtype": "float32"}
    right, wrong = (
        make_row(phase=phase, **cell, **more)
        for phase, more in (
            ("fwd", {"error_budget": 0.5}), ("fwd_bwd", {"status": "crash", "reason": "SIGSEGV"})
        )
    )  # fmt: skip

    def gated(jobs):
        asked[:] = [module.key(job) for job in jobs]
        yield from (row for row in (right, wrong) if key_of(row) in asked)

    def key_of(row):
        return [str(x) for x in module.line(row)[: len(module.KEY)]]

    monkeypatch.setattr(module, "gated", gated)
    monkeypatch.setattr(sys, "argv", argv)
    assert main() == 1 and len(asked) == 4
    before, left = path.read_text().splitlines()[:2], asked[1:]
    monkeypatch.setattr(sys, "argv", [*argv, "--resume"])
    assert main() == 1 and asked == left
    assert path.read_text().splitlines()[:2] == before
    assert len(path.read_text().splitlines()) == 3
    env = replace(env, device="Chip Y")
    assert main() == 1 and len(asked) == 4
