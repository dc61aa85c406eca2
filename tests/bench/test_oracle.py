"""The gate: its reference, its budget, its sampling; correct runs pass and wrong ones do not."""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import oracle
from bench.oracle import Reference, build_reference, cotangent, judge, sample_rows
from methods import METHODS, Method, Problem, block_mask
from methods.attend import attend
from methods.blockwise import blockwise

CPU = torch.device("cpu")
Inputs = tuple[Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Sloped(Method):
    """Causal, with a bias that a state of the call, one number a sequence, scales."""

    name: ClassVar[str] = "sloped"
    paper: ClassVar[str] = "none"

    def prepare(self, q: Tensor, k: Tensor, p: Problem) -> Tensor:
        return torch.linspace(0.01, 0.3, p.batch, device=q.device, dtype=torch.float64)

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return lambda b, h, i, j: i >= j

    def score_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return lambda score, b, h, i, j: score - state[b] * (i - j) * (h + 1)


def make_inputs(p: Problem, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    heads = (p.q_heads, p.kv_heads, p.kv_heads)
    shapes = [(p.batch, h, p.seq_len, p.head_dim) for h in heads]
    return tuple(
        torch.randn(shape, generator=generator).to(p.torch_dtype).requires_grad_()
        for shape in shapes
    )


def make_reference(
    method: Method, p: Problem, inputs: Inputs, seed: int = 0, **options: Any
) -> tuple[Reference, Tensor]:
    rows = sample_rows(p, 128, CPU, seed)
    cot = cotangent(p, rows, CPU, seed)
    return build_reference(method, p, *inputs, rows, cot, **options), cot


def dense(method: Method, p: Problem, inputs: Inputs, state: Any) -> tuple[Tensor, Tensor]:
    """out and LSE by a dense softmax in float64 over a mask written out in full."""
    q, k, v = (x.double() for x in inputs)
    k, v = (x.repeat_interleave(p.group, 1) for x in (k, v))
    b, h, i, j = torch.meshgrid(
        *(torch.arange(x) for x in (p.batch, p.q_heads, p.seq_len, p.seq_len)), indexing="ij"
    )
    scores = q @ k.mT / math.sqrt(p.head_dim)
    score_mod = method.score_mod(p, CPU, state)
    if score_mod is not None:
        scores = score_mod(scores, b, h, i, j)
    allowed = method.mask_mod(p, CPU, state)(b, h, i, j)
    weights = scores.masked_fill(~allowed, torch.finfo(torch.float64).min).softmax(-1) * allowed
    return weights @ v, scores.masked_fill(~allowed, -torch.inf).logsumexp(-1)


def run_blockwise(
    method: Method, p: Problem, inputs: Inputs, cot: Tensor
) -> tuple[Tensor, Tensor, Gradients]:
    out, lse = blockwise(*inputs, block_mask(method, p, CPU))
    return out, lse, torch.autograd.grad(out, inputs, cot)


SMALL = Problem(seq_len=300, q_heads=4, kv_heads=2, head_dim=16, dtype="float32")


@pytest.fixture
def small() -> tuple[Reference, Tensor, Tensor, Gradients]:
    """A reference for SPAttention, with a blockwise result that passes."""
    method, inputs = METHODS["spattention"], make_inputs(SMALL)
    reference, cot = make_reference(method, SMALL, inputs)
    out, lse, grads = run_blockwise(method, SMALL, inputs, cot)
    assert judge(reference, out, lse, grads).passed
    return reference, out.detach().clone(), lse.detach().clone(), grads


# --- the reference ---------------------------------------------------------------------------

CASES = [
    ("standard", Problem(seq_len=130, q_heads=2, head_dim=16, dtype="float64")),
    ("standard", Problem(seq_len=65, q_heads=2, head_dim=16, dtype="float32", causal=False)),
    ("spattention", Problem(batch=2, seq_len=200, q_heads=8, kv_heads=2, head_dim=16)),
    ("gapped_bands", Problem(seq_len=257, q_heads=4, head_dim=32, dtype="float16")),
    ("sliding_window", Problem(seq_len=1, q_heads=3, kv_heads=1, head_dim=16)),
    ("sloped", Problem(batch=2, seq_len=150, q_heads=4, kv_heads=2, head_dim=16)),
]


@pytest.mark.parametrize(("name", "p"), CASES)
def test_reference_equals_autograd_of_dense_float64(name: str, p: Problem) -> None:
    method = {**METHODS, "sloped": Sloped()}[name]
    inputs = make_inputs(p)
    state = method.prepare(*inputs[:2], p)
    reference, cot = make_reference(method, p, inputs, state=state)
    out, lse = dense(method, p, inputs, state)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    grads = torch.autograd.grad(dense(method, p, wide, state)[0], wide, cot.double())
    found = {name: expected.value for name, expected in reference.tensors.items()}
    take = (slice(None), torch.arange(p.q_heads)[:, None], reference.rows)
    torch.testing.assert_close(found["out"], out[take].detach(), atol=1e-13, rtol=1e-11)
    torch.testing.assert_close(found["lse"][..., 0], lse[take].detach(), atol=1e-13, rtol=1e-11)
    torch.testing.assert_close(found["dq"], grads[0][take], atol=1e-13, rtol=1e-11)
    torch.testing.assert_close(found["dk"], grads[1], atol=1e-13, rtol=1e-11)
    torch.testing.assert_close(found["dv"], grads[2], atol=1e-13, rtol=1e-11)
    assert torch.equal(reference.empty, lse[take] == -torch.inf)


def test_strips_change_nothing() -> None:
    p = Problem(batch=2, seq_len=300, q_heads=4, kv_heads=2, head_dim=16)
    method, inputs = METHODS["spattention"], make_inputs(p)
    whole, _ = make_reference(method, p, inputs)
    rows, _ = make_reference(method, p, inputs, strip=1)  # one row of each head at a time
    for name, expected in whole.tensors.items():
        other = rows.tensors[name]
        torch.testing.assert_close(other.value, expected.value, atol=1e-14, rtol=1e-12)
        # A sum that falls on the other side of one 16-bit rounding moves a small block's E.
        torch.testing.assert_close(other.budget, expected.budget, atol=0, rtol=0.1)
    assert judge(rows, *run_blockwise(method, p, inputs, cotangent(p, rows.rows, CPU))).passed


# --- the sampled rows ------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 128, 129, 131, 1000, 1024])
def test_rows_are_distinct_sorted_and_spread(tokens: int) -> None:
    rows = sample_rows(Problem(seq_len=tokens, q_heads=6), 128, CPU, seed=3)
    assert rows.dtype == torch.int64
    assert (rows.diff(dim=1) > 0).all()
    assert (rows[:, 0] == 0).all()
    assert (rows[:, -1] == tokens - 1).all()
    for start in range(0, tokens, 128):
        end = min(start + 128, tokens)
        inside = (rows >= start) & (rows < end)
        assert (inside.sum(1) >= min(4, end - start)).all()
        for quarter in range(4 if end - start == 128 else 0):
            first = start + 32 * quarter
            # The sequence's first and last row shift the quarters beside them by one.
            assert ((rows >= first - 1) & (rows < first + 33)).any(1).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tokens", [1024, 2048, 1100])
def test_every_residue_is_sampled_in_some_head(tokens: int, seed: int) -> None:
    rows = sample_rows(Problem(seq_len=tokens, q_heads=8), 128, CPU, seed)
    assert (rows % 128).unique().numel() == 128
    # Modulo 64, in at least two places: one may lie where a head sees nothing.
    assert (rows % 64).flatten().bincount().min() >= 2


@pytest.mark.parametrize("heads", [1, 3, 8, 16])
def test_every_residue_is_sampled_in_every_head_of_a_long_sequence(heads: int) -> None:
    rows = sample_rows(Problem(seq_len=34 * 128, q_heads=heads), 128, CPU)
    assert all((row % 128).unique().numel() == 128 for row in rows)


def test_cotangent_is_zero_outside_sampled_rows() -> None:
    p = Problem(batch=2, seq_len=300, q_heads=3, head_dim=16)
    rows = sample_rows(p, 128, CPU)
    cot = cotangent(p, rows, CPU)
    assert cot.dtype == torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    assert cot[0, 0, 0, 0] != torch.randn(4, generator=generator).bfloat16()[0]
    nonzero = (cot != 0).any(-1)
    expected = torch.zeros(3, 300, dtype=torch.bool).scatter_(1, rows, True)
    assert torch.equal(nonzero, expected.expand(2, -1, -1))


# --- correct runs pass -----------------------------------------------------------------------


def clean_case(seed: int) -> tuple[Method, Problem]:
    draw = random.Random(seed)
    kv_heads = draw.choice((1, 2, 4))
    p = Problem(
        batch=draw.choice((1, 1, 2)), q_heads=kv_heads * draw.choice((1, 1, 2, 4)),
        kv_heads=kv_heads, seq_len=draw.choice((1, 2, 5, 64, 129, 200, 256, 300, 512, 700, 1024)),
        head_dim=draw.choice((16, 32, 64, 128)), causal=draw.random() < 0.8,
        dtype=draw.choice(("bfloat16", "float16", "float32", "float64")),
    )  # fmt: skip
    return METHODS[draw.choice(("standard", "spattention", "sliding_window", "gapped_bands"))], p


@pytest.mark.parametrize("seed", range(50))
def test_correct_runs_pass(seed: int) -> None:
    method, p = clean_case(seed)
    inputs = make_inputs(p, seed)
    reference, cot = make_reference(method, p, inputs, seed)
    verdict = judge(reference, *run_blockwise(method, p, inputs, cot))
    assert verdict.error_budget < 0.9, verdict.reason
    if method.name == "standard" and p.seq_len <= 512:
        out = F.scaled_dot_product_attention(*inputs, is_causal=p.causal, enable_gqa=p.group > 1)
        # In 16 bits the error of its gradients on a CPU grows with the sequence, and from some
        # length on it is rightly outside the budget; so only float32 and float64 are tested.
        wide = p.dtype in ("float32", "float64")
        grads = torch.autograd.grad(out, inputs, cot) if wide else None
        verdict = judge(reference, out, None, grads)
        assert verdict.error_budget < 0.9, verdict.reason


def test_compiled_flex_passes() -> None:
    p = Problem(seq_len=300, q_heads=4, kv_heads=2, head_dim=32)
    method, inputs = METHODS["spattention"], make_inputs(p)
    reference, _ = make_reference(method, p, inputs)
    out = attend(*(x.detach() for x in inputs), method=method, backend="flex")
    verdict = judge(reference, out)
    assert verdict.error_budget < 0.9, verdict.reason
    assert verdict.error_dq is None


# --- wrong ones do not -----------------------------------------------------------------------


def test_value_in_a_row_without_key_is_seen(small: tuple) -> None:
    reference, out, lse, grads = small
    head, row = (int(x[0]) for x in reference.empty[0].nonzero(as_tuple=True))
    position = int(reference.rows[head, row])
    out[0, head, position, 0] = 1e-30
    verdict = judge(reference, out, lse, grads)
    assert not verdict.passed
    assert verdict.error_out == math.inf
    assert f"head {head}, position {position}" in verdict.reason


def unsampled(reference: Reference, head: int) -> int:
    return min(set(range(SMALL.seq_len)) - set(reference.rows[head].tolist()))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_what_is_not_finite_is_seen_in_any_row(small: tuple, name: str, value: float) -> None:
    reference, out, lse, grads = small
    tensors = {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    position = unsampled(reference, 1)
    tensors[name][0, 1, position, 3] = value
    verdict = judge(reference, out, lse, grads)
    assert not verdict.passed
    assert verdict.reason == f"{name} is not finite: batch 0, head 1, position {position}"


def test_dq_outside_sampled_rows_is_seen(small: tuple) -> None:
    reference, out, lse, grads = small
    position = unsampled(reference, 2)
    grads[0][0, 2, position, 0] = 1e-20
    verdict = judge(reference, out, lse, grads)
    assert not verdict.passed
    assert verdict.reason.startswith("dq is not 0")


@pytest.mark.parametrize("change", [lambda x: x + 1e-3, lambda x: x / math.log(2), torch.exp])
def test_wrong_lse_is_seen(small: tuple, change: Any) -> None:
    reference, out, lse, grads = small
    assert not judge(reference, out, change(lse), grads).passed
    assert judge(reference, out, None, grads).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
def test_wrong_infinity_in_lse_is_seen(small: tuple, value: float) -> None:
    reference, out, lse, grads = small
    empty = value == 0
    row = (reference.empty[0, 3] == empty).nonzero()[-1]
    lse[0, 3, reference.rows[3, row]] = value
    assert not judge(reference, out, lse, grads).passed


def test_one_wrong_block_is_seen_that_a_global_norm_would_miss() -> None:
    p = Problem(seq_len=4096, q_heads=4, head_dim=32)
    method, inputs = METHODS["standard"], make_inputs(p)
    reference, _ = make_reference(method, p, inputs)
    expected = reference.tensors
    out = torch.zeros(1, 4, 4096, 32, dtype=torch.float64)
    out.scatter_(2, oracle._wide(reference.rows, out), expected["out"].value)
    dq = torch.zeros_like(out).scatter_(2, oracle._wide(reference.rows, out), expected["dq"].value)
    dk, dv = expected["dk"].value.clone(), expected["dv"].value
    assert judge(reference, out, None, (dq, dk, dv)).error_budget == 0
    dk[0, 2, 3840:3968] *= 1.05
    verdict = judge(reference, out, None, (dq, dk, dv))
    assert not verdict.passed
    assert verdict.error_dk == pytest.approx(0.05, rel=0.4)
    assert re.match(r"dk of batch 0, head 2, positions 3840 to 3967: \d", verdict.reason)
    wrong = (dk - expected["dk"].value).norm()
    assert wrong < expected["dk"].budget.norm()


def test_float32_with_rounded_operands_is_seen(small: tuple) -> None:
    """Operands with TF32's 11 bits are no float32 kernel."""
    reference, cot = make_reference(METHODS["spattention"], SMALL, make_inputs(SMALL))
    rounded = [
        (x.detach().view(torch.int32) & ~0x1FFF).view(torch.float32).requires_grad_()
        for x in make_inputs(SMALL)
    ]
    result = run_blockwise(METHODS["spattention"], SMALL, rounded, cot)
    assert judge(reference, *result).error_budget > 10


def test_float64_is_held_to_float64(small: tuple) -> None:
    p = Problem(seq_len=200, q_heads=2, head_dim=16, dtype="float64")
    method, inputs = METHODS["spattention"], make_inputs(p)
    reference, cot = make_reference(method, p, inputs)
    out, lse, grads = run_blockwise(method, p, inputs, cot)
    assert not judge(reference, out * (1 + 1e-12), lse, grads).passed


# --- requests that make no sense -------------------------------------------------------------


def test_reduced_float32_precision_is_refused() -> None:
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with pytest.raises(ValueError, match="precision is 'bf16'; it must be 'ieee'"):
            make_reference(METHODS["standard"], SMALL, make_inputs(SMALL))
    finally:
        matmul.fp32_precision = before


def test_wrong_shape_is_refused(small: tuple) -> None:
    reference, out, lse, (dq, dk, dv) = small
    with pytest.raises(ValueError, match=r"out has shape .* it must be \(1, 4, 300, 16\)"):
        judge(reference, out[:, :2])
    with pytest.raises(ValueError, match=r"dk has shape .* it must be \(1, 2, 300, 16\)"):
        judge(reference, out, lse, (dq, dk.repeat(1, 2, 1, 1), dv))
