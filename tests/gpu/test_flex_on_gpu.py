"""Compiled FlexAttention on a CUDA device against float64, through the harness itself."""

import pytest
import torch
from torch._dynamo.utils import counters

from bench.backends import BACKENDS
from bench.gate import Gate
from methods import METHODS, Problem, attend, block_mask
from methods.reformer import Reformer
from tests.gpu.matrix import gated, line, matrix, one, sound

pytestmark = pytest.mark.gpu

BOTH_WAYS = [name for name in METHODS if not name.startswith("mehc_")]  # causal or not


def test_every_preset_is_right_or_says_why():
    """As `make matrix`, in part, of rows so long that Inductor may pad them; also not causal."""
    ragged = [(1100, 2)]
    work = [
        *matrix(METHODS, ("bfloat16", "float32"), (64, 192), ragged),
        *matrix(BOTH_WAYS, ("float16",), (64,), ragged, causal=False),
    ]
    rows = list(gated(work))
    assert [row.problem for row in rows] == [job.problem for job in work]
    for row in rows:
        assert sound(row), line(row)


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


@pytest.mark.parametrize(
    "size", [(128, 128), (256, 128), (64, 64), (128, 64), (64, 128), (32, 32)]
)
def test_every_block_size(size):
    p = Problem(seq_len=1100, head_dim=64)
    work = [one(name, p, ("fwd_bwd",), block_size=size) for name in METHODS]
    for row in gated(work):
        assert sound(row) and (row.q_block, row.kv_block) == size, str(line(row))
        assert row.status == "ok" or any(x % 128 for x in size), str(line(row))


def test_a_million_tokens_forward_and_backward():
    device, method = torch.device("cuda:0"), METHODS["spattention"]
    p = Problem(seq_len=1 << 20, head_dim=64)
    gate = Gate(p, (128, 128), torch.Generator(device).manual_seed(0), 0)
    attention = BACKENDS["flex"].build(method, p, device, (128, 128))
    verdict = gate.verdict(method, attention, ("fwd", "fwd_bwd"), ties=False)
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
