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


def with_lists(mask: BlockMask, mask_mod: Callable | None = None, **lists: Any) -> BlockMask:
    """The mask with some of its lists (counts, indices) replaced, by kind."""
    old = [
        (getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")) for kind in KINDS
    ]
    new = itertools.chain(*(lists.get(kind, pair) for kind, pair in zip(KINDS, old, strict=True)))
    return BlockMask(
        mask.seq_lengths, *new, BLOCK_SIZE=mask.BLOCK_SIZE, mask_mod=mask_mod or mask.mask_mod
    )  # fmt: skip


def emptied(mask: BlockMask, *kinds: str) -> BlockMask:
    return with_lists(
        mask,
        **{
            k: (getattr(mask, f"{k}_num_blocks") * 0, getattr(mask, f"{k}_indices")) for k in kinds
        },
    )


def listed_case() -> tuple[BlockMask, list[Tensor], list[Tensor], list[Tensor]]:
    """A mask with partial and full blocks, operands, cotangents and the right results."""
    p = problem(seq_len=256)
    mask = block_mask(METHODS["spattention_released"], p, CPU, (32, 32))
    assert all(getattr(mask, f"{kind}_num_blocks").sum() for kind in KINDS)
    qkv, cotangents = operands(p)
    return mask, qkv, cotangents, results(lambda *x: blockwise(*x, mask), qkv, cotangents)


def changed(a: list[Tensor], b: list[Tensor]) -> list[bool]:
    """Which of out, lse, dq, dk and dv differ."""
    return [not torch.equal(x, y) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("kind", ["q", "full_q"])
def test_dk_and_dv_alone_read_the_q_lists(kind):
    mask, qkv, cotangents, right = listed_case()
    lying = emptied(mask, kind)
    got = results(lambda *x: blockwise(*x, lying), qkv, cotangents)
    assert changed(got, right) == [False, False, False, True, True]


@pytest.mark.parametrize("kind", ["kv", "full_kv"])
def test_out_and_dq_read_the_kv_lists(kind):
    mask, qkv, cotangents, right = listed_case()
    lying = emptied(mask, kind)
    assert all(changed(results(lambda *x: blockwise(*x, lying), qkv, cotangents), right)[:3])


def test_dq_reads_the_kv_lists_of_the_backward():
    """Emptied between the passes, they leave dK and dV as they were."""
    mask, qkv, cotangents, right = listed_case()
    lying = emptied(mask)
    answer = blockwise(*qkv, lying)
    lying.kv_num_blocks.zero_()
    lying.full_kv_num_blocks.zero_()
    dq, dk, dv = torch.autograd.grad(answer, qkv, cotangents)
    assert (dq == 0).all()
    assert torch.equal(dk, right[3]) and torch.equal(dv, right[4])


def test_empty_lists_give_zero():
    mask, qkv, cotangents, _ = listed_case()
    out, lse, *grads = results(lambda *x: blockwise(*x, emptied(mask, *KINDS)), qkv, cotangents)
    assert (lse == -torch.inf).all()
    assert all((x == 0).all() for x in (out, *grads))


def test_full_blocks_are_not_masked():
    """Partial blocks moved to the full lists: every pair of a listed block takes part."""
    p = problem(seq_len=256, causal=True)
    mask = block_mask(METHODS["sliding_window"], p, CPU, (32, 32))
    moved = {}
    for kind in ("kv", "q"):
        counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        full, full_indices = (getattr(mask, f"full_{kind}_{x}") for x in ("num_blocks", "indices"))
        assert (counts == 1).all()
        shifted = torch.cat((indices[..., :1], full_indices[..., :-1]), -1)
        moved |= {kind: (counts * 0, indices), f"full_{kind}": (full + 1, shifted.contiguous())}
    lying = with_lists(mask, **moved)
    qkv, cotangents = operands(p)
    blocks = torch.arange(256) // 32
    allowed = (blocks[:, None] >= blocks).expand(p.batch, p.q_heads, -1, -1)
    got = results(lambda *x: blockwise(*x, lying), qkv, cotangents)
    want = reference(qkv, cotangents, allowed, p)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)


def test_mask_mod_is_evaluated_in_partial_blocks_inside_the_sequence_only():
    p = problem(batch=1, seq_len=200)
    mask = block_mask(METHODS["standard"], p, CPU, (32, 64))
    seen = torch.zeros(p.seq_len, p.seq_len, dtype=torch.bool)

    def watched(b, h, q_idx, kv_idx):
        seen[q_idx.long(), kv_idx.long()] = True
        return mask.mask_mod(b, h, q_idx, kv_idx)

    rows, columns = torch.arange(200)[:, None], torch.arange(200)
    row, column = rows // 32 * 32, columns // 64 * 64
    some = row + 31 >= column
    full = (row >= column + 63) & (row + 31 < 200) & (column + 63 < 200)
    qkv, cotangents = operands(p)
    watching = with_lists(mask, watched)
    answer = blockwise(*qkv, watching)
    assert torch.equal(seen, some & ~full)
    seen.zero_()
    torch.autograd.grad(answer, qkv, cotangents)
    assert torch.equal(seen, some & ~full)


def test_entries_behind_the_count_are_ignored():
    mask, qkv, cotangents, right = listed_case()
    lists = {}
    for kind in KINDS:
        counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        lists[kind] = counts, indices.masked_fill(~used, 1 << 20)
    got = results(lambda *x: blockwise(*x, with_lists(mask, **lists)), qkv, cotangents)
    assert not any(changed(got, right))


def test_lists_of_partial_blocks_alone():
    p = problem(q_heads=4)
    mask_mod = METHODS["spattention"].mask_mod(p, CPU)
    every = torch.arange(7, dtype=torch.int32).expand(1, 1, 7, 7).contiguous()
    mask = BlockMask.from_kv_blocks(
        torch.full((1, 1, 7), 7, dtype=torch.int32), every, BLOCK_SIZE=32, mask_mod=mask_mod,
        seq_lengths=(200, 200),
    )  # fmt: skip
    assert mask.full_kv_num_blocks is None
    assert_matches_dense(p, mask)


@pytest.mark.parametrize("shared", ["batch", "heads", "neither"])
def test_lists_of_each_batch_and_head(shared):
    """Lists [B or 1, H or 1, ...] with a mask that differs accordingly."""
    p = problem(batch=3, q_heads=4)

    def mask_mod(b, h, q_idx, kv_idx):
        reach = {"batch": 40 * h, "heads": 60 * b, "neither": 30 * b + 20 * h}[shared]
        return (q_idx - kv_idx).abs() <= reach

    batch, heads = (
        None if shared == name else size for name, size in (("batch", 3), ("heads", 4))
    )
    mask = torch.nn.attention.flex_attention.create_block_mask(
        mask_mod, batch, heads, 200, 200, "cpu", BLOCK_SIZE=(32, 64)
    )
    assert mask.kv_indices.shape[:2] == (batch or 1, heads or 1)
    assert_matches_dense(p, mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 2, 100, 16)}, "k [2, 2, 100, 16]"),
        ({"q": torch.zeros(2, 3, 200, 16)}, "Hq a multiple of Hkv"),
        ({"q": torch.zeros(4, 200, 16)}, "q [4, 200, 16]"),
        ({"v": torch.zeros(2, 2, 200, 16).double()}, "one float dtype"),
        ({"q": torch.zeros(2, 8, 200, 16)}, "the block mask is [1, 4, 200, 200]"),
    ],
)
def test_operands_that_do_not_fit_are_refused_in_one_line(change, message):
    p = problem(dtype="float32")
    q, k, v = (x.detach() for x in operands(p)[0])
    mask = block_mask(METHODS["spattention"], p, CPU, (64, 64))
    with pytest.raises(ValueError) as caught:
        blockwise(**{"q": q, "k": k, "v": v, "block_mask": mask} | change)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
