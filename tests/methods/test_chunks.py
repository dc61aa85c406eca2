"""Tokens in the order of their buckets, and the blocks that kernels visit there."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters

from methods import chunks, compiled, reformer
from methods.attend import executor, plan
from methods.blocks import computed_pairs
from methods.blockwise import blockwise
from methods.chunks import Chunks, stable_order
from methods.reformer import Reformer
from tests.methods.dense import CPU, assert_lists_equal, listed
from tests.methods.test_reformer import BATCH, HEADS, operands, problem, run


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_every_round_is_sorted_by_bucket_then_position(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, together: bool
) -> None:
    """Buckets of any size and sign; those of one round mean nothing to the next."""
    p, method = problem(50), Reformer(chunk=10, n_rounds=3)
    ordered = partial(stable_order, together=together)  # as on the other kind of device
    monkeypatch.setattr(
        reformer, "stable_order", lambda buckets, together, count: ordered(buckets, count=count)
    )
    generator, most = torch.Generator().manual_seed(4), min(torch.iinfo(dtype).max, 2**31 - 1)
    drawn = torch.tensor([-most - 1, -7, 0, 3, most])
    buckets = drawn[torch.randint(5, (BATCH, HEADS, 3, 50), generator=generator)].to(dtype)
    state = method.rounds(buckets, p)
    near = replace(method, within_buckets=True)
    x, v = operands(p)
    plain = near.rounds(torch.searchsorted(drawn.unique(), buckets.long()), p)
    assert near.allowed_pairs(p, state) == near.allowed_pairs(p, plain)
    torch.testing.assert_close(run(near, x, v, p, state), run(near, x, v, p, plain))
    for line in itertools.product(range(BATCH), range(HEADS), range(3)):
        given, order = buckets[line].tolist(), state.order[line].tolist()
        assert order == sorted(range(50), key=lambda token, given=given: (given[token], token))
        assert state.slot[line][order].tolist() == list(range(50))


@pytest.mark.parametrize("block_size", [(8, 8), (16, 16), (32, 32), (64, 64), (32, 16), (16, 64)])
@pytest.mark.parametrize("mode", ["exact", "transformers"])
def test_lists_are_those_of_near_chunks(mode: str, block_size: tuple[int, int]) -> None:
    """Blocks of half a chunk to four chunks, and ragged ones."""
    for (before, after), rounds, n in itertools.product(
        ((1, 0), (2, 0), (1, 1), (0, 0)), (1, 3), (48, 96, 112, 160)
    ):
        method = Reformer(
            chunk=16, n_rounds=rounds, before=before, after=after, mode=mode, n_buckets=2
        )
        both_ways = problem(n, causal=False)
        dataless = replace(method, n_rounds=1) if mode == "exact" else method
        chunks = Chunks(dataless)
        assert_lists_equal(chunks, chunks.problem(both_ways), block_size)
        static = dataless.blocks(both_ways, CPU, block_size)
        # Where the data say which pairs take part, the same blocks are visited, none as full:
        # the past, and what an earlier round lists.
        p = chunks.problem(problem(n))
        for asked in (problem(n), *([both_ways] if method != dataless else [])):
            mine = method.blocks(asked, CPU, block_size)
            for side in ("kv", "q"):
                visited = listed(static, side, p) | listed(static, f"full_{side}", p)
                assert torch.equal(listed(mine, side, p), visited)
                assert not listed(mine, f"full_{side}", p).any()


def test_blocks_do_not_depend_on_the_data() -> None:
    p = problem(128)
    method = Reformer(chunk=16, n_rounds=2)
    masks = []
    for seed in range(2):
        x, v = operands(p, seed)
        state = method.prepare(x, x, p)
        masks.append(method.layout(x, x, v, p, state, (32, 32)).block_mask)
    first, second = masks
    assert first.kv_indices is second.kv_indices and first.q_indices is second.q_indices
    assert first.mask_mod is not second.mask_mod
    as_seen = replace(p, q_heads=2 * HEADS, kv_heads=2 * HEADS)
    assert computed_pairs(first, as_seen) == 2 * HEADS * (1 + 2 * 3) * 32 * 32


def test_compiled_flex_sees_the_same_slots_and_compiles_once() -> None:
    """The rounds before they are merged: that takes the log-sum-exp, which a CPU's lacks."""
    method = Reformer(chunk=16, n_rounds=2, n_buckets=4, within_buckets=True)
    p = problem(100, dtype="float32")
    compiled = executor("flex", p)
    counters.clear()
    for seed in range(3):
        x, v = (t.detach() for t in operands(p, seed))
        layout = method.layout(x, x, v, p, method.prepare(x, x, p))
        expected, _ = blockwise(layout.q, layout.k, layout.v, layout.block_mask, layout.score_mod)
        out, _ = compiled(layout._replace(needs_lse=False))
        torch.testing.assert_close(out, expected, atol=5e-6, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_rounds_on_flex_with_lse_are_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced as for a kernel that gives the log-sum-exp; run without one, a CPU having none."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend="eager", **how))
    method = Reformer(chunk=16, n_rounds=3)
    p = problem(96, dtype="float32")
    traced = plan(method, p, "flex")
    counters.clear()
    for seed in range(10):
        x, v = (t.detach() for t in operands(p, seed))
        expected = run(method, x, v, p, method.prepare(x, x, p))
        torch.testing.assert_close(traced(x, x, v)[0], expected, atol=5e-6, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1


def test_every_layout_of_a_tensor_is_compiled_by_itself() -> None:
    """One compiled function holds eight variants; the ninth would be an error."""
    wide = torch.randn(2, 3, 8, 64)
    views = [wide[..., :x] for x in range(9, 64, 6)] + [wide.transpose(1, 2), wide.double()]
    kinds = {compiled._kind(x) for x in (*views, wide, wide.clone().requires_grad_())}
    assert len(kinds) == len(views) + 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.uint32, torch.int64])
@pytest.mark.parametrize("count", [None, 7, 1 << 15, (1 << 31) - 1])
def test_lines_sorted_at_once_are_sorted_each(dtype: torch.dtype, count: int | None) -> None:
    generator = torch.Generator().manual_seed(1)
    most = min(count or 1 << 32, torch.iinfo(dtype).max)
    buckets = torch.randint(most, (2, 3, 40), generator=generator)
    buckets[..., ::7] = most - 1
    expected = buckets.argsort(dim=-1, stable=True)
    found = stable_order(buckets.to(dtype), together=True, count=count)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_lines_of_any_32_bits_are_sorted_together(dtype: torch.dtype) -> None:
    """The ends of int32 side by side, in neighbouring lines."""
    ends = torch.tensor([-(1 << 31), -(1 << 31) + 1, -1, 0, 1, (1 << 31) - 2, (1 << 31) - 1])
    draw = torch.randint(7, (2, 3, 40), generator=torch.Generator().manual_seed(2))
    buckets = ends[draw].to(dtype)
    found = stable_order(buckets, together=True)
    assert torch.equal(found, draw.argsort(dim=-1, stable=True))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("mode", ["exact", "transformers"])
def test_what_a_gpu_compiles_is_what_a_cpu_runs(
    monkeypatch: pytest.MonkeyPatch, mode: str, rounds: int
) -> None:
    """Each helper is one graph; no kernel is generated here."""
    method, p = Reformer(chunk=16, n_rounds=rounds, mode=mode, n_buckets=4), problem(96)
    traced: list[str] = []

    def as_traced(function: Callable, *given: object) -> object:
        traced.append(function.__name__)
        return torch.compile(function, backend="aot_eager", fullgraph=True)(*given)

    found = []
    for run_by in (chunks.fused, as_traced):
        monkeypatch.setattr(chunks, "fused", run_by)
        monkeypatch.setattr(reformer, "fused", run_by)
        x, v = operands(p)
        out = run(method, x, v, p, method.prepare(x, x, p))
        found.append((out, *torch.autograd.grad(out, (x, v), torch.cos(out.detach()))))
    for plain, other in zip(*found, strict=True):
        torch.testing.assert_close(other, plain, atol=1e-12, rtol=0)
    keys = "_of_length_root_d" if mode == "transformers" else "_of_length_1"
    assert set(traced) == {"nearest", keys, "_spread", "_gathered", "_merged", "_unmerged"}
