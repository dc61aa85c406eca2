"""Peers: each passes the gate where it computes the method, and says why where it does not."""

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor

import run_bench
from bench import peers
from bench.backends import BACKENDS
from bench.cells import Cell, Group
from bench.measure import Clockwork, Machine, measure_group
from bench.record import environment
from bench.specs import parse_method
from methods import Problem

CPU = torch.device("cpu")
ENVIRONMENT = environment(CPU)
P = Problem(batch=2, seq_len=256, q_heads=3, head_dim=16, dtype="float32", causal=False)

LONGFORMER = "longformer:window=32,n_global=5"
BIGBIRD = "bigbird:block=16"
LSH = "reformer:mode='transformers',chunk=32,n_rounds=2"
LSH_PYTORCH = "reformer:mode='reformer_pytorch',chunk=32,n_rounds=2"
WITHIN = "reformer:within_buckets=True,chunk=32,n_rounds=2"


def measure(spec: str, backend: str, p: Problem = P, phases=("fwd", "fwd_bwd")):
    cell = Cell(spec, backend)
    group = Group(
        problem=p, block_size=(64, 32), cells=(cell,), phases=phases, device="cpu", seed=0,
        rounds=1, seconds=0.0, run="test",
    )  # fmt: skip
    return measure_group(group, Machine(ENVIRONMENT), lambda cell: None, Clockwork()).rows[cell]


def assert_passes(spec: str, backend: str, p: Problem = P) -> None:
    for row in measure(spec, backend, p):
        assert row.status == "ok", row.reason
        assert 0 < row.error_budget < 0.5
        assert row.error_out > 0 and row.error_dk > 0 and row.error_dv > 0
        assert (row.error_dq is None) == parse_method(spec).shared_qk  # then dk is of both
        assert row.median_us > 0


@pytest.mark.parametrize(
    ("spec", "backend", "changes"),
    [
        (LONGFORMER, "hf", {}),
        ("longformer:window=64,n_global=0", "hf", {"batch": 1, "q_heads": 1}),
        (BIGBIRD, "hf", {}),
        ("bigbird:block=64,n_random=2,seed=3,multiplicity=True", "hf", {"seq_len": 1024}),
        (LSH, "hf", {}),
        ("reformer:mode='transformers',chunk=16,n_buckets=(4,8),after=1", "hf", {}),
        ("reformer:mode='transformers',chunk=32,n_rounds=1", "hf", {"causal": True}),
        (LSH_PYTORCH, "reformer-pytorch", {}),
        (LSH_PYTORCH + ",within_buckets=True", "reformer-pytorch", {}),
        (
            "reformer:mode='reformer_pytorch',chunk=32,n_rounds=1",
            "reformer-pytorch", {"causal": True},
        ),
        (WITHIN, "reformer-pytorch", {}),
    ],
)  # fmt: skip
def test_passes_the_gate(spec: str, backend: str, changes: dict) -> None:
    changes |= {"kv_heads": changes.get("q_heads", P.q_heads)}
    assert_passes(spec, backend, replace(P, **changes))


@pytest.mark.parametrize(("spec", "backend"), [(LSH, "hf"), (LSH_PYTORCH, "reformer-pytorch")])
def test_tokens_that_see_themselves_alone_fail(spec: str, backend: str) -> None:
    """Causal, with several rounds: the one known fault of these modules, and where it is."""
    p, method = replace(P, causal=True), parse_method(spec)
    (row,) = measure(spec, backend, p, ("fwd",))
    assert row.status == "mismatch" and row.reason.startswith("out of")
    generator = torch.Generator().manual_seed(0)
    q, v = (torch.randn(2, 3, 256, 16, generator=generator) for _ in range(2))
    out, _ = BACKENDS[backend].build(method, p, CPU, (128, 128))(q, q, v)
    every_row = torch.arange(256).expand(3, -1)
    bias = method.rows(p, CPU, every_row, method.prepare(q, q, p))
    exact = (q.double() @ method.keys(q).double().mT / 4 + bias).softmax(-1) @ v.double()
    alone = bias.isfinite().sum(-1) == 1
    assert 1e-4 < (out - exact)[alone].abs().max() < 1e-1
    assert (out - exact)[~alone].abs().max() < 1e-5


# planted faults


def replaced(monkeypatch: pytest.MonkeyPatch, name: str, **changes) -> None:
    monkeypatch.setitem(BACKENDS, name, replace(BACKENDS[name], **changes))


@pytest.mark.parametrize(
    ("spec", "backend", "changes"),
    [
        (LONGFORMER, "hf", {"n_global": 4}),
        (LONGFORMER, "hf", {"window": 16}),
        (BIGBIRD, "hf", {"seed": 1}),
        (LSH, "hf", {"seed": 1}),
        (LSH, "hf", {"after": 1}),
        (LSH_PYTORCH, "reformer-pytorch", {"seed": 1}),
        (LSH_PYTORCH, "reformer-pytorch", {"within_buckets": True}),
    ],
)
def test_another_pattern_is_a_mismatch(
    spec: str, backend: str, changes: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = BACKENDS[backend].build
    replaced(
        monkeypatch, backend, build=lambda method, *rest: build(replace(method, **changes), *rest)
    )
    assert {row.status for row in measure(spec, backend)} == {"mismatch"}


@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize(
    ("spec", "backend"), [(LONGFORMER, "hf"), (LSH, "hf"), (LSH_PYTORCH, "reformer-pytorch")]
)
def test_a_wrong_gradient_is_a_mismatch(
    spec: str, backend: str, which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of one input is a ten-thousandth too large; outputs are right."""
    build = BACKENDS[backend].build

    def faulty(*cell):
        attention = build(*cell)

        def run(*inputs: Tensor):
            inputs = list(inputs)
            inputs[which] = inputs[which] + 1e-4 * (inputs[which] - inputs[which].detach())
            return attention(*inputs)

        return run

    replaced(monkeypatch, backend, build=faulty)
    (row,) = measure(spec, backend, phases=("fwd_bwd",))
    unused = which == 1 and parse_method(spec).shared_qk  # q is taken for k
    assert row.status == ("ok" if unused else "mismatch")


def test_global_generators_are_left_alone() -> None:
    before = np.random.get_state()[1].copy(), torch.get_rng_state()
    for spec in (LONGFORMER, BIGBIRD, LSH):
        q, k, v = torch.randn(3, 2, 3, 256, 16, generator=torch.Generator().manual_seed(0))
        BACKENDS["hf"].build(parse_method(spec), P, CPU, (128, 128))(q, k, v)
    assert (np.random.get_state()[1] == before[0]).all()
    assert torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize("spec", [LONGFORMER, BIGBIRD, LSH])
def test_inputs_are_left_alone(spec: str) -> None:
    """The modules write in place to what their projections return."""
    given = torch.randn(3, 2, 3, 256, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = given.clone()
    attention = BACKENDS["hf"].build(parse_method(spec), P, CPU, (128, 128))
    with torch.no_grad():
        first, again = attention(q, k, v)[0], attention(q, k, v)[0]
    assert torch.equal(first, again)
    assert torch.equal(torch.stack((q, k, v)), given)


# refusals


@pytest.mark.parametrize(
    ("spec", "backend", "changes", "reason"),
    [
        (LONGFORMER, "hf", {"causal": True}, "LongformerSelfAttention is not causal"),
        (LONGFORMER + ",dilation=2", "hf", {}, "has no dilation"),
        (LONGFORMER, "hf", {"seq_len": 240}, "240 tokens are no multiple of window 32"),
        (LONGFORMER, "hf", {"kv_heads": 1}, "as many key heads as query heads"),
        (BIGBIRD, "hf", {"causal": True}, "BigBirdBlockSparseAttention is not causal"),
        (BIGBIRD + ",n_random=0", "hf", {}, "needs a random block"),
        (BIGBIRD, "hf", {"seq_len": 250}, "250 tokens are no multiple of block 16"),
        ("reformer:chunk=32", "hf", {}, "computes mode='transformers'"),
        (LSH + ",within_buckets=True", "hf", {}, "within_buckets=False alone"),
        (LSH + ",n_buckets=2", "hf", {"seq_len": 32}, "dense where one chunk holds all"),
        ("reformer:chunk=32", "reformer-pytorch", {}, "computes mode='reformer_pytorch'"),
        (LSH, "reformer-pytorch", {}, "computes mode='reformer_pytorch'"),
        (LSH_PYTORCH + ",before=2", "reformer-pytorch", {}, "one chunk before"),
        (
            LSH_PYTORCH + ",n_buckets=2", "reformer-pytorch", {"seq_len": 96},
            "96 tokens are no multiple of two chunks of 32",
        ),
        (WITHIN, "reformer-pytorch", {"dtype": "bfloat16"}, "takes no bfloat16"),
    ],
)  # fmt: skip
def test_refusals(spec: str, backend: str, changes: dict, reason: str) -> None:
    for row in measure(spec, backend, replace(P, **changes)):
        assert (row.status, row.median_us) == ("unsupported", None)
        assert reason in row.reason and "\n" not in row.reason


def test_methods_that_no_peer_computes() -> None:
    computed = {
        name: {spec for spec in ("standard", "sliding_window", "spattention", "longformer",
                                 "bigbird", "reformer", "mehc_longformer")
               if BACKENDS[name].computes(parse_method(spec))}
        for name in ("hf", "reformer-pytorch", "xformers")
    }  # fmt: skip
    assert computed == {
        "hf": {"longformer", "bigbird", "reformer"},
        "reformer-pytorch": {"reformer"},
        "xformers": {"standard", "sliding_window", "longformer"},
    }


@pytest.mark.parametrize(
    ("backend", "module"),
    [("hf", "transformers"), ("reformer-pytorch", "reformer_pytorch"), ("xformers", "xformers")],
)
def test_a_package_that_is_missing(
    backend: str, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    for device in ("cpu", "cuda"):
        reason = BACKENDS[backend].missing(torch.device(device))
        assert reason == f"{module} is not installed"
    assert run_bench.main(["list"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith(backend + " "))
    assert line.endswith(f"not here: {module} is not installed")


# xformers, of which a stub shows the interface


class Stub:
    """memory_efficient_attention as its documentation has it, dense and in token order."""

    def __init__(self, wider: int = 0) -> None:
        self.wider, self.biases = wider, []

    def attention(self, query: Tensor, key: Tensor, value: Tensor, attn_bias=None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))  # of [B, N, heads, D]
        self.biases.append(attn_bias)
        place = torch.arange(q.shape[2])
        distance = place[:, None] - place
        allowed = torch.ones_like(distance, dtype=torch.bool)
        if isinstance(attn_bias, Causal):
            allowed = distance >= 0
        elif attn_bias is not None:
            left, right = attn_bias
            allowed = (distance <= left + self.wider) & (-distance <= right)
        scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2)


class Causal:
    pass


def install(monkeypatch: pytest.MonkeyPatch, attention) -> None:
    ops, biases = ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha.attn_bias")
    ops.memory_efficient_attention = attention
    biases.LowerTriangularMask = Causal
    biases.LocalAttentionFromBottomRightMask = lambda window_left, window_right: (
        window_left, window_right
    )  # fmt: skip
    for module in (ModuleType("xformers"), ops, ModuleType("xformers.ops.fmha"), biases):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    replaced(monkeypatch, "xformers", missing=lambda device: None)
    peers.xformers_fault.cache_clear()


@pytest.mark.parametrize(
    ("spec", "causal", "bias"),
    [
        ("standard", True, Causal),
        ("standard", False, None),
        ("sliding_window:window=40", True, (39, 0)),
        ("sliding_window:window=40", False, (39, 39)),
        ("sliding_window:window=1", True, (0, 0)),
        ("sliding_window:window=256", True, Causal),
        ("sliding_window:window=300", False, None),
        ("longformer:window=32,n_global=0", True, (16, 0)),
        ("longformer:window=32,n_global=0,dilation=(1,1,1)", False, (16, 16)),
    ],
)
def test_biases_of_xformers(
    spec: str, causal: bool, bias: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub = Stub()
    install(monkeypatch, stub.attention)
    p = replace(P, causal=causal)
    if spec == "sliding_window:window=1":  # of one key dQ and dK are 0
        assert {row.status for row in measure(spec, "xformers", p)} == {"ok"}
    else:
        assert_passes(spec, "xformers", p)
    assert all(type(x) is bias if bias is Causal else x == bias for x in stub.biases)


def test_a_window_too_wide_is_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Stub(wider=1).attention)
    rows = measure("sliding_window:window=40", "xformers", replace(P, causal=True))
    assert {row.status for row in rows} == {"mismatch"}


@pytest.mark.parametrize(
    ("spec", "changes", "reason"),
    [
        (LONGFORMER, {}, "without global tokens or dilation"),
        ("longformer:window=32,n_global=0,dilation=2", {}, "without global tokens or dilation"),
        ("spattention", {"causal": True}, "one window of all heads"),
        ("standard", {"kv_heads": 1}, "no backward where query heads share key heads"),
        ("standard", {"dtype": "float64"}, "xformers has no float64"),
    ],
)
def test_refusals_of_xformers(
    spec: str, changes: dict, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, None)
    for row in measure(spec, "xformers", replace(P, **changes)):
        assert row.status == "unsupported" and reason in row.reason


def test_no_operator_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_, **__):
        raise NotImplementedError("No operator found\n  for these inputs")

    install(monkeypatch, none)
    for row in measure("standard", "xformers"):
        assert row.status == "unsupported"
        assert row.reason == "NotImplementedError: No operator found for these inputs"
    fault = peers.xformers_fault(CPU)
    assert fault == f"xformers does not run with torch {torch.__version__}: " + (
        "No operator found for these inputs"
    )


def test_an_xformers_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, Stub().attention)
    assert peers.xformers_fault(CPU) is None
    peers.xformers_fault.cache_clear()
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    assert "import of xformers.ops halted" in peers.xformers_fault(CPU)
    peers.xformers_fault.cache_clear()


def test_flash_attn_4_is_not_taken_for_flash_attn_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As xformers 0.0.35 looks for it, and fails where flash-attn-4 alone is installed."""
    files = {
        "flash_attn/cute/__init__.py": "kernels = 4",
        "xformers/__init__.py": "",
        "xformers/ops/__init__.py": "import importlib.util\n"
        "two = importlib.util.find_spec('flash_attn') is not None\n"
        "if two:\n    import flash_attn.flash_attn_interface",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with none_imported("xformers", "flash_attn"):
        assert peers._xformers("ops").two is False
        assert importlib.import_module("flash_attn.cute").kernels == 4
    (tmp_path / "flash_attn/flash_attn_interface.py").touch()
    importlib.invalidate_caches()
    with none_imported("xformers", "flash_attn"):
        assert peers._xformers("ops").two is True


@contextmanager
def none_imported(*packages: str) -> Iterator[None]:
    """As if no module of these had been imported before; nor afterwards."""

    def taken_out() -> dict[str, ModuleType]:
        names = [x for x in sys.modules if x.split(".")[0] in packages]
        return {name: sys.modules.pop(name) for name in names}

    before = taken_out()
    try:
        yield
    finally:
        taken_out()
        sys.modules.update(before)
