"""Training steps on a CUDA device: compiled, flex inside the graph, the split by kernel."""

import math
from dataclasses import replace

import pytest
import torch

from bench.derived import by_kind
from bench.models import MODELS, Model
from bench.steps import World, run_job
from tests.bench.training import job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

SMALL = Model("small", layers=2, heads=4, kv_heads=4, hidden=256, head_dim=64, vocabulary=512)


def trained(method, backend, model=SMALL, batch=2, seq_len=512, **changes):
    """The rows of a job: those of the attention call, and that of the step."""
    torch.compiler.reset()
    values = {"steps": 5, "warmup": 3, "compiled": True}
    given = job(method, backend, model, **values | changes)
    p = replace(given.group.problem, batch=batch, seq_len=seq_len, dtype="bfloat16")
    given = replace(given, group=replace(given.group, problem=p, device="cuda:0"))
    *calls, row = run_job(given, World(), lambda text: None)
    assert (row.status, row.clock) == ("ok", "host"), row.reason
    assert all(math.isfinite(float(loss)) for loss in row.losses.split(";"))
    return calls, row


@pytest.mark.parametrize(
    ("method", "backend", "compiled"),
    [
        ("standard", "flex", True), ("standard", "sdpa-flash", True),
        ("standard", "sdpa-cudnn", True), ("spattention", "flex", True),
        ("spattention", "flex", False), ("identity", "identity", True),
    ],
)  # fmt: skip
def test_a_step_is_timed_and_split(method, backend, compiled):
    calls, row = trained(method, backend, compiled=compiled)
    assert [call.status for call in calls] == ["ok"] * len(calls)
    assert len(row.samples) == 5
    assert row.peak_bytes > 2 * row.parameters and row.matmul_tflop_s > 0
    assert row.other_us > 0
    assert (row.attention_us > 0) == (method != "identity")
    kinds = by_kind(row.step_kernels)
    assert kinds["product"] > 0 and kinds["optimizer"] > 0
    assert 0 < kinds.total() < 1.1 * (row.attention_us + row.other_us)


def test_a_mixture_of_experts_trains_with_flex_inside_layers_that_recompute():
    config = {
        "model_type": "olmoe", "hidden_size": 256, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
        "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 512,
    }  # fmt: skip
    model = replace(SMALL, config=config)
    (device, host), row = trained("spattention", "flex", model, checkpointing=True)
    assert (device.status, host.status, row.dtype) == ("ok", "ok", "bfloat16")
    assert row.parameters > 2 * 8 * 3 * 256 * 128
    assert row.attention_us > 0 and row.other_us > 0


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_uncompiled_flex_trains_though_it_waits_for_the_device():
    """As the paper's released code calls it; no kernel of it is named for attention."""
    (device, host), row = trained("spattention", "eager", compiled=False)
    assert (device.status, device.reason[:9]) == ("unsupported", "no graph:")
    assert (host.status, host.clock) == ("ok", "host")
    assert len(row.samples) == 5 and row.attention_us is None


@pytest.mark.parametrize("backend", ["flex", "sdpa-flash"])
def test_attention_is_found_among_the_kernels_of_a_step(backend):
    """How well it and the rest make up a step is a claim of results/h200/train_table2.csv."""
    model = MODELS["table2"].shortened(4)
    _, row = trained("standard", backend, model, batch=8, seq_len=2048)
    assert 0.05 < row.attention_us / (row.attention_us + row.other_us) < 0.6
