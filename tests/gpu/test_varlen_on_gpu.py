"""varlen, flash and fa4 on a CUDA device, through the gate of the harness and against float64."""

import itertools
from dataclasses import replace

import pytest
import torch

from bench.backends import BACKENDS
from methods import METHODS, Problem, attend
from methods import varlen as module
from methods.attend import plan
from methods.flash_kernels import FlashAttention2, FlashAttention4, flash_4_missing
from methods.longformer import Longformer
from methods.spattention import head_bands
from tests.gpu.matrix import gated, line, one

pytestmark = [
    pytest.mark.gpu,
    # flash-attn-4 and its compiler speak of themselves.
    pytest.mark.filterwarnings("ignore"),
]

DEVICE = torch.device("cuda:0")
WINDOWS = [
    "standard", "sliding_window", "local_only", "spattention", "spattention_released",
    "gapped_bands", "longformer", "mehc_longformer",
]  # fmt: skip
KERNELS = [FlashAttention2, FlashAttention4]


def rows(backend, problems, names):
    if missing := BACKENDS[backend].missing(DEVICE):
        pytest.skip(missing)
    found = itertools.product(problems, names, ("fwd", "bwd"))
    return list(gated([one(x, p, (phase,), backend=backend) for p, x, phase in found]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_varlen_is_right_in_both_passes(dtype):
    """N that H does and does not divide, grouped heads, two batch elements; a graph holds each."""
    problems = [
        Problem(batch=2, seq_len=n, kv_heads=heads, head_dim=dim, dtype=dtype)
        for n, heads, dim in ((1024, 8, 64), (1001, 2, 128), (4096, 8, 128))
    ]
    for row in rows("varlen", problems, WINDOWS):
        assert row.status == "ok" and row.error_budget <= 1, line(row)
        assert row.clock == "device", row.reason


@pytest.mark.parametrize("kind", KERNELS)
@pytest.mark.parametrize("method", [METHODS["spattention"], METHODS["spattention_released"],
                                    Longformer(window=64, n_global=100)], ids=str)  # fmt: skip
def test_each_kernel_against_float64(monkeypatch, kind, method):
    """Whichever of them `kernel_for` would choose here; memory that held NaN before the call."""
    if kind is FlashAttention4 and (missing := flash_4_missing(DEVICE)):
        pytest.skip(missing)
    monkeypatch.setattr(module, "kernel_for", lambda device: kind())
    p = Problem(batch=2, kv_heads=4, seq_len=1001, head_dim=64)
    q, k, v, cotangent = (
        torch.randn(2, heads, 1001, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_(leaf)
        for heads, leaf in ((8, True), (4, True), (4, True), (8, False))
    )
    held = [torch.full((1 << 22,), torch.nan, device=DEVICE) for _ in range(8)]
    del held
    out, lse = plan(method, p, "varlen")(q, k, v)
    grads = torch.autograd.grad(out, (q, k, v), cotangent)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want, want_lse = plan(method, replace(p, dtype="float64"), "blockwise")(*exact)
    wanted = torch.autograd.grad(want, exact, cotangent.double())
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-3, rtol=1e-3)
    for got, right in zip((out, *grads), (want, *wanted), strict=True):
        assert ((got - right).norm() / right.norm()) < 0.02
    if method == METHODS["spattention"]:
        assert_zero_where_nothing_is_seen(p, out, grads[0])


def assert_zero_where_nothing_is_seen(p, out, dq):
    for head, (start, _) in enumerate(head_bands(p)):
        assert not out[:, head, :start].any() and not dq[:, head, :start].any()


def test_unused_keys_have_no_gradient():
    """The last head's keys are seen by the last queries alone, and most by none.

    N is no multiple of a kernel's tile, and memory held NaN before.
    """
    p = Problem(seq_len=1001, head_dim=64)
    q, k, v = (
        torch.randn(1, 8, 1001, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
        for _ in range(3)
    )
    held = [torch.full((1 << 22,), torch.nan, device=DEVICE) for _ in range(8)]
    del held
    out = attend(q, k, v, "spattention", backend="varlen")
    _, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    for head, (start, _) in enumerate(head_bands(p)):
        unused = 1001 - start
        assert not dk[:, head, unused:].any() and not dv[:, head, unused:].any()
        assert dv[:, head, :unused].any()


@pytest.mark.parametrize("backend", ["flash", "fa4"])
def test_a_number_is_right_or_there_is_none(backend):
    """What these kernels do not take, or get wrong, says so; the paper's point is theirs."""
    problems = [
        Problem(seq_len=n, kv_heads=heads, head_dim=dim)
        for n, heads, dim in ((1024, 8, 128), (1000, 2, 128), (1024, 8, 64))
    ]
    # Their compiler takes half a minute a kernel, so not every preset.
    some = ("standard", "sliding_window", "spattention", "longformer")
    names = [name for name in some if BACKENDS[backend].computes(METHODS[name])]
    for row in rows(backend, problems, names):
        assert row.status in ("ok", "unsupported", "mismatch"), line(row)
        assert (row.median_us is not None) == (row.status == "ok"), line(row)
        if row.method in ("standard", "spattention") and row.problem == problems[0]:
            assert row.status == "ok", line(row)
