"""Compiled FlexAttention on a CUDA device against float64, through the harness itself."""

import contextlib
import itertools
import queue
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch._dynamo.utils import counters

from bench.ahead import cores
from bench.cells import Cell, Group
from bench.measure import GATE_ROW_BLOCKS, Clockwork
from bench.oracle import build_reference, cotangent, judge, sample_rows
from bench.worker import Worker
from methods import METHODS, Problem, attend, block_mask
from methods.reformer import Reformer

pytestmark = pytest.mark.gpu

PUBLISHED = [name for name in METHODS if not name.startswith("mehc_")]
SHARED_QK = [name for name in PUBLISHED if METHODS[name].shared_qk]
GROUPED = [name for name in PUBLISHED if name not in SHARED_QK]
# What this kernel says where a problem is beyond the chip: its tiles do not fit.
BEYOND = ("out of resource", "No valid triton configs", "No choices")
# Its tables in shared memory come on top of a tile that fills it.
BEYOND_IN_16_BITS = ("reformer", 192)


def groups(problems, block_size=(128, 128), names=PUBLISHED):
    return [
        Group(
            problem=p, block_size=block_size,
            cells=tuple(Cell(name, "flex") for name in names), phases=("fwd_bwd",),
            device="cuda:0", seed=1, rounds=1, seconds=0.0, run="test",
        )
        for p in problems
    ]  # fmt: skip


def statuses(work):
    """Every cell's row, gated; side by side, since nothing here is a time."""
    waiting = queue.SimpleQueue()
    for group in work:
        for cell in group.cells:
            waiting.put((replace(group, cells=(cell,)), cell))
    count = min(waiting.qsize(), cores())
    with ThreadPoolExecutor(count) as pool:
        return list(itertools.chain(*pool.map(measured, [waiting] * count)))


def measured(waiting):
    found = []
    with Worker("cuda:0", 300.0, ceilings=False) as worker, contextlib.suppress(queue.Empty):
        while True:
            group, cell = waiting.get_nowait()
            rows = worker.measure(group, Clockwork())[cell]
            assert len({row.status for row in rows}) == 1
            found.append((group, cell, rows[0]))
            print(cell.method, group.problem, rows[0].status, rows[0].error_budget, flush=True)
    return found


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_preset_and_head_dim_is_right_or_says_why(dtype):
    """Ragged N, grouped heads, out and all gradients within the budget of the gate."""
    problems = [
        Problem(seq_len=1000, q_heads=8, kv_heads=2, head_dim=dim, dtype=dtype, causal=causal)
        for dim in (16, 32, 64, 96, 128, 192, 256)
        for causal in ((True, False) if dim == 64 else (True,))
    ]
    seen = []
    shared = [replace(p, kv_heads=p.q_heads) for p in problems]
    work = groups(problems, names=GROUPED) + groups(shared, names=SHARED_QK)
    for group, cell, row in statuses(work):
        place = f"{cell.method} {group.problem}: {row.status} {row.reason}"
        if row.status == "unsupported":
            assert any(text in row.reason for text in BEYOND), place
            wide = (cell.method, group.problem.head_dim) == BEYOND_IN_16_BITS
            assert dtype == "float32" or wide, place
        else:
            assert row.status == "ok", place
            assert row.error_budget <= 1, place
        seen.append(row.status)
    assert len(seen) == len(problems) * len(PUBLISHED)
    assert seen.count("ok") >= (len(seen) / 2 if dtype == "float32" else len(seen) - 1)


def test_hashed_orders_share_compiled_kernels():
    """More calls than one code object holds variants, forward and backward."""
    method, graphs = Reformer(chunk=64, n_rounds=2), []
    counters.clear()
    for seed in range(10):
        generator = torch.Generator("cuda").manual_seed(seed)
        x, v = torch.randn(2, 1, 4, 512, 64, generator=generator, device="cuda").unbind()
        x.requires_grad_()
        out = attend(x, x, v, method)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert out.isfinite().all() and grad.isfinite().all()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs == [graphs[0]] * 10 and graphs[0] > 0


def test_other_block_sizes():
    p = Problem(seq_len=1100, head_dim=64)
    sizes = [(64, 64), (128, 64), (64, 128), (32, 32), (256, 128)]
    work = [group for size in sizes for group in groups([p], size)]
    found = statuses(work)
    assert len(found) == len(sizes) * len(PUBLISHED)
    for group, cell, row in found:
        place = f"{cell.method}, {group.block_size}: {row.status} {row.reason}"
        if any(size % 128 for size in group.block_size) and row.status == "unsupported":
            assert "no tiles on this device" in row.reason, place
        else:
            assert row.status == "ok", place
        assert (row.q_block, row.kv_block) == group.block_size


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
    # A window of 1024 blocks that begins within one: 1023 are whole, two are cut.
    longest = (mask.kv_num_blocks + mask.full_kv_num_blocks).max()
    assert (mask.full_kv_indices.shape[-1], longest) == (1023, 1025)
