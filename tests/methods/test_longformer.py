"""Longformer against transformers, loops over pairs, and dense softmax."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import LongformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

import methods.longformer as longformer_module
from methods import Layout, Problem, attend
from methods.blockwise import blockwise
from methods.longformer import GlobalTokens, Longformer, _GlobalRows, attend_globals
from methods.pinned import Pinned, Spans
from methods.standard import Standard
from tests.methods.dense import (
    CPU,
    assert_lists_equal,
    attend_layout,
    attention,
    both_masks,
    dense_mask,
    listed,
)

HEADS, DIM = 3, 16


def problem(seq_len: int, causal: bool = True, heads: int = HEADS, batch: int = 1) -> Problem:
    return Problem(
        batch=batch, q_heads=heads, seq_len=seq_len, head_dim=DIM, dtype="float64", causal=causal
    )


def operands(p: Problem, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((p.batch, heads, p.seq_len, DIM) for heads in (p.q_heads, p.kv_heads, p.kv_heads))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def run_blocks(layout: Layout) -> tuple[Tensor, Tensor]:
    return blockwise(layout.q, layout.k, layout.v, layout.block_mask, layout.score_mod)


def some_tokens(p: Problem, share: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(p.batch, p.seq_len, generator=generator) < share


def full_bias(method: Longformer, p: Problem, state: object = None) -> Tensor:
    every_row = torch.arange(p.seq_len).expand(p.q_heads, -1)
    return method.rows(p, CPU, every_row, state)


# transformers


def reference_module(window: int) -> LongformerSelfAttention:
    torch.manual_seed(window)
    config = LongformerConfig(
        attention_window=[window], num_hidden_layers=1, hidden_size=HEADS * DIM,
        num_attention_heads=HEADS, attention_probs_dropout_prob=0,
    )  # fmt: skip
    module = LongformerSelfAttention(config, layer_id=0).eval().double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.12)  # attention far from uniform
    return module


@torch.no_grad()
def reference(module: LongformerSelfAttention, x: Tensor, tokens: Tensor, pad: Tensor) -> Tensor:
    mask = tokens.double() * 1e4 - pad.double() * 1e4
    out = module(
        x, attention_mask=mask, is_index_masked=mask < 0, is_index_global_attn=mask > 0,
        is_global_attn=bool(tokens.any()),
    )  # fmt: skip
    return out[0].view(*x.shape[:2], HEADS, DIM).transpose(1, 2)


@torch.no_grad()
def projections(module: LongformerSelfAttention, x: Tensor, suffix: str = "") -> list[Tensor]:
    layers = (getattr(module, name + suffix) for name in ("query", "key", "value"))
    return [layer(x).view(*x.shape[:2], HEADS, DIM).transpose(1, 2) for layer in layers]


@pytest.mark.parametrize("kind", ["local", "prefix", "scattered", "uneven"])
@pytest.mark.parametrize(("window", "seq_len"), [(8, 64), (32, 256), (64, 192), (128, 512)])
def test_equals_transformers(window: int, seq_len: int, kind: str) -> None:
    p = problem(seq_len, causal=False, batch=2)
    tokens = torch.zeros(2, seq_len, dtype=torch.bool)
    if kind == "prefix":
        tokens[:, :5] = True
    elif kind == "scattered":
        tokens = some_tokens(p, 0.05)
    elif kind == "uneven":  # one sample without any
        tokens[0, seq_len // 2 : seq_len // 2 + 9] = True
    module, x = reference_module(window), torch.randn(2, seq_len, HEADS * DIM).double()
    expected = reference(module, x, tokens, torch.zeros_like(tokens))
    method = Longformer(window=window, n_global=5 if kind == "prefix" else 0)
    q, k, v = projections(module, x)
    own = tuple(projections(module, x, "_global"))
    given = None if kind in ("local", "prefix") else tokens
    actual = attend_globals(method, q, k, v, p, run_blocks, given, own, block_size=(32, 32))
    assert (actual - expected).abs().max() < 1e-6
    shared = attend_globals(method, q, k, v, p, run_blocks, given)
    rows = tokens[:, None, :, None]
    assert ((shared - expected) * ~rows).abs().max() < 1e-6
    assert kind == "local" or ((shared - expected) * rows).abs().max() > 1e-2


@pytest.mark.parametrize(("window", "seq_len"), [(8, 64), (32, 256)])
@pytest.mark.parametrize("share", [0.0, 0.06])
def test_equals_transformers_with_padding(window: int, seq_len: int, share: float) -> None:
    p = problem(seq_len, causal=False, batch=2)
    pad = torch.arange(seq_len) >= torch.tensor([[seq_len - 11], [seq_len // 2 + 3]])
    tokens = some_tokens(p, share) & ~pad
    module, x = reference_module(window), torch.randn(2, seq_len, HEADS * DIM).double()
    expected = reference(module, x, tokens, pad)
    own = tuple(projections(module, x, "_global"))
    actual = attend_globals(
        Longformer(window=window), *projections(module, x), p,
        lambda layout: attend_layout(layout, ~pad), tokens, own,
    )  # fmt: skip
    assert (actual.masked_fill(pad[:, None, :, None], 0) - expected).abs().max() < 1e-6


def test_padding_of_the_suite_is_that_of_transformers() -> None:
    """By the spans of samples, as models call it; the projections of globals are tied to it."""
    p = problem(256, causal=False, batch=2)
    lengths = torch.tensor([245, 131], dtype=torch.int32)
    pad = torch.arange(256) >= lengths[:, None]
    module, x = reference_module(32), torch.randn(2, 256, HEADS * DIM).double()
    for name in ("query", "key", "value"):
        getattr(module, f"{name}_global").load_state_dict(getattr(module, name).state_dict())
    tokens = some_tokens(p, 0.06) & ~pad
    state = Spans(torch.zeros_like(lengths), lengths, GlobalTokens(tokens))
    method = Pinned(Longformer(window=32))
    actual = attend(*projections(module, x), method, causal=False, state=state)
    expected = reference(module, x, tokens, pad)
    assert (actual.masked_fill(pad[:, None, :, None], 0) - expected).abs().max() < 1e-6


def test_tied_projections_need_one_call() -> None:
    p = problem(96, causal=False, batch=2)
    module, x = reference_module(16), torch.randn(2, 96, HEADS * DIM).double()
    for name in ("query", "key", "value"):
        layer = getattr(module, name)
        getattr(module, f"{name}_global").load_state_dict(layer.state_dict())
    tokens = some_tokens(p, 0.1)
    expected = reference(module, x, tokens, torch.zeros_like(tokens))
    method = Longformer(window=16)
    layout = method.layout(*projections(module, x), p, method.globals_state(tokens, p))
    assert (run_blocks(layout)[0] - expected).abs().max() < 1e-6


# the predicate


def allowed(method: Longformer, p: Problem, h: int, i: int, j: int, chosen: set[int]) -> bool:
    step = method.dilation[h] if isinstance(method.dilation, tuple) else method.dilation
    in_window = (i - j) % step == 0 and abs(i - j) // step <= method.window // 2
    return (in_window or i in chosen or j in chosen) and (j <= i or not p.causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "method",
    [
        Longformer(window=2, n_global=0),
        Longformer(window=6, n_global=2),
        Longformer(window=8, n_global=1, dilation=3),
        Longformer(window=4, n_global=3, dilation=(1, 2, 5)),
    ],
)
def test_mask_is_the_predicate(method: Longformer, causal: bool) -> None:
    for n in (3, 4, 13, 26):
        p = problem(n, causal)
        tokens = some_tokens(p, 0.2, seed=n)
        sets = (
            (None, set(range(method.n_global))),
            (tokens, set(tokens[0].nonzero()[:, 0].tolist())),
        )
        for given, chosen in sets:
            state = None if given is None else method.globals_state(given, p)
            mask = dense_mask(method, p, state)[0]
            for h, i, j in product(range(HEADS), range(n), range(n)):
                assert mask[h, i, j] == allowed(method, p, h, i, j, chosen), (n, h, i, j, given)


# block lists and counts

BLOCK_SIZES = [(16, 16), (16, 64), (64, 32), (128, 128)]
DILATIONS = [1, 4, (1, 2, 3)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dilation", DILATIONS)
def test_lists_and_pairs(dilation: int | tuple[int, ...], causal: bool) -> None:
    for n, window, n_global in ((256, 32, 16), (300, 64, 0), (385, 20, 40), (33, 2, 33)):
        method, p = Longformer(window, n_global, dilation), problem(n, causal)
        assert method.allowed_pairs(p) == int(dense_mask(method, p).sum())
        for block_size in BLOCK_SIZES:
            assert_lists_equal(method, p, block_size)


def global_sets(p: Problem) -> list[Tensor]:
    run = torch.zeros(p.batch, p.seq_len, dtype=torch.bool)
    run[0, 40:170] = True
    return [some_tokens(p, 0.02), some_tokens(p, 0.8), run, torch.ones_like(run)]


@pytest.mark.parametrize("causal", [True, False])
def test_lists_and_pairs_of_sets(causal: bool) -> None:
    for n, window in ((256, 32), (301, 100)):
        p, method = problem(n, causal, heads=2, batch=2), Longformer(window)
        for tokens, block_size in product(global_sets(p), BLOCK_SIZES):
            state = method.globals_state(tokens, p)
            assert method.allowed_pairs(p, state) == int(dense_mask(method, p, state)[0].sum())
            assert_lists_equal(method, p, block_size, state)


@pytest.mark.parametrize("causal", [True, False])
def test_lists_of_sets_are_safe_where_not_exact(causal: bool) -> None:
    """Dilated or with rows apart: touched blocks hold all pairs, full blocks hold nothing else."""
    p = problem(260, causal, heads=2, batch=2)
    for dilation, apart, block_size in product((1, 3), (True, False), BLOCK_SIZES):
        method = Longformer(32, dilation=dilation)
        for tokens in global_sets(p):
            state = replace(method.globals_state(tokens, p), apart=apart)
            masks = both_masks(method, p, block_size, state)
            for side in ("kv", "q"):
                full, true_full = (listed(x, f"full_{side}", p) for x in masks)
                touched, needed = (
                    listed(x, side, p) | listed(x, f"full_{side}", p) for x in masks
                )
                assert not (full & ~true_full).any()
                assert not (needed & ~touched).any()
                assert (apart and dilation > 1) or torch.equal(needed, touched)
            if not apart:
                assert method.allowed_pairs(p, state) == int(dense_mask(method, p, state)[0].sum())


@pytest.mark.parametrize("causal", [True, False])
def test_lists_of_global_rows(causal: bool) -> None:
    """Of the second call: rows of global tokens come first, sorted, and see all keys."""
    p = problem(260, causal, heads=2, batch=2)
    for tokens, block_size in product(global_sets(p), BLOCK_SIZES):
        order = (~tokens).byte().argsort(dim=1, stable=True)
        state = (order.int(), tokens.sum(1, dtype=torch.int32))
        assert_lists_equal(_GlobalRows(), p, block_size, state)


def test_static_parts_of_a_prefix_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dilated or with projections of their own: later calls evaluate no grid and count nothing."""
    for method, own in ((Longformer(32, dilation=4), 0), (Longformer(32, 4), 3)):
        q, k, v, *others = (torch.randn(1, HEADS, 256, DIM) for _ in range(3 + own))
        given = {"global_qkv": tuple(others)} if own else {}
        first = attend(q, k, v, method, **given)
        monkeypatch.setattr(longformer_module, "computed_pairs", pytest.fail)
        monkeypatch.setattr(Longformer, "grid", pytest.fail)
        assert torch.equal(attend(q, k, v, method, **given), first)
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("seq_len", "one_sided", "n_global", "causal", "pairs", "partial", "full"),
    [
        (1024, 256, 16, True, 242_424, 19, 7),
        (4096, 256, 16, True, 1_081_080, 91, 31),
        (4096, 256, 1, False, 2_043_134, 118, 94),
        (1000, 250, 16, True, 231_489, 25, 1),
        (1000, 128, 3, False, 245_708, 27, 7),
    ],
)
def test_known_counts(
    seq_len: int, one_sided: int, n_global: int, causal: bool, pairs: int, partial: int, full: int
) -> None:
    method, p = Longformer(2 * one_sided, n_global), problem(seq_len, causal, heads=1)
    assert method.allowed_pairs(p) == pairs
    mask, _ = both_masks(method, p, (128, 128))
    assert int(mask.kv_num_blocks.sum()) == partial
    assert int(mask.full_kv_num_blocks.sum()) == full


# numbers


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_causality(given: bool, own: bool) -> None:
    p, method, cut = problem(200, batch=2), Longformer(16, 4, dilation=(1, 2, 3)), 120
    tokens = some_tokens(p, 0.05) if given else None
    first, second = [*operands(p), *operands(p, 1)], [*operands(p, 2), *operands(p, 3)]
    tails = zip(first, second, strict=True)
    changed = [torch.cat((x[:, :, :cut], y[:, :, cut:]), 2) for x, y in tails]

    def run(x: list[Tensor]) -> Tensor:
        own_qkv = tuple(x[3:]) if own else None
        return attend_globals(method, *x[:3], p, run_blocks, tokens, own_qkv, (32, 32))

    before, after = run(first), run(changed)
    assert torch.equal(before[:, :, :cut], after[:, :, :cut])
    assert not torch.equal(before[:, :, cut:], after[:, :, cut:])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("share", [0.05, 0.7])
def test_two_calls_equal_dense_attention_and_its_gradients(share: float, causal: bool) -> None:
    p, method = problem(150, causal, batch=2), Longformer(20)
    tokens = some_tokens(p, share)
    inputs = [x.requires_grad_() for x in (*operands(p), *operands(p, 1))]
    q, k, v, *own = inputs
    weights = torch.randn(q.shape, dtype=torch.float64)
    actual = attend_globals(method, q, k, v, p, run_blocks, tokens, tuple(own), (16, 8))
    ordinary = attention(q, k, v, full_bias(method, p, method.globals_state(tokens, p)))
    dense = attention(*own, full_bias(Longformer(2, p.seq_len), p))
    expected = torch.where(tokens[:, None, :, None], dense, ordinary)
    assert (actual - expected).abs().max() < 1e-12
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (actual, expected))
    for mine, reference_gradient in zip(*gradients, strict=True):
        assert (mine - reference_gradient).abs().max() < 1e-12


# bad input


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"window": 31}, "window is 31; it must be an even"),
        ({"window": 0}, "window is 0"),
        ({"n_global": -1}, "n_global is -1"),
        ({"dilation": 0}, "dilation is 0"),
        ({"dilation": ()}, "dilation is ()"),
        ({"dilation": [1, 2]}, "dilation is [1, 2]"),
        ({"dilation": (1, True)}, "dilation is (1, True)"),
    ],
)
def test_bad_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Longformer(**parameters)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Longformer(n_global=101), "n_global is 101; there are only 100 tokens"),
        (Longformer(8, dilation=(1, 2)), "dilation has 2 entries for 3 heads"),
        (Longformer(20, dilation=10), "window 20 with dilation 10 reaches 100 tokens"),
        (Longformer(20, dilation=(1, 1, 11)), "dilation 11 reaches 110"),
    ],
)
def test_parameters_that_do_not_fit(method: Longformer, message: str) -> None:
    with pytest.raises(ValueError) as error:
        method.validate(problem(100))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parameters_at_the_limit_fit() -> None:
    """As many global tokens as there are, or a window wider than the sequence: dense."""
    p = problem(100)
    for method in (
        Longformer(window=20, n_global=100, dilation=(1, 1, 9)),
        Longformer(window=4096),
    ):
        method.validate(p)
        assert method.allowed_pairs(p) == Standard().allowed_pairs(p)


@pytest.mark.parametrize(
    "tokens",
    [
        torch.zeros(3, 100, dtype=torch.bool),
        torch.zeros(100, dtype=torch.bool),
        torch.zeros(2, 99, dtype=torch.bool),
        torch.zeros(2, 100),
    ],
)
def test_bad_global_tokens(tokens: Tensor) -> None:
    p = problem(100, batch=2)
    with pytest.raises(ValueError, match=r"must be torch\.bool \[2, 100\]"):
        attend_globals(Longformer(8), *operands(p), p, run_blocks, tokens)


def test_bad_global_projections() -> None:
    p = problem(100)
    q, k, v = operands(p)
    with pytest.raises(ValueError, match="must be those of q, k, v"):
        attend_globals(Longformer(8), q, k, v, p, run_blocks, None, (q, k, v[..., :8]))
