"""blockwise against dense float64 attention, and against lists that lie."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

import methods.blockwise as module
from methods import METHODS, Method, Problem, block_mask
from methods.blockwise import blockwise
from tests.methods.dense import CPU, STATIC, evaluate

BLOCKS = ((32, 64), (64, 32), (128, 128))
KINDS = ("kv", "full_kv", "q", "full_q")


def problem(**changes: Any) -> Problem:
    shape = {"batch": 2, "q_heads": 4, "kv_heads": 2, "seq_len": 200, "head_dim": 16}
    return Problem(**shape | {"dtype": "float64"} | changes)


def operands(p: Problem) -> tuple[list[Tensor], list[Tensor]]:
    """(q, k, v) that want gradients, and cotangents of (out, lse), all in p's dtype."""
    generator = torch.Generator().manual_seed(p.seq_len + p.q_heads)

    def draw(heads: int, *rest: int) -> Tensor:
        x = torch.randn(p.batch, heads, p.seq_len, *rest, generator=generator)
        return x.to(p.torch_dtype)

    qkv = [draw(heads, p.head_dim) for heads in (p.q_heads, p.kv_heads, p.kv_heads)]
    sums = torch.promote_types(p.torch_dtype, torch.float32)
    return [x.requires_grad_() for x in qkv], [
        draw(p.q_heads, p.head_dim),
        draw(p.q_heads).to(sums),
    ]


def dense(
    qkv: list[Tensor], allowed: Tensor, p: Problem, score_mod: Callable | None = None
) -> tuple[Tensor, Tensor]:
    """(out, lse) by masked softmax over all pairs; rows without keys have 0 and -inf."""
    q, k, v = qkv
    k, v = (x.repeat_interleave(p.group, dim=1) for x in (k, v))
    scores = q @ k.mT / p.head_dim**0.5
    if score_mod is not None:
        scores = evaluate(lambda *index: score_mod(scores, *index), p)
    scores = scores.where(allowed, torch.finfo(torch.float64).min)
    out = (scores.softmax(-1) * allowed) @ v
    return out, scores.logsumexp(-1).where(allowed.any(-1), -torch.inf)


def results(function: Callable, qkv: list[Tensor], cotangents: list[Tensor]) -> list[Tensor]:
    """out, lse, dq, dk and dv."""
    answer = function(*qkv)
    grads = torch.autograd.grad(
        answer, qkv, [c.to(x.dtype) for c, x in zip(cotangents, answer, strict=True)]
    )
    return [x.detach() for x in (*answer, *grads)]


def reference(
    qkv: list[Tensor],
    cotangents: list[Tensor],
    allowed: Tensor,
    p: Problem,
    score_mod: Callable | None = None,
) -> list[Tensor]:
    """The dense results in float64, whatever the dtype of the operands."""
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    return results(lambda *x: dense(x, allowed, p, score_mod), leaves, cotangents)


def assert_matches_dense(
    p: Problem, mask: BlockMask, score_mod: Callable | None = None, tolerance: float = 1e-11
) -> None:
    qkv, cotangents = operands(p)
    allowed = evaluate(mask.mask_mod, p)
    got = results(lambda *x: blockwise(*x, mask, score_mod), qkv, cotangents)
    want = reference(qkv, cotangents, allowed, p, score_mod)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=tolerance, rtol=0)
    empty = ~allowed.any(-1)
    assert (got[0][empty] == 0).all() and (got[2][empty] == 0).all()
    assert torch.equal(got[1] == -torch.inf, empty)


def supported(method: Method, p: Problem) -> bool:
    try:
        method.validate(p)
    except ValueError:
        return False
    return True


PRESETS = [
    (method, p)
    for method, causal in itertools.product(map(METHODS.get, STATIC), (True, False))
    if supported(method, p := problem(batch=1, seq_len=600, causal=causal))
]


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize(
    ("method", "p"),
    PRESETS,
    ids=[f"{m.name}-{'causal' if p.causal else 'both'}" for m, p in PRESETS],
)
def test_every_preset_on_a_ragged_length(method, p, block):
    assert_matches_dense(p, block_mask(method, p, CPU, block, narrow=block == BLOCKS[0]))


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("narrow", [True, False])
def test_heads_that_share_keys(kv_heads, narrow):
    p = problem(q_heads=6, kv_heads=kv_heads)
    assert_matches_dense(p, block_mask(METHODS["spattention"], p, CPU, (32, 32), narrow=narrow))


@pytest.mark.parametrize("seq_len", [1, 5, 33])
def test_more_heads_than_tokens_leaves_heads_without_keys(seq_len):
    p = problem(q_heads=40, kv_heads=8, seq_len=seq_len)
    mask = block_mask(METHODS["spattention"], p, CPU, (32, 32))
    assert not evaluate(mask.mask_mod, p).any(-1).all()
    assert_matches_dense(p, mask)


@pytest.mark.parametrize("elements", [1, 5 * 32 * 32])
def test_the_size_of_a_tile_changes_nothing(elements, monkeypatch):
    monkeypatch.setattr(module, "TILE_ELEMENTS", elements)
    p = problem()
    assert_matches_dense(p, block_mask(METHODS["spattention_released"], p, CPU, (32, 32)))


def alibi(score, b, h, q_idx, kv_idx):
    return score - 2.0 ** -(h + 1.0) * (q_idx - kv_idx).abs()


def soft_cap(score, b, h, q_idx, kv_idx):
    return 2 * torch.tanh(score / 2)


def bare_tanh(score, b, h, q_idx, kv_idx):
    """Autograd keeps the very tensor that is returned."""
    return torch.tanh(score)


def large_shift(score, b, h, q_idx, kv_idx):
    """Changes nothing but lse; exp of it overflows."""
    return score + 1000


def log_distance(score, b, h, q_idx, kv_idx):
    """NaN wherever causality forbids the pair."""
    return score - (q_idx - kv_idx + 1).double().log()


def captured_weights(score, b, h, q_idx, kv_idx):
    """Reads tensors that end with the sequence, and the batch."""
    weights = torch.linspace(0.5, 1.5, 200, dtype=torch.float64)
    return score * weights[q_idx] * weights[kv_idx] + b


@pytest.mark.parametrize(
    "score_mod", [alibi, soft_cap, bare_tanh, large_shift, log_distance, captured_weights]
)
@pytest.mark.parametrize("method", ["standard", "spattention"])
def test_gradients_through_a_score_mod(score_mod, method):
    p = problem()
    mask = block_mask(METHODS[method], p, CPU, (32, 64))
    assert_matches_dense(p, mask, score_mod)


def constant(score, b, h, q_idx, kv_idx):
    return torch.zeros_like(score)


def by_key(score, b, h, q_idx, kv_idx):
    return -0.1 * kv_idx


def same_for_all(score, b, h, q_idx, kv_idx):
    return score.new_tensor(3)


@pytest.mark.parametrize("score_mod", [constant, by_key, same_for_all])
def test_a_score_mod_that_leaves_the_score_out(score_mod):
    """q and k then have a gradient, which is 0."""
    p = problem()
    mask = block_mask(METHODS["spattention"], p, CPU, (32, 64))
    (q, k, v), (dout, _) = operands(p)
    out, _ = blockwise(q, k, v, mask, score_mod)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    assert not dq.any() and not dk.any()
    position = torch.arange(200)
    allowed = evaluate(mask.mask_mod, p)
    weights = score_mod(q.detach()[0, 0, 0, 0], 0, 0, position[:, None], position[None])
    weights = weights.double().expand(200, 200).exp() * allowed
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    torch.testing.assert_close(out, weights @ v.repeat_interleave(2, 1), atol=1e-12, rtol=0)
    expected = (weights.mT @ dout).unflatten(1, (2, 2)).sum(2)
    torch.testing.assert_close(dv, expected, atol=1e-12, rtol=0)


def test_a_captured_tensor_that_wants_a_gradient_is_refused():
    """It would get none, in silence; where gradients are disabled it wants none."""
    p, slopes = problem(), torch.ones(4, dtype=torch.float64, requires_grad=True)
    mask = block_mask(METHODS["standard"], p, CPU, (32, 64))
    qkv, _ = operands(p)

    def learned(score, b, h, q_idx, kv_idx):
        return score - slopes[h] * (q_idx - kv_idx)

    for inputs in (qkv, [x.detach() for x in qkv]):
        with pytest.raises(ValueError, match=r"^score_mod reads a tensor that wants a gradient; "):
            blockwise(*inputs, mask, learned)
    with torch.no_grad():
        found, _ = blockwise(*qkv, mask, learned)
    slopes.requires_grad_(False)
    assert torch.equal(blockwise(*qkv, mask, learned)[0], found)


def test_a_score_mod_keeps_the_dtype_of_the_sums():
    p = problem(dtype="float32")
    assert_matches_dense(p, block_mask(METHODS["standard"], p, CPU, (64, 64)), alibi, 1e-4)
    (q, k, v), _ = operands(p)
    mask = block_mask(METHODS["standard"], p, CPU, (64, 64))
    assert {x.dtype for x in blockwise(q, k, v, mask, captured_weights)} == {torch.float32}


def test_scale():
    p = problem()
    mask = block_mask(METHODS["spattention"], p, CPU, (64, 64))
    (q, k, v), cotangents = operands(p)
    scaled = results(lambda *x: blockwise(*x, mask, scale=0.5), [q, k, v], cotangents)
    factor = 0.5 * p.head_dim**0.5
    same = results(lambda q, k, v: blockwise(q * factor, k, v, mask), [q, k, v], cotangents)
    for a, b in zip(scaled, same, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_float32():
    p = problem(dtype="float32", seq_len=600)
    mask = block_mask(METHODS["spattention"], p, CPU, (128, 128))
    assert_matches_dense(p, mask, tolerance=2e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_rounds_only_the_results(dtype):
    """Sums are float32, so an error is the rounding of a result, and of out within delta."""
    p = problem(dtype=dtype)
    unit = torch.finfo(p.torch_dtype).eps / 2
    mask = block_mask(METHODS["spattention"], p, CPU, (64, 64))
    allowed = evaluate(mask.mask_mod, p)
    qkv, cotangents = operands(p)
    got = results(lambda *x: blockwise(*x, mask), qkv, cotangents)
    assert [x.dtype for x in got] == [p.torch_dtype, torch.float32] + [p.torch_dtype] * 3
    want = reference(qkv, cotangents, allowed, p)
    q, k = (x.detach().double() for x in qkv[:2])
    k = k.repeat_interleave(p.group, dim=1)
    scale = p.head_dim**-0.5
    weights = (q @ k.mT * scale).where(allowed, -1e300).softmax(-1) * allowed
    delta = unit * (cotangents[0].double() * want[0]).abs().sum(-1, keepdim=True)
    dq_slack = scale * delta * (weights @ k.abs())
    dk_slack = scale * (weights.mT @ (delta * q.abs())).unflatten(1, (p.kv_heads, -1)).sum(2)
    for a, b, rounding, slack in zip(
        got, want, (unit, 0, unit, unit, unit), (0, 0, dq_slack, dk_slack, 0), strict=True
    ):
        error = (a.double() - b).abs().masked_fill(b == -torch.inf, 0)
        bound = rounding * b.abs().nan_to_num(posinf=0) + slack
        assert (error <= 1.01 * bound + 2e-5).all()


def test_no_gradient_of_lse_where_there_is_no_key():
    """Parts joined by their lse give NaN as its gradient in a row that no part has keys for."""
    p = problem()
    mask = block_mask(METHODS["spattention"], p, CPU, (32, 32))
    empty = ~evaluate(mask.mask_mod, p).any(-1)
    qkv, (dout, dlse) = operands(p)
    clean = results(lambda *x: blockwise(*x, mask), qkv, [dout, dlse])
    poisoned = [dout, dlse.masked_fill(empty, torch.nan)]
    for a, b in zip(clean, results(lambda *x: blockwise(*x, mask), qkv, poisoned), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(wanted):
    p = problem()
    mask = block_mask(METHODS["spattention"], p, CPU, (64, 64))
    qkv, cotangents = operands(p)
    every = torch.autograd.grad(blockwise(*qkv, mask), qkv, cotangents)
    some = [x if i in wanted else x.detach() for i, x in enumerate(qkv)]
    grads = torch.autograd.grad(blockwise(*some, mask), [qkv[i] for i in wanted], cotangents)
    for i, grad in zip(wanted, grads, strict=True):
        assert torch.equal(grad, every[i])


def test_nothing_is_saved_without_gradients():
    p = problem()
    mask = block_mask(METHODS["spattention"], p, CPU, (64, 64))
    qkv, _ = operands(p)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            blockwise(*qkv, mask)
        blockwise(*(x.detach() for x in qkv), mask)
        assert not saved
        blockwise(*qkv, mask)
    assert saved


def test_strides_and_autocast_change_nothing():
    p = problem(dtype="float32")
    mask = block_mask(METHODS["spattention"], p, CPU, (64, 64))
    qkv, cotangents = operands(p)
    want = results(lambda *x: blockwise(*x, mask), qkv, cotangents)
    strided = [
        x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in qkv
    ]
    with torch.autocast("cpu", torch.bfloat16):
        got = results(lambda *x: blockwise(*x, mask), strided, cotangents)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


# The lists
