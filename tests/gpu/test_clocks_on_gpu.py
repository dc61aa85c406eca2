"""Which clock a cell gets on a CUDA device."""

from dataclasses import replace

import pytest

from bench.cells import Cell
from bench.measure import Clockwork
from bench.worker import Worker
from methods import Problem
from tests.gpu.test_flex_on_gpu import groups

pytestmark = pytest.mark.gpu


def test_what_waits_for_the_device_is_timed_by_its_kernels():
    """No graph can hold it, and the cells after it are captured as ever."""
    (group,) = groups([Problem(seq_len=512, head_dim=64)])
    cells = Cell("spattention", "blockwise"), Cell("standard", "sdpa-flash")
    group = replace(group, cells=cells, phases=("fwd", "fwd_bwd"))
    with Worker("cuda:0", 300.0, ceilings=False) as worker:
        rows = worker.measure(group, Clockwork())
    found = {cell.backend: {(row.status, row.clock) for row in rows[cell]} for cell in cells}
    assert found == {
        "blockwise": {("ok", "kernels"), ("ok", "host")},
        "sdpa-flash": {("ok", "device"), ("ok", "host")},
    }
