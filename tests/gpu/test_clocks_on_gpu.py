"""Which clock a cell gets on a CUDA device."""

from dataclasses import replace

import pytest

import run_bench
from bench.cells import Cell
from bench.measure import Clockwork
from bench.profile import BETWEEN, calls, read_profile
from bench.worker import Worker
from methods import Problem
from tests.gpu.matrix import one

pytestmark = pytest.mark.gpu


def test_what_waits_for_the_device_is_timed_by_its_kernels():
    """No graph can hold it, and the cells after it are captured as ever."""
    cells = Cell("spattention", "blockwise"), Cell("standard", "sdpa-flash")
    p = Problem(seq_len=512, head_dim=64)
    group = replace(one("standard", p, ("fwd", "fwd_bwd")), cells=cells)
    with Worker("cuda:0", 300.0, ceilings=False) as worker:
        rows = worker.measure(group, Clockwork())
    found = {cell.backend: {(row.status, row.clock) for row in rows[cell]} for cell in cells}
    assert found == {
        "blockwise": {("ok", "kernels"), ("ok", "host")},
        "sdpa-flash": {("ok", "device"), ("ok", "host")},
    }


def test_a_profile_names_the_kernels_and_adds_up(tmp_path, capsys):
    command = [
        "profile", "--methods", "spattention", "--backends", "flex", "--seq-len", "2048",
        "--phases", "fwd", "fwd_bwd", "--output", str(tmp_path), "--run", "x",
    ]  # fmt: skip
    assert run_bench.main(command) == 0, capsys.readouterr()
    found = calls(read_profile(tmp_path / "results" / "x.csv"))
    assert [call[0].phase for call in found] == ["fwd", "fwd_bwd"]
    for call in found:
        kernels = [line for line in call if line.kernel != BETWEEN]
        assert "flex_attention" in kernels[0].kernel and kernels[0].launches == 1
        assert sum(line.us for line in call) == pytest.approx(call[0].call_us, rel=1e-4)
        assert sum(line.us for line in kernels) > call[0].call_us / 2
    assert "flex_attention_backward" in capsys.readouterr().out
