"""Training steps on a CUDA device: compiled, flex inside the graph, the split by kernel."""

import math

import pytest
import torch

from bench.cells import Cell, Group
from bench.models import Model
from bench.steps import Job, World, run_job
from methods import Problem

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

SMALL = Model("small", layers=2, heads=4, kv_heads=4, hidden=256, head_dim=64, vocabulary=512)


@pytest.mark.parametrize(
    ("method", "backend", "compiled"),
    [
        ("standard", "flex", True), ("standard", "sdpa-flash", True),
        ("standard", "sdpa-cudnn", True), ("spattention", "flex", True),
        ("spattention", "flex", False), ("identity", "identity", True),
    ],
)  # fmt: skip
def test_a_step_is_timed_and_split(method, backend, compiled):
    torch.compiler.reset()
    p = Problem(batch=2, q_heads=4, kv_heads=4, seq_len=512, head_dim=64)
    group = Group(
        problem=p, block_size=(128, 128), cells=(Cell(method, backend),), phases=("step",),
        device="cuda:0", seed=0, rounds=5, seconds=0.0, run="test", shared=False,
    )  # fmt: skip
    given = Job(
        group=group, model=SMALL, steps=5, warmup=3, learning_rate=1e-3, text=None,
        checkpointing=False, compiled=compiled, shard=False,
    )  # fmt: skip
    *calls, row = run_job(given, World(), lambda text: None)
    assert [call.status for call in calls] == ["ok"] * len(calls)
    assert (row.status, row.clock, len(row.samples)) == ("ok", "host", 5), row.reason
    assert all(math.isfinite(float(loss)) for loss in row.losses.split(";"))
    assert row.peak_bytes > 2 * row.parameters and row.matmul_tflop_s > 0
    assert row.other_us > 0
    assert (row.attention_us > 0) == (method != "identity")
