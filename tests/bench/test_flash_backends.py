"""The backends that need flash-attn-4: what they ask of it, and what a machine without it says."""

import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import request, train
from bench.backends import BACKENDS
from bench.cells import Cell, Group
from bench.measure import Bench, Clockwork
from methods import METHODS, Problem
from methods.attend import attend, executor, plan
from methods.longformer import Longformer
from methods.sliding_window import SlidingWindow
from tests.methods.dense import STATIC

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
P = Problem(q_heads=4, seq_len=60, head_dim=16)


@pytest.fixture
def flash_4(monkeypatch):
    """flash_attn.cute.flash_attn_func as a dense function; gives the windows that were asked."""
    asked = []

    def flash_attn_func(q, k, v, *, causal, window_size):
        asked.append((causal, window_size))
        left, right = (q.shape[1] if x is None else x for x in window_size)
        index = torch.arange(q.shape[1])
        distance = index[:, None] - index
        seen = (distance <= left) & (distance >= (0 if causal else -right))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2), None

    module = types.ModuleType("flash_attn.cute")
    module.flash_attn_func = flash_attn_func
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.cute", module)
    return asked


@pytest.mark.parametrize(
    ("method", "causal", "window"),
    [
        (METHODS["standard"], True, (None, None)),
        (METHODS["standard"], False, (None, None)),
        (SlidingWindow(window=7), True, (6, 0)),
        (SlidingWindow(window=7), False, (6, 6)),
        (SlidingWindow(window=500), True, (None, None)),
        (METHODS["local_only"], True, (15, 0)),
    ],
)
def test_fa4_is_the_method(flash_4, method, causal, window):
    p = replace(P, causal=causal, dtype="float64")
    q, k, v = (torch.randn(1, 4, 60, 16, dtype=torch.float64) for _ in range(3))
    out, _ = BACKENDS["fa4"].build(method, p, CPU, (128, 128))(q, k, v)
    assert flash_4 == [(causal, window)]
    want = plan(method, p, "blockwise")(q, k, v)[0]
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)


def test_fa4_refuses_windows_that_differ_from_head_to_head():
    backend = replace(BACKENDS["fa4"], missing=lambda device: None)
    method = METHODS["local_only"]
    assert backend.refusal(method, P, CUDA, "fwd") is None
    assert "local_only differ" in backend.refusal(method, replace(P, seq_len=61), CUDA, "fwd")
    assert "float32" in backend.refusal(method, replace(P, dtype="float32"), CUDA, "fwd")


@pytest.mark.parametrize("name", ["flash", "varlen", "fa4"])
def test_a_cpu_lacks_them_and_says_so(name):
    reason = BACKENDS[name].missing(CPU)
    assert "CUDA" in reason and "\n" not in reason
    with pytest.raises(ValueError, match=f"--backends has '{name}', which this machine lacks"):
        request.expand(request.Sweep(seq_len=(64,), device="cpu", backends=(name,)))


def test_flash_on_a_cpu_is_refused_by_attend():
    with pytest.raises(ValueError, match="backend 'flash' on cpu: a CUDA kernel"):
        attend(*(torch.zeros(1, 4, 64, 16) for _ in range(3)), backend="flash")


@pytest.mark.parametrize("lacking", [(), ("flash", "fa4"), ("flash", "varlen", "fa4")])
def test_the_default_on_a_gpu_is_what_is_installed(monkeypatch, lacking):
    for name in ("flash", "varlen", "fa4"):
        missing = (lambda device: "gone") if name in lacking else (lambda device: None)
        monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], missing=missing))
    dense = ["sdpa-flash", "sdpa-cudnn", "sdpa-efficient"]
    fastest = [name for name in ("flash", "varlen", "fa4") if name not in lacking]
    assert list(request._default_backends(CUDA)) == ["flex", *fastest, *dense]
    assert list(train._default_backends(CUDA)) == ["flex", *fastest, *dense[:2]]


def test_methods_of_varlen_and_fa4():
    takes = {name: {m for m in METHODS if BACKENDS[name].computes(METHODS[m])}
             for name in ("varlen", "fa4", "sdpa-flash", "flash")}  # fmt: skip
    assert takes["varlen"] == set(METHODS) - {"bigbird", "reformer"}
    assert takes["fa4"] == {"standard", "sliding_window", "local_only"}
    assert takes["sdpa-flash"] == {"standard"} and takes["flash"] == set(METHODS)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AssertionError("head_dim must be divisible by 8"), "unsupported"),
        (ValueError("sparse_block_size"), "unsupported"),
        (RuntimeError("a launch failed"), "crash"),
    ],
)
def test_what_flash_attn_4_does_not_take_is_unsupported(monkeypatch, error, status):
    def build(*cell):
        raise error

    group = Group(
        problem=replace(P, dtype="float32"), block_size=(64, 64), cells=(), phases=("fwd",),
        device="cpu", seed=0, rounds=1, seconds=1.0, run="x",
    )  # fmt: skip
    for name in ("flash", "varlen", "fa4"):
        backend = replace(
            BACKENDS[name], build=build, missing=lambda d: None, refuses=lambda *cell: None
        )
        monkeypatch.setitem(BACKENDS, name, backend)
        bench = Bench(group, CPU, Clockwork())
        refused = bench.prepare(Cell("standard", name)).refused["fwd"]
        assert refused[0] == status and str(error) in refused[1]


def test_flash_is_asked_of_flex_attention(monkeypatch):
    asked = {}

    def flex_attention(q, k, v, **options):
        asked.update(options)
        return q

    module = sys.modules["methods.attend"]  # the package's attribute is the function
    monkeypatch.setattr(module, "flex_attention", flex_attention)
    monkeypatch.setattr(module, "compiled_copy", lambda function: function)
    on_gpu = types.SimpleNamespace(is_cuda=True)
    mask = object()
    layout = types.SimpleNamespace(
        q=on_gpu, k=None, v=None, block_mask=mask, score_mod=None, needs_lse=False
    )
    executor("flash", P)(layout)
    assert asked["kernel_options"] == {"BACKEND": "FLASH"} and asked["block_mask"] is mask
    executor("flex", P)(layout)
    assert asked["kernel_options"] is None


def test_blocks_that_flash_does_not_take():
    for blocks in ((128, 64), (32, 128), (128, 256)):
        with pytest.raises(NotImplementedError, match="blocks of 128 keys"):
            plan(METHODS["standard"], P, "flash", blocks)
    plan(METHODS["standard"], P, "flash", (64, 128))
    with pytest.raises(ValueError, match="dtype is float32"):
        plan(METHODS["standard"], replace(P, dtype="float32"), "flash")


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "method", [*(METHODS[x] for x in STATIC), Longformer(n_global=0)], ids=str
)
def test_no_mask_is_a_constant(method, causal):
    """FlexAttention leaves block lists out where the traced mask reads no position."""
    if not causal and method.name.startswith("mehc_"):
        pytest.skip("causal alone")
    p = replace(P, seq_len=1024, causal=causal)
    mask = method.mask_mod(p, CPU)
    positions = [torch.zeros(1, dtype=torch.int32) for _ in range(4)]
    graph = torch.fx.experimental.proxy_tensor.make_fx(mask)(*positions).graph
    read = {node for node in graph.nodes if node.op == "placeholder" and node.users}
    (output,) = (node for node in graph.nodes if node.op == "output")
    assert read and output.all_input_nodes[0].op == "call_function"
    assert output.all_input_nodes[0].all_input_nodes
