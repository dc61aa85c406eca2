"""Compiled FlexAttention on a CUDA device against float64, through the harness itself."""

import pytest
import torch

from bench.cells import Cell, Group
from bench.measure import GATE_ROW_BLOCKS, Clockwork
from bench.oracle import build_reference, cotangent, judge, sample_rows
from bench.worker import Worker, compile_ahead
from methods import METHODS, Problem, attend, block_mask

pytestmark = pytest.mark.gpu

PUBLISHED = [name for name in METHODS if not name.startswith("mehc_")]
# What this kernel says where a problem is beyond the chip: its tiles do not fit.
BEYOND = ("out of resource", "No valid triton configs", "No choices")


def groups(problems, block_size=(128, 128)):
    return [
        Group(
            problem=p, block_size=block_size,
            cells=tuple(Cell(name, "flex") for name in PUBLISHED), phases=("fwd_bwd",),
            device="cuda:0", seed=1, rounds=1, seconds=0.0, run="test",
        )
        for p in problems
    ]  # fmt: skip


def statuses(work):
    """Status and reason of every cell, compiled ahead on all cores and gated."""
    compile_ahead(work, 300.0, lambda: None)
    worker = Worker("cuda:0", 300.0)
    try:
        for group in work:
            for cell, rows in worker.measure(group, Clockwork()).items():
                assert len({row.status for row in rows}) == 1
                yield group, cell, rows[0]
    finally:
        worker.stop()


def test_every_preset_dtype_and_head_dim_is_right_or_says_why():
    """Ragged N, grouped heads, out and all gradients within the budget of the gate."""
    problems = [
        Problem(seq_len=1000, q_heads=8, kv_heads=2, head_dim=dim, dtype=dtype, causal=causal)
        for dim in (16, 32, 64, 96, 128, 192, 256)
        for dtype in ("bfloat16", "float16", "float32")
        for causal in ((True, False) if (dim, dtype) == (64, "bfloat16") else (True,))
    ]
    seen = []
    for group, cell, row in statuses(groups(problems)):
        place = f"{cell.method} {group.problem}: {row.status} {row.reason}"
        if row.status == "unsupported":
            assert any(text in row.reason for text in BEYOND), place
            assert group.problem.dtype == "float32", place
        else:
            assert row.status == "ok", place
            assert row.error_budget <= 1, place
        seen.append(row.status)
    assert len(seen) == len(problems) * len(PUBLISHED)
    assert seen.count("ok") >= 0.85 * len(seen)


@pytest.mark.parametrize("block_size", [(64, 64), (128, 64), (64, 128), (32, 32), (256, 128)])
def test_other_block_sizes(block_size):
    p = Problem(seq_len=1100, head_dim=64)
    for _, cell, row in statuses(groups([p], block_size)):
        assert row.status == "ok", f"{cell.method}: {row.reason}"
        assert (row.q_block, row.kv_block) == block_size


def test_a_million_tokens_forward_and_backward():
    device = torch.device("cuda:0")
    p = Problem(seq_len=1 << 20, head_dim=64)
    q, k, v = (
        torch.randn(1, 8, p.seq_len, 64, device=device, dtype=p.torch_dtype, requires_grad=True)
        for _ in range(3)
    )
    rows = sample_rows(p, p.seq_len // GATE_ROW_BLOCKS, device)
    cot = cotangent(p, rows, device)
    out = attend(q, k, v, method="spattention")
    grads = torch.autograd.grad(out, (q, k, v), cot)
    inputs = (x.detach() for x in (q, k, v))
    verdict = judge(
        build_reference(METHODS["spattention"], p, *inputs, rows, cot), out, None, grads
    )
    assert verdict.passed, verdict.reason


def peak(build):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    built = build()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, built


def test_block_lists_take_the_memory_of_the_answer():
    method, device = METHODS["spattention"], torch.device("cuda:0")
    million = Problem(seq_len=1 << 20)
    used, mask = peak(lambda: block_mask(method, million, device, narrow=True))
    assert used < 1.5 * 2**30
    assert mask.kv_indices.shape[-1] == 1025
