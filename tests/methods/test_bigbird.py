"""BigBird against transformers, loops over pairs, and dense softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BigBirdConfig, BigBirdModel
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention

from methods import Problem, block_mask
from methods.bigbird import BigBird, draw_blocks
from methods.blockwise import blockwise
from tests.methods.dense import CPU, assert_lists_equal, attention, dense_mask

HEADS, DIM = 2, 16


def problem(seq_len: int, causal: bool = True, heads: int = HEADS, batch: int = 1) -> Problem:
    return Problem(
        batch=batch, q_heads=heads, seq_len=seq_len, head_dim=DIM, dtype="float64", causal=causal
    )


def run(
    method: BigBird, qkv: list[Tensor], p: Problem, state: Tensor | None = None, block: int = 128
) -> Tensor:
    layout = method.layout(*qkv, p, state, (block, block))
    return blockwise(layout.q, layout.k, layout.v, layout.block_mask, layout.score_mod)[0]


def operands(p: Problem, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (p.batch, p.q_heads, p.seq_len, DIM)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


# transformers


@pytest.fixture(autouse=True)
def numpy_state() -> Iterator[None]:
    """The reference seeds numpy's global generator."""
    state = np.random.get_state()
    yield
    np.random.set_state(state)


def reference_module(block: int, n_random: int, longest: int) -> BigBirdBlockSparseAttention:
    torch.manual_seed(block)
    config = BigBirdConfig(
        block_size=block, num_random_blocks=n_random, hidden_size=HEADS * DIM,
        num_attention_heads=HEADS, max_position_embeddings=longest,
    )  # fmt: skip
    module = BigBirdBlockSparseAttention(config, seed=3).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # attention far from uniform
    return module


def reference_blocks(module: BigBirdBlockSparseAttention, seq_len: int) -> Tensor:
    """The random blocks of the module's next forward, -1 in the rows that have none."""
    block, n_random = module.block_size, module.num_random_blocks
    rows = seq_len // block - 2
    if not module.training:
        return torch.zeros(HEADS, rows + 2, n_random, dtype=torch.long)
    np.random.seed(module.seed)
    if seq_len in (1024, 3072, 4096):
        longest = module.max_seqlen
        plan = [
            module._bigbird_block_rand_mask(longest, longest, block, block, n_random, 1024)[:rows]
            for _ in range(HEADS)
        ]
    else:
        to, counts = module._get_rand_attn_plan(seq_len, block, n_random)
        plan = module._bigbird_block_rand_mask_with_head(
            seq_len, seq_len, block, block, HEADS, to, counts
        )
    drawn = torch.as_tensor(np.stack(plan)).long()
    return torch.nn.functional.pad(drawn, (0, 0, 1, 1), value=-1)


@torch.no_grad()
def reference(module: BigBirdBlockSparseAttention, x: Tensor, valid: Tensor) -> Tensor:
    blocked, band, rows, columns = BigBirdModel.create_masks_for_block_sparse_attn(
        valid.double(), module.block_size
    )
    out, _ = module(x, band, rows, columns, from_blocked_mask=blocked, to_blocked_mask=blocked)
    return out.view(*x.shape[:2], HEADS, DIM).transpose(1, 2)


@torch.no_grad()
def projections(module: BigBirdBlockSparseAttention, x: Tensor) -> list[Tensor]:
    layers = (module.query, module.key, module.value)
    return [layer(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for layer in layers]


@pytest.mark.parametrize(
    ("seq_len", "block", "n_random", "longest", "training"),
    [
        (256, 16, 3, 4096, True),
        (768, 16, 3, 4096, True),
        (512, 32, 2, 4096, True),
        (512, 16, 3, 4096, True),
        (768, 32, 3, 4096, True),
        (1024, 64, 3, 4096, True),
        (1024, 64, 3, 1024, True),
        (2048, 64, 3, 4096, True),
        (3072, 64, 3, 4096, True),
        (4096, 64, 3, 4096, True),
        (256, 16, 3, 4096, False),
        (1024, 64, 3, 4096, False),
    ],
)
def test_equals_transformers(
    seq_len: int, block: int, n_random: int, longest: int, training: bool
) -> None:
    p = problem(seq_len, causal=False, batch=2 if seq_len < 1024 else 1)
    module = reference_module(block, n_random, longest).train(training)
    x = torch.randn(p.batch, seq_len, HEADS * DIM).double()
    drawn = reference_blocks(module, seq_len)
    expected = reference(module, x, torch.ones(p.batch, seq_len))
    qkv = projections(module, x)
    method = BigBird(block, n_random, multiplicity=True)
    actual = run(method, qkv, p, method.drawn_blocks(drawn, p))
    assert (actual - expected).abs().max() < 1e-12
    # Its own draw is another pattern: what was injected matters.
    assert (run(method, qkv, p) - expected).abs().max() > 1e-3


def test_listings_count_where_blocks_repeat() -> None:
    """Without multiplicity every key counts once, and the reference, in eval mode, differs."""
    p, module = problem(256, causal=False), reference_module(16, 3, 4096).eval()
    x = torch.randn(1, 256, HEADS * DIM).double()
    method = BigBird(16)
    state = method.drawn_blocks(reference_blocks(module, 256), p)
    qkv = projections(module, x)
    once = run(method, qkv, p, state)
    assert (once - reference(module, x, torch.ones(1, 256))).abs().max() > 1e-2
    bias = torch.zeros(1, HEADS, 256, 256, dtype=torch.float64)
    bias = bias.masked_fill(~dense_mask(method, p, state), -torch.inf)
    assert (once - attention(*qkv, bias)).abs().max() < 1e-12


def test_a_ragged_last_block_is_padding() -> None:
    """The reference pads to whole blocks; its masked keys weigh exp(-10000) = 0."""
    p, padded = problem(250, causal=False), torch.arange(256) < 250
    module = reference_module(16, 3, 4096).train()
    x = torch.randn(1, 256, HEADS * DIM).double()
    drawn = reference_blocks(module, 256)
    expected = reference(module, x, padded[None])[:, :, :250]
    method = BigBird(16, multiplicity=True)
    qkv = [y[:, :, :250] for y in projections(module, x)]
    actual = run(method, qkv, p, method.drawn_blocks(drawn, p), block=32)
    assert (actual - expected).abs().max() < 1e-12


# the draw


@pytest.mark.parametrize("causal", [True, False])
def test_draws_are_legal_and_distinct(causal: bool) -> None:
    for n_blocks, n_random in ((12, 3), (13, 8), (40, 5)):
        drawn = draw_blocks(4, n_blocks, n_random, 1, causal)
        for head, row in product(range(4), range(1, n_blocks - 1)):
            near = range(row - 1, n_blocks) if causal else (row - 1, row, row + 1)
            free = set(range(1, n_blocks - 1)) - set(near)
            blocks = [x for x in drawn[head, row].tolist() if x >= 0]
            assert len(blocks) == len(set(blocks)) == min(n_random, len(free))
            assert set(blocks) <= free


@pytest.mark.parametrize("causal", [True, False])
def test_draws_are_uniform(causal: bool) -> None:
    """Every set of two blocks comes up about equally often, over many heads."""
    drawn = draw_blocks(20_000, 9, 2, 5, causal)[:, 6].sort(-1).values
    _, counts = drawn.unique(dim=0, return_counts=True)
    # Free for row 6: 1..4, six pairs, in both cases; the counts deviate by 53 on average.
    assert len(counts) == 6
    assert (counts - 20_000 / 6).abs().max() < 300


def test_draws_follow_the_seed_and_differ_by_head() -> None:
    first, again = draw_blocks(4, 64, 3, 7, False), draw_blocks(4, 64, 3, 7, False).clone()
    assert torch.equal(first, again)
    assert not torch.equal(first, draw_blocks(4, 64, 3, 8, False))
    assert not torch.equal(first[0], first[1])


def test_causal_draws_do_not_depend_on_length() -> None:
    long = draw_blocks(4, 50, 3, 0, True)
    for n_blocks in (3, 17, 49):
        assert torch.equal(draw_blocks(4, n_blocks, 3, 0, True), long[:, :n_blocks])


# the predicate, block lists and counts


def listings(method: BigBird, p: Problem, drawn: list[int], a: int, c: int) -> int:
    """How often row block a lists column block c, as the reference lists."""
    last = method.n_blocks(p) - 1
    if p.causal and c > a:
        return 0
    if (a == last and method.last_row_dense) or (a in (0, last) and not p.causal):
        return 1
    if p.causal:
        return (c in (0, a - 1, a)) + drawn.count(c)
    return (c in (0, last, a - 1, a, a + 1)) + drawn.count(c)


def test_given_blocks_are_read_by_the_call_they_are_given_to() -> None:
    """Which of them count follows from its causality, not from that of the problem they had."""
    drawn = torch.randint(0, 16, (HEADS, 16, 3), generator=torch.Generator().manual_seed(0))
    method = BigBird(16)
    for causal in (True, False):
        p, masks = problem(256, causal), []
        for made_for in (p, replace(p, causal=not causal)):
            masks.append(dense_mask(method, p, method.drawn_blocks(drawn, made_for)))
        assert torch.equal(*masks)
        assert not causal or not masks[0].triu(1).any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("given", [False, True])
def test_mask_and_scores_are_the_predicate(causal: bool, given: bool) -> None:
    for n, block in ((24, 3), (26, 3), (40, 4), (9, 1)):
        p = problem(n, causal)
        method = BigBird(block, 2, multiplicity=True, last_row_dense=n == 26)
        n_blocks = method.n_blocks(p)
        state = None
        drawn = draw_blocks(HEADS, n_blocks, 2, 0, causal)
        if given:  # repeats, hits of the window, and rows without
            generator = torch.Generator().manual_seed(n)
            drawn = torch.randint(-1, n_blocks, (HEADS, n_blocks, 4), generator=generator)
            state = method.drawn_blocks(drawn, p)
        bias = method.rows(p, CPU, torch.arange(n).expand(HEADS, -1), state)
        assert torch.equal(bias[0] > -torch.inf, dense_mask(method, p, state)[0])
        for h, i, j in product(range(HEADS), range(n), range(n)):
            count = listings(method, p, drawn[h, i // block].tolist(), i // block, j // block)
            count *= j <= i or not causal
            assert bias[0, h, i, j].exp() == pytest.approx(count), (n, h, i, j)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("n", "block"), [(300, 16), (320, 64), (450, 48), (700, 20)])
def test_attention_over_several_kernel_blocks_is_the_predicate(
    n: int, block: int, causal: bool
) -> None:
    """The listings of every pair of blocks by loops, spread over tokens: mask, bias and lists."""
    p, method = problem(n, causal), BigBird(block, 2 if causal else 0, multiplicity=True)
    n_blocks = method.n_blocks(p)
    generator = torch.Generator().manual_seed(n)
    given = torch.randint(-1, n_blocks, (HEADS, n_blocks, 3), generator=generator)
    place = torch.arange(n) // block
    for drawn, state in (
        (draw_blocks(HEADS, n_blocks, method.n_random, 0, causal), None),
        (given, method.drawn_blocks(given, p)),
    ):
        counts = torch.zeros(HEADS, n_blocks, n_blocks)
        for h, a, c in product(range(HEADS), range(n_blocks), range(n_blocks)):
            counts[h, a, c] = listings(method, p, drawn[h, a].tolist(), a, c)
        counts = counts[:, place[:, None], place]
        counts = counts.tril() if causal else counts
        assert torch.equal(dense_mask(method, p, state)[0], counts > 0)
        bias, inputs = counts.double().log()[None], operands(p)
        found = run(method, inputs, p, state)
        assert (found - attention(*inputs, bias)).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("block", [16, 48, 64])
@pytest.mark.parametrize("seed", [0, 1])
def test_lists_and_pairs(block: int, causal: bool, seed: int) -> None:
    sizes = [(16, 16), (16, 64), (64, 32), (48, 96), (100, 30), (128, 128)]
    for n, n_random in ((640, 3), (517, 2), (70, 0)):
        p = problem(n, causal)
        method = BigBird(block, n_random, seed, last_row_dense=seed == 1)
        assert method.allowed_pairs(p) == int(dense_mask(method, p).sum())
        for block_size in sizes:
            assert_lists_equal(method, p, block_size)


@pytest.mark.parametrize("causal", [True, False])
def test_lists_and_pairs_of_given_blocks(causal: bool) -> None:
    p, method = problem(325, causal), BigBird(16)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-1, 21, (HEADS, 21, 5), generator=generator)
    state = method.drawn_blocks(drawn, p)
    assert method.allowed_pairs(p, state) == int(dense_mask(method, p, state).sum())
    for block_size in ((16, 16), (32, 64), (50, 24)):
        assert_lists_equal(method, p, block_size, state)


@pytest.mark.parametrize(("n_blocks", "n_random"), [(64, 3), (16, 3), (32, 0), (20, 7)])
def test_known_counts(n_blocks: int, n_random: int) -> None:
    b, r, nb = 64, n_random, n_blocks
    p, method = problem(b * nb, causal=False, heads=1), BigBird(b, r)
    blocks = 2 * nb + 2 * (4 + r) + (nb - 4) * (5 + r)
    assert method.allowed_pairs(p) == blocks * b * b
    mask = block_mask(method, p, CPU, (b, b))
    assert (int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())) == (0, blocks)
    causal = replace(p, causal=True)
    method = replace(method, last_row_dense=True)
    full = 2 * (nb - 2) - 1 + r * (nb - 4 - r) + r * (r + 1) // 2 + nb - 1
    assert method.allowed_pairs(causal) == full * b * b + nb * b * (b + 1) // 2
    mask = block_mask(method, causal, CPU, (b, b))
    assert (int(mask.kv_num_blocks.sum()), int(mask.full_kv_num_blocks.sum())) == (nb, full)


def test_golden_counts() -> None:
    assert BigBird().allowed_pairs(problem(4096, causal=False, heads=1)) == 2_547_712


# numbers


@pytest.mark.parametrize("multiplicity", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_causality(multiplicity: bool, given: bool) -> None:
    """Of drawn blocks, and of given ones that repeat each other and lie in the future too."""
    p, cut = problem(300), 170
    method = BigBird(16, multiplicity=multiplicity, last_row_dense=given)
    state = None
    if given:
        blocks = torch.randint(
            0, 19, (p.q_heads, 19, 3), generator=torch.Generator().manual_seed(0)
        )
        state = method.drawn_blocks(blocks.repeat(1, 1, 2), p)
    first, second = operands(p), operands(p, 1)
    tails = zip(first, second, strict=True)
    changed = [torch.cat((x[:, :, :cut], y[:, :, cut:]), 2) for x, y in tails]
    before, after = run(method, first, p, state), run(method, changed, p, state)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


@pytest.mark.parametrize("causal", [True, False])
def test_blocks_equal_dense_attention_and_its_gradients(causal: bool) -> None:
    p, method = problem(220, causal), BigBird(16, multiplicity=True)
    drawn = torch.randint(-1, 14, (HEADS, 14, 4), generator=torch.Generator().manual_seed(1))
    state = method.drawn_blocks(drawn, p)
    inputs = [x.requires_grad_() for x in operands(p)]
    bias = method.rows(p, CPU, torch.arange(220).expand(HEADS, -1), state)
    actual, expected = run(method, inputs, p, state, block=32), attention(*inputs, bias)
    assert (actual - expected).abs().max() < 1e-12
    weights = torch.randn(actual.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (actual, expected))
    for mine, reference_gradient in zip(*gradients, strict=True):
        assert (mine - reference_gradient).abs().max() < 1e-12
