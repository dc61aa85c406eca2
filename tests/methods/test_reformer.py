"""Reformer against transformers, reformer-pytorch, and softmax over candidates found by loops."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from reformer_pytorch import LSHAttention
from torch import Tensor
from transformers import ReformerConfig
from transformers.models.reformer.modeling_reformer import LSHSelfAttention

from methods import Problem, attend
from methods.banded import merged_bands
from methods.bigbird import draw_blocks
from methods.blockwise import blockwise
from methods.chunks import Rounds
from methods.hashing import draw
from methods.longformer import Longformer
from methods.mehc import MehcLongformer
from methods.reformer import Reformer
from tests.methods.dense import CPU, dense_mask

BATCH, HEADS, DIM = 2, 3, 16


def problem(n: int, causal: bool = True, dtype: str = "float64") -> Problem:
    return Problem(batch=BATCH, q_heads=HEADS, seq_len=n, head_dim=DIM, dtype=dtype, causal=causal)


def operands(p: Problem, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The shared queries and keys, and the values."""
    generator = torch.Generator().manual_seed(seed)
    shape = (p.batch, p.q_heads, p.seq_len, p.head_dim)
    x, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return tuple(t.to(p.torch_dtype).requires_grad_() for t in (x, v))


def run(method: Reformer, x: Tensor, v: Tensor, p: Problem, state: Rounds) -> Tensor:
    layout = method.layout(x, x, v, p, state, (32, 16))
    lists = layout.block_mask
    return layout.restore(*blockwise(layout.q, layout.k, layout.v, lists, layout.score_mod))


def assert_close(actual: Tensor, expected: Tensor, inputs: tuple[Tensor, ...], tol: float) -> None:
    """Values, and gradients in the inputs, to within tol."""
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9)).double()
    assert (actual - expected).abs().max() < tol
    gradients = (torch.autograd.grad((y * weights).sum(), inputs) for y in (actual, expected))
    for mine, theirs in zip(*gradients, strict=True):
        assert theirs.abs().max() > 0.01
        assert (mine - theirs).abs().max() < tol


# exact mode


def candidates(method: Reformer, buckets: list[list[int]], causal: bool) -> Tensor:
    """bool [N, N], by loops: what the tokens of one head see; buckets of each round by token."""
    n, m = len(buckets[0]), method.chunk
    seen = torch.zeros(n, n, dtype=torch.bool)
    for bucket in buckets:
        order = sorted(range(n), key=lambda t, bucket=bucket: (bucket[t], t))
        for slot, i in enumerate(order):
            first = (slot // m - method.before) * m
            for j in order[max(0, first) : (slot // m + method.after + 1) * m]:
                same = not method.within_buckets or bucket[i] == bucket[j]
                seen[i, j] |= same and (j <= i or not causal)
    return seen


def softmax_over(seen: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Dense attention; a token sees itself where it sees nothing else."""
    itself = torch.eye(x.shape[2], dtype=torch.bool)
    others = seen & ~itself
    seen = torch.where(others.any(-1, keepdim=True), others, itself)
    scores = x @ (x / x.norm(dim=-1, keepdim=True)).mT / x.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


EXACT = [
    (64, Reformer(chunk=16, n_rounds=1)),
    (96, Reformer(chunk=8, n_rounds=4)),
    (100, Reformer(chunk=16, n_rounds=3)),  # the last chunk is shorter
    (96, Reformer(chunk=16, n_rounds=2, before=2)),
    (96, Reformer(chunk=8, n_rounds=2, before=1, after=1)),
    (96, Reformer(chunk=16, n_rounds=3, before=0)),
    (96, Reformer(chunk=16, n_rounds=3, within_buckets=True)),
    (48, Reformer(chunk=48, n_rounds=2)),  # one chunk: dense
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "method"), EXACT, ids=[str(m) for _, m in EXACT])
def test_exact_mode_is_one_softmax_over_the_union(n: int, method: Reformer, causal: bool) -> None:
    """Values and gradients, through the merge of rounds and the normalised keys."""
    p = problem(n, causal)
    x, v = operands(p)
    generator = torch.Generator().manual_seed(1)
    buckets = torch.randint(6, (BATCH, HEADS, method.n_rounds, n), generator=generator)
    state = method.rounds(buckets, p)
    seen = torch.stack(
        [
            torch.stack([candidates(method, head.tolist(), causal) for head in sample])
            for sample in buckets
        ]
    )
    assert_close(run(method, x, v, p, state), softmax_over(seen, x, v), (x, v), 1e-9)
    assert torch.equal(dense_mask(method, p, state), seen)
    assert method.allowed_pairs(p, state) == int(seen[0].sum())


def test_rows_are_the_bias_of_the_scores() -> None:
    """In token order; a token that sees itself alone has no penalty."""
    p = problem(96)
    method = Reformer(chunk=8, n_rounds=2)
    x, v = operands(p)
    state = method.prepare(x, x, p)
    bias = method.rows(p, CPU, torch.arange(96).expand(HEADS, -1), state)
    scores = x @ method.keys(x).mT / DIM**0.5 + bias
    assert_close(run(method, x, v, p, state), scores.softmax(-1) @ v, (x, v), 1e-9)
    itself = bias.diagonal(dim1=-2, dim2=-1)
    alone = bias.isfinite().sum(-1) == 1
    assert alone[..., 0].all() and (itself[alone] == 0).all()
    assert (itself[~alone] == -1e5).all() and not alone.all()


def test_attend_draws_the_buckets_itself() -> None:
    p = problem(100)
    method = Reformer(chunk=16, n_rounds=2, seed=3)
    x, v = operands(p)
    expected = run(method, x, v, p, method.prepare(x, x, p))
    assert_close(attend(x, x, v, method), expected, (x, v), 1e-12)
    assert not torch.equal(attend(x, x, v, replace(method, seed=4)), expected)


# what the libraries compute

TRANSFORMERS = {
    "not causal": (False, {"n_rounds": 1, "n_buckets": 8}),
    "causal": (True, {"n_rounds": 2, "n_buckets": 8}),
    "factored": (True, {"n_rounds": 2, "n_buckets": (4, 8)}),
    "two back": (True, {"n_rounds": 3, "n_buckets": 16, "before": 2}),
    "back and ahead": (False, {"n_rounds": 2, "n_buckets": 8, "before": 1, "after": 1}),
}


def lsh_layer(method: Reformer, causal: bool) -> LSHSelfAttention:
    buckets = list(method.n_buckets) if isinstance(method.n_buckets, tuple) else method.n_buckets
    config = ReformerConfig(
        attn_layers=["lsh"], axial_pos_embds=False, hidden_size=32, num_attention_heads=HEADS,
        attention_head_size=DIM, hash_seed=method.seed, num_hashes=method.n_rounds,
        lsh_attn_chunk_length=method.chunk, num_buckets=buckets, is_decoder=causal,
        lsh_num_chunks_before=method.before, lsh_num_chunks_after=method.after,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LSHSelfAttention(config, layer_idx=0).eval()


def call_layer(layer: LSHSelfAttention, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its output and buckets, and the projections that it attends over, by head."""
    with torch.random.fork_rng():  # it seeds the global generator
        answer = layer(hidden)
    x, v = (
        project(hidden).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        for project in (layer.query_key, layer.value)
    )
    out = answer.hidden_states.unflatten(-1, (HEADS, DIM)).transpose(1, 2)
    return out, answer.buckets, x, v


@pytest.mark.parametrize("case", TRANSFORMERS)
def test_transformers(case: str) -> None:
    causal, parameters = TRANSFORMERS[case]
    method = Reformer(chunk=16, mode="transformers", **parameters)
    p = problem(128, causal)
    layer = lsh_layer(method, causal).double()
    generator = torch.Generator().manual_seed(2)
    # Longer than a trained model's: scores of size one, so that softmax is far from uniform.
    hidden = 4 * torch.randn(BATCH, 128, 32, generator=generator, dtype=torch.float64)
    expected, buckets, x, v = call_layer(layer, hidden)
    assert buckets.shape == (BATCH, HEADS, method.n_rounds, 128)
    actual = run(method, x, v, p, method.rounds(buckets, p))
    weights = (layer.query_key.weight, layer.value.weight)
    assert_close(actual, expected, weights, 1e-10)


@pytest.mark.parametrize("n_buckets", [8, (4, 8)])
def test_the_draw_of_transformers(n_buckets: int | tuple[int, ...]) -> None:
    method = Reformer(chunk=16, n_buckets=n_buckets, n_rounds=2, seed=5, mode="transformers")
    p = problem(128, dtype="float32")
    hidden = torch.randn(BATCH, 128, 32, generator=torch.Generator().manual_seed(3))
    _, buckets, x, _ = call_layer(lsh_layer(method, True), hidden)
    offsets = torch.arange(2)[:, None] * (8 if n_buckets == 8 else 32)
    assert torch.equal(method.hash(x, p), buckets - offsets)


REFORMER_PYTORCH = [
    # chunk, rounds, causal, across buckets, duplicates
    (16, 1, False, True, True),
    (16, 4, False, True, True),
    (32, 2, False, True, True),
    (16, 1, True, True, True),
    (16, 4, True, True, True),
    (32, 3, True, True, True),
    (32, 2, True, False, True),
    (16, 4, True, False, False),
    (32, 3, False, False, False),
]


@pytest.mark.parametrize(("chunk", "rounds", "causal", "across", "twice"), REFORMER_PYTORCH)
def test_reformer_pytorch(
    chunk: int, rounds: int, causal: bool, across: bool, twice: bool
) -> None:
    theirs = LSHAttention(
        bucket_size=chunk, n_hashes=rounds, causal=causal, attend_across_buckets=across,
        allow_duplicate_attention=twice,
    ).eval()  # fmt: skip
    p = problem(256, causal)
    x, v = operands(p)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        expected, _, buckets = theirs(x.flatten(0, 1), v.flatten(0, 1))
    method = Reformer(
        chunk=chunk, n_rounds=rounds, within_buckets=not across,
        mode="reformer_pytorch" if twice else "exact",
    )  # fmt: skip
    state = method.rounds(buckets.view(BATCH, HEADS, rounds, 256), p)
    actual = run(method, x, v, p, state)
    assert_close(actual, expected.view_as(actual), (x, v), 1e-7)


@pytest.mark.parametrize("mode", ["transformers", "reformer_pytorch"])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_of_a_ring_count_every_listing(mode: str, causal: bool) -> None:
    p = problem(96, causal)
    method = Reformer(chunk=16, n_buckets=4, n_rounds=2, after=1, mode=mode)
    x, v = operands(p)
    state = method.prepare(x, x, p)
    bias = method.rows(p, CPU, torch.arange(96).expand(HEADS, -1), state)
    scores = x @ method.keys(x).mT / DIM**0.5 + bias
    assert_close(run(method, x, v, p, state), scores.softmax(-1) @ v, (x, v), 1e-9)
    assert method.allowed_pairs(p, state) == int(bias[0].isfinite().sum())


@pytest.mark.parametrize(("n", "chunk"), [(1024, 16), (2048, 32), (1024, 64), (128, 16)])
def test_the_buckets_that_transformers_chooses(n: int, chunk: int) -> None:
    method = Reformer(chunk=chunk, n_rounds=1, seed=5, mode="transformers")
    p = problem(n, dtype="float32")
    hidden = torch.randn(BATCH, n, 32, generator=torch.Generator().manual_seed(3))
    layer = lsh_layer(method, True)
    _, buckets, x, _ = call_layer(layer, hidden)
    chosen = layer.num_buckets
    assert method.rotations(p) == (tuple(chosen) if isinstance(chosen, list) else (chosen,))
    assert torch.equal(method.hash(x, p), buckets)


def test_derived_buckets() -> None:
    """2 N / chunk, a power of two, in two rotations above 128; reformer-pytorch has N / chunk."""
    expected = {128: (2,), 1000: (8,), 8192: (128,), 16384: (16, 16), 65536: (32, 32)}
    for n, sizes in expected.items():
        assert Reformer().rotations(Problem(seq_len=n)) == sizes
    assert Reformer(mode="reformer_pytorch").rotations(Problem(seq_len=8192)) == (64,)
    assert Reformer(mode="transformers").rotations(Problem(seq_len=16384)) == (256,)
    p = problem(512)
    x, _ = operands(p)
    buckets = Reformer(chunk=16, n_buckets=(2, 6), n_rounds=2).hash(x, p)
    assert buckets.unique().tolist() == list(range(12))
    assert not torch.equal(buckets[:, :, 0], buckets[:, :, 1])


# causality


def test_a_token_that_is_zero_has_a_finite_gradient() -> None:
    """Padding, say; it has no direction that its key could be normalised to."""
    for dtype in (torch.float16, torch.float32):
        x, v = torch.randn(2, 1, 2, 256, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
        x[:, :, 100] = 0
        x.requires_grad_()
        (grad,) = torch.autograd.grad(attend(x, x, v, Reformer()).sin().sum(), x)
        others = grad[:, :, :100].abs().max()
        assert grad.isfinite().all() and grad[:, :, 100].abs().max() < 10 * others


def test_draws_do_not_follow_the_default_type_and_device() -> None:
    p = problem(256, dtype="float32")
    x, _ = (t.detach().float() for t in operands(p))
    method, answers = Reformer(chunk=32, seed=91), []
    for other in (False, True):
        draw.cache_clear(), draw_blocks.cache_clear(), merged_bands.cache_clear()
        with torch.device("meta" if other else "cpu"):
            torch.set_default_dtype(torch.bfloat16 if other else torch.float32)
            try:
                hashed, drawn = method.hash(x, p), draw_blocks(4, 16, 3, 91, True)
                bands = [merged_bands(banded, p) for banded in (MehcLongformer(), Longformer())]
            finally:
                torch.set_default_dtype(torch.float32)
        answers.append([hashed, drawn, *bands])
    assert all(map(torch.equal, *answers))


def test_later_values_move_nothing_earlier_but_later_keys_do() -> None:
    """The documented exception: chunks begin where all tokens, later ones too, put them."""
    p = problem(256)
    method = Reformer(chunk=16, n_rounds=2)
    x, v = (t.detach() for t in operands(p))
    before = attend(x, x, v, method)
    later = (torch.arange(256) >= 200)[:, None]
    changed = attend(x, x, torch.where(later, v + 1, v), method)
    assert torch.equal(changed[:, :, :200], before[:, :, :200])
    assert not torch.equal(changed[:, :, 200:], before[:, :, 200:])
    other = torch.where(later, x.flip(2), x)
    moved = (attend(other, other, v, method) != before).any(-1)[:, :, :200]
    assert moved.float().mean() > 0.5
    # With the buckets held they move nothing either: the leak is through the buckets alone.
    state = method.prepare(x, x, p)
    held = (run(method, t, v, p, state)[:, :, :200] for t in (x, other))
    assert torch.equal(*held)


def test_every_token_s_bucket_is_held_against_float64():
    """Also behind the first tokens that are looked at together, and in between."""
    method, p = Reformer(n_rounds=2), Problem(q_heads=2, seq_len=8192, head_dim=32)
    x = torch.randn(1, 2, 8192, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    state = method.prepare(x, x, p)
    assert method.state_fault(x, x, p, state) is None
    for wrong in (slice(1, None, 100), slice(8150, None)):
        buckets = state.buckets.clone()
        buckets[..., wrong] = 0
        fault = method.state_fault(x, x, p, method.rounds(buckets, p))
        assert "in other buckets" in fault
