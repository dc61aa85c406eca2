"""Banded methods as windows over shifted keys, by kernels that stand in for flash-attention."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from methods import METHODS, Banded, Problem, attend, flash_kernels
from methods import varlen as module
from methods.attend import plan
from methods.compiled import compiled_copy
from methods.flash_kernels import FlashAttention2, FlashAttention4, kernel_for
from methods.longformer import Longformer
from methods.sliding_window import SlidingWindow
from tests.methods import flash_doubles as doubles

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Own(Banded):
    """Bands and a prefix at will."""

    name: ClassVar[str] = "own"
    given: Sequence = ()
    first: int = 0

    def bands(self, p):
        return self.given

    def prefix(self, p):
        return self.first


@dataclass(frozen=True)
class Biased(SlidingWindow):
    name: ClassVar[str] = "biased"

    def score_mod(self, p, device, state=None):
        return lambda score, b, h, i, j: score + i - j


UNEVEN = Own(given=(((3, 9),), ((0, 4), (20, 30)), (), ((66, 90),)))
METHOD_CASES = [
    *(METHODS[name] for name in (
        "standard", "sliding_window", "local_only", "spattention", "spattention_released",
        "gapped_bands", "longformer", "mehc_longformer",
    )),
    SlidingWindow(window=5),
    SlidingWindow(window=66),
    Longformer(window=8, n_global=3),
    Longformer(window=8, n_global=20),
    Longformer(window=8, n_global=66),
    Longformer(window=8, n_global=64),
    Longformer(window=64, n_global=1),
    UNEVEN,
    Own(given=(((3, 9),), ((0, 4),), (), ((66, 90),)), first=5),
    Own(given=((),)),
    Own(given=((),), first=7),
]  # fmt: skip
KERNELS = {"protocol": doubles.Reference, "flash-4": doubles.Any4, "flash-2": doubles.Any2}


@pytest.fixture(autouse=True)
def poisoned():
    """Every tensor that is not initialised holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=KERNELS)
def kernel(request, monkeypatch):
    return inject(request.param, monkeypatch)


@pytest.fixture
def reference(monkeypatch):
    return inject("protocol", monkeypatch)


def inject(name, monkeypatch):
    if name == "flash-4":
        doubles.install_flash_4(monkeypatch)
    made = KERNELS[name]()
    monkeypatch.setattr(module, "kernel_for", lambda device: made)
    return made


@pytest.fixture(scope="module", autouse=True)
def flash_2():
    library = doubles.install_flash_2()
    yield
    library._destroy()


def tensors(p):
    generator = torch.Generator().manual_seed(p.seq_len)
    return [
        torch.randn(p.batch, h, p.seq_len, p.head_dim, generator=generator, dtype=torch.float64)
        .requires_grad_(n < 3)
        for n, h in enumerate((p.q_heads, p.kv_heads, p.kv_heads, p.q_heads))
    ]  # fmt: skip


def problem(n=67, heads=4, kv_heads=None, batch=2):
    return Problem(
        batch=batch, q_heads=heads, kv_heads=kv_heads, seq_len=n, head_dim=16, dtype="float64"
    )


def assert_as_blockwise(method, p):
    q, k, v, cotangent = tensors(p)
    outs = [plan(method, p, name)(q, k, v) for name in ("varlen", "blockwise")]
    for got, want in zip(*outs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    grads = [torch.autograd.grad(out, (q, k, v), cotangent) for out, _ in outs]
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)


@pytest.mark.parametrize("method", METHOD_CASES, ids=str)
def test_outputs_and_gradients_are_blockwises(method, kernel):
    """N mod H is 3, and keys are shared, in two batch elements."""
    assert_as_blockwise(method, problem(kv_heads=2))


@pytest.mark.parametrize("p", [
    problem(n=64), problem(n=64, kv_heads=1), problem(n=3), problem(n=1, heads=2),
    problem(n=66, heads=8, batch=1), problem(n=50, heads=1),
], ids=lambda p: f"{p.batch}x{p.q_heads}:{p.kv_heads}x{p.seq_len}")  # fmt: skip
@pytest.mark.parametrize("name", ["spattention", "spattention_released", "longformer"])
def test_other_shapes(name, p, reference):
    method = METHODS[name]
    if name == "longformer":
        method = Longformer(window=6, n_global=min(2, p.seq_len))
    assert_as_blockwise(method, p)


@pytest.mark.parametrize("most", [0, module.MOST_STRETCHES])
@pytest.mark.parametrize("method", [METHODS["spattention"], METHODS["gapped_bands"], UNEVEN])
def test_empty_rows_and_unused_keys_are_exactly_zero(method, most, kernel, monkeypatch):
    """However many stretches of idle rows are zeroed one by one."""
    monkeypatch.setattr(module, "MOST_STRETCHES", most)
    p = problem()
    q, k, v, _ = tensors(p)
    out, lse = plan(method, p, "varlen")(q, k, v)
    allowed = method.mask_mod(p, CPU)(
        *torch.meshgrid(*(torch.arange(n) for n in (2, 4, 67, 67)), indexing="ij")
    )
    empty, unused = ~allowed.any(3), ~allowed.any(2)
    assert empty.any() and unused.any()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.full_like(out, 1e30))
    for rows, tensor in ((empty, out), (empty, dq), (unused, dk), (unused, dv)):
        assert (tensor[rows] == 0).all() and (tensor[~rows] != 0).any()
    assert (lse[empty] == -torch.inf).all() and lse[~empty].isfinite().all()


@pytest.mark.parametrize(
    ("method", "n", "calls"),
    [
        ("standard", 67, [1]),
        ("sliding_window", 67, [1]),
        ("spattention", 64, [1]),
        ("spattention", 67, [2]),
        ("local_only", 64, [1]),
        ("spattention_released", 64, [2, 1]),
        ("longformer", 67, [1, 1]),
    ],
)
def test_calls(method, n, calls):
    """A call takes one window: heads of one width share it, two results are merged."""
    made = module.prepared(METHODS[method], problem(n), CPU)
    assert [len(layer.calls) for layer in made] == calls


def test_calls_hold_the_methods_pairs():
    """Nothing is computed but the method's pairs, whichever way they are cut."""
    p = problem()
    for method in METHOD_CASES:
        pairs = 0
        for piece in (x for layer in module.layers(method, p) for x in layer):
            rows = torch.arange(piece.queries)
            seen = (rows + 1).clamp(max=piece.window or 0)
            pairs += int(seen.sum()) if piece.window else piece.queries * piece.keys
        assert pairs == method.allowed_pairs(p), method


def test_attend_trains_with_it(reference):
    p = problem(kv_heads=2)
    q, k, v, cotangent = tensors(p)
    shuffled = q.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    grads = []
    for x, backend in ((shuffled, "varlen"), (q, "blockwise")):
        out = attend(x, k, v, "spattention_released", backend=backend)
        grads.append(torch.autograd.grad(out, (x, k, v), cotangent, retain_graph=True))
        twice = torch.autograd.grad(out, (x, k, v), cotangent)
        for once, again in zip(grads[-1], twice, strict=True):
            assert torch.equal(once, again)
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    total = attend(shuffled, k, v, backend="varlen").sum()
    (expanded,) = torch.autograd.grad(total, shuffled)
    assert expanded.isfinite().all() and expanded.shape == q.shape


def test_the_merge_compiles():
    """As on a GPU; rows without keys in one part or in both included."""
    lse = torch.tensor([[0.5, -torch.inf, 90.0, -torch.inf]])
    other = torch.tensor([[1.5, 2.0, -torch.inf, -torch.inf]])
    parts = [
        torch.randn(4, 1, 16).bfloat16().masked_fill((x == -torch.inf).view(4, 1, 1), 0)
        for x in (lse, other)
    ]
    weights = torch.stack((lse, other)).double().nan_to_num(neginf=-1e300).softmax(0)
    want = sum(x * w.view(4, 1, 1) for x, w in zip(parts, weights, strict=True)).bfloat16()
    for merge in (module._merge, compiled_copy(module._merge)):
        out, total = merge(parts[0], lse, parts[1], other)
        assert (out[3] == 0).all()
        torch.testing.assert_close(out, want, atol=0, rtol=2**-7)
        torch.testing.assert_close(total, torch.logaddexp(lse, other))


def test_the_log_sum_exp_has_no_silent_gradient(reference):
    p = problem()
    q, k, v, _ = tensors(p)
    assert not plan(METHODS["spattention"], p, "varlen")(q, k, v)[1].requires_grad


REFUSED = [
    (METHODS["bigbird"], {}, "bigbird is not"),
    (METHODS["reformer"], {}, "reformer is not"),
    (Biased(), {}, "biased is not"),
    (Longformer(window=16, n_global=0, dilation=2), {}, "at most 2 windows a head; longf"),
    (METHODS["mehc_bigbird"], {}, "mehc_bigbird has"),
    (METHODS["spattention"], {"causal": False}, "varlen is causal"),
    (METHODS["spattention"], {"batch": 1 << 16, "seq_len": 1 << 14}, "below 2^31"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "change", "message"), REFUSED)
def test_refusals_are_one_line(method, change, message):
    given = {"q_heads": 4, "head_dim": 64} | change
    with pytest.raises(ValueError) as caught:
        plan(method, Problem(**given), "varlen")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"dtype": "float32"}, {"head_dim": 260}, {"head_dim": 20}])
@pytest.mark.parametrize("kind", [FlashAttention2, FlashAttention4])
def test_dtypes_and_head_dimensions_of_flash_attention(kind, change):
    assert kind().refusal(Problem(**{"head_dim": 64} | change)) is not None
    assert kind().refusal(Problem(head_dim=64)) is None


def test_float32_is_refused_by_attend(monkeypatch):
    monkeypatch.setattr(module, "kernel_for", lambda device: FlashAttention4())
    with pytest.raises(ValueError, match="dtype is float32; flash-attention kernels take bfloat"):
        attend(*(torch.zeros(1, 4, 64, 16) for _ in range(3)), backend="varlen")


def test_what_a_call_cannot_bring(reference):
    q, k, v, _ = (x.detach() for x in tensors(problem()))
    chosen = torch.zeros(2, 67, dtype=torch.bool)
    with pytest.raises(ValueError, match="takes no global_tokens"):
        attend(q, k, v, "longformer", backend="varlen", global_tokens=chosen)
    with pytest.raises(ValueError, match="takes no state"):
        attend(q, k, v, "longformer", backend="varlen", state=object())


def test_another_flash_attn_4_is_not_used(monkeypatch):
    """Its private functions are called, and some versions were wrong in silence."""
    fault = flash_kernels._flash_4_fault.__wrapped__
    monkeypatch.setattr(flash_kernels, "version", lambda name: "4.0.0b3")
    assert fault() == (
        "flash-attn-4 is 4.0.0b3; 4.0.0b36 is what is known to be right (extra `flash`)"
    )
    monkeypatch.setattr(flash_kernels, "version", lambda name: flash_kernels.FLASH_4)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert fault().startswith("flash-attn-4 cannot be imported: ModuleNotFoundError")


def test_the_version_is_the_one_that_the_extra_installs():
    text = (Path(flash_kernels.__file__).parents[1] / "pyproject.toml").read_text()
    assert f"flash-attn-4[cu13]=={flash_kernels.FLASH_4}" in text


def test_a_cpu_has_no_kernel():
    with pytest.raises(ValueError, match="for CUDA alone, none for cpu"):
        kernel_for(CPU)


def test_a_second_derivative_is_refused(reference):
    q, k, v = (torch.randn(1, 4, 64, 16, dtype=torch.float64, requires_grad=True) for _ in "qkv")
    out = attend(q, k, v, "spattention", backend="varlen")
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
