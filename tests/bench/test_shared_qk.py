"""Methods that share queries and keys: what the gate lets through, catches, and what is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import methods.chunks as chunks_module
import methods.reformer as reformer_module
from bench.backends import BACKENDS
from bench.cells import Cell, Group
from bench.derived import boards
from bench.measure import Clockwork, Machine, measure_group
from bench.oracle import Reference, Verdict, build_reference, cotangent, judge, sample_rows
from bench.record import PHASES, environment
from methods import Layout, Problem
from methods.blockwise import blockwise
from methods.chunks import merge
from methods.hashing import draw
from methods.reformer import Reformer

METHOD = Reformer(chunk=64, n_rounds=4)
P = Problem(seq_len=512, q_heads=4, head_dim=32, dtype="float32")
Inputs = tuple[Tensor, Tensor, Tensor]


def make_inputs(p: Problem) -> Inputs:
    """q and k are two leaves of the same values, so that dQ and dK are known apart."""
    generator = torch.Generator().manual_seed(0)
    shape = (p.batch, p.q_heads, p.seq_len, p.head_dim)
    x, v = (torch.randn(shape, generator=generator).to(p.torch_dtype) for _ in range(2))
    return tuple(t.requires_grad_() for t in (x, x.clone(), v))


def make_reference(method: Reformer, p: Problem, inputs: Inputs) -> tuple[Reference, Tensor]:
    rows = sample_rows(p, 128, "cpu")
    cot = cotangent(p, rows, "cpu")
    state = method.prepare(*inputs[:2], p)
    return build_reference(method, p, *inputs, rows, cot, state=state), cot


def verdict(
    method: Reformer, p: Problem, judged: tuple[Reference, Tensor], inputs: Inputs,
    spoil: Callable[[Layout], Layout] = lambda layout: layout,
) -> Verdict:  # fmt: skip
    """The gate's finding on plain PyTorch over the lists, of a layout that `spoil` alters."""
    layout = spoil(method.layout(*inputs, p, method.prepare(*inputs[:2], p)))
    out = layout.restore(
        *blockwise(layout.q, layout.k, layout.v, layout.block_mask, layout.score_mod)
    )
    reference, cot = judged
    return judge(reference, out, None, torch.autograd.grad(out, inputs, cot))


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("causal", [True, False])
def test_correct_runs_pass(dtype: str, causal: bool) -> None:
    for n, method in (
        (512, METHOD),
        (600, Reformer(chunk=128, n_rounds=8)),  # the last chunk and block are shorter
        (512, Reformer(chunk=64, n_rounds=1, within_buckets=True)),
        (512, Reformer(chunk=32, n_rounds=2, mode="transformers")),
    ):
        p = replace(P, batch=2, q_heads=2, kv_heads=2, seq_len=n, dtype=dtype, causal=causal)
        inputs = make_inputs(p)
        found = verdict(method, p, make_reference(method, p, inputs), inputs)
        assert found.error_budget < 0.8, found.reason
        assert found.error_dq > 0 and found.error_dk > 0


def test_the_reference_is_autograd_of_dense_float64() -> None:
    """Also dK, through the norm of the keys, and all keys of it."""
    p = replace(P, seq_len=200)
    inputs = make_inputs(p)
    state = METHOD.prepare(*inputs[:2], p)
    reference, cot = make_reference(METHOD, p, inputs)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs)
    bias = METHOD.rows(p, q.device, torch.arange(200).expand(4, -1), state)
    out = (q @ (k / k.norm(dim=-1, keepdim=True)).mT / 32**0.5 + bias).softmax(-1) @ v
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), cot.double())
    take = (slice(None), torch.arange(4)[:, None], reference.rows)
    expected = {"out": out[take].detach(), "dq": dq[take], "dk": dk, "dv": dv}
    for name, value in expected.items():
        found = reference.tensors[name].value
        torch.testing.assert_close(found, value, atol=1e-13, rtol=1e-11, msg=name)


# planted faults


def rounds_weighed(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rounds are merged by change(lse), [B, H R, N]."""
    monkeypatch.setattr(
        reformer_module, "merge", lambda out, lse, state: merge(out, change(lse), state)
    )


def last_round_lost(lse: Tensor) -> Tensor:
    by_round = lse.unflatten(1, (-1, METHOD.n_rounds))
    lost = torch.arange(METHOD.n_rounds)[:, None] == METHOD.n_rounds - 1
    return by_round.masked_fill(lost, -torch.inf).flatten(1, 2)


def no_look_back(layout: Layout) -> Layout:
    """Chunk 5 of every round sees itself alone."""
    mask = layout.block_mask
    whole = mask.mask_mod

    def altered(b: Tensor, h: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return whole(b, h, s, t) & ((s // 64 != 5) | (t // 64 == 5))

    mask.mask_mod = altered
    return layout


def with_keys(change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """What kernels get for keys; the reference has the right ones by then."""
    monkeypatch.setattr(Reformer, "keys", lambda self, k: change(k))


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "a round forgotten": lambda m: rounds_weighed(last_round_lost, m),
    "weights detached": lambda m: rounds_weighed(Tensor.detach, m),
    "weights equal": lambda m: rounds_weighed(torch.zeros_like, m),
    "no penalty of a token with itself": lambda m: m.setattr(chunks_module, "PENALTY", 0.0),
    "too small a penalty": lambda m: m.setattr(chunks_module, "PENALTY", 2.0),
    "look-back dropped": lambda m: no_look_back,
    "duplicates counted": lambda m: m.setattr(
        Reformer, "listed_before", lambda *_: lambda b, h, i, j, r: torch.zeros_like(i == j)
    ),
    "keys not normalised": lambda m: with_keys(lambda k: k, m),
    "norm detached": lambda m: with_keys(lambda k: k / k.detach().norm(dim=-1, keepdim=True), m),
    "keys without gradient": lambda m: with_keys(
        lambda k: F.normalize(k.detach(), dim=-1) + 0 * k, m
    ),
    "other buckets": lambda m: m.setattr(
        reformer_module, "draw", lambda *sizes: draw(*sizes).flip(0)
    ),
    "wrong way back": lambda m: m.setattr(
        reformer_module, "merge", lambda out, lse, state: merge(out, lse, state).roll(1, 2)
    ),
}


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def judged(request: Any) -> tuple[Problem, Inputs, tuple[Reference, Tensor]]:
    p = replace(P, dtype=request.param)
    inputs = make_inputs(p)
    return p, inputs, make_reference(METHOD, p, inputs)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(
    fault: str, judged: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    p, inputs, reference = judged
    spoil = FAULTS[fault](monkeypatch) or (lambda layout: layout)
    found = verdict(METHOD, p, reference, inputs, spoil)
    assert not found.passed
    assert found.error_budget > 10, found.reason


# the harness

GROUP = Group(
    problem=P, block_size=(128, 128),
    cells=(Cell("reformer:chunk=64,n_rounds=2", "blockwise"), Cell("reformer", "flex")),
    phases=PHASES, device="cpu", seed=0, rounds=2, seconds=0.0,
    run="test",
)  # fmt: skip


def test_cells_are_gated_counted_and_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed with k that is q; gated with two leaves, so that dQ and dK are judged apart."""
    backend, shared = BACKENDS["blockwise"], []

    def build(*cell: Any) -> Callable:
        attention = backend.build(*cell)

        def run(q: Tensor, k: Tensor, v: Tensor) -> tuple:
            if torch.is_grad_enabled():
                shared.append(k is q)
            return attention(q, k, v)

        return run

    monkeypatch.setitem(BACKENDS, "blockwise", replace(backend, build=build))
    env = environment(torch.device("cpu"))
    found = measure_group(GROUP, Machine(env), lambda cell: None, Clockwork()).rows
    rows = {row.phase: row for row in found[GROUP.cells[0]]}
    assert {row.status for row in rows.values()} == {"ok"}
    assert 0 < rows["prepare"].median_us < rows["fwd"].median_us
    (board,) = boards(rows.values())
    (cell,) = board.cells
    assert board.prepare_share(cell) == rows["prepare"].median_us / rows["fwd"].median_us
    assert rows["fwd_bwd"].error_dq > 0 and rows["fwd_bwd"].error_dk > 0
    # Two rounds of four heads; of four rows of blocks the first visits one, the others two.
    assert rows["fwd"].computed_pairs == 2 * 4 * 7 * 128**2
    assert 0 < rows["fwd"].allowed_pairs < 2 * 4 * 512 * 128
    reasons = {row.phase: row.reason for row in found[GROUP.cells[1]]}
    assert (
        reasons["fwd"] == "FlexAttention's CPU kernel gives no log-sum-exp, which reformer needs"
    )
    # One call is the gate's; before and after it come the first call and the samples.
    assert shared.count(False) == 1
    assert shared[0] and shared[-1] and len(shared) >= 5


def alike(state: Any) -> Any:
    return replace(state, buckets=state.buckets[:, :, :1].expand_as(state.buckets).contiguous())


WRONG_STATES = {
    "all in one bucket": lambda s: replace(s, buckets=s.buckets * 0),
    "odd tokens in one bucket": lambda s: replace(
        s, buckets=s.buckets * (torch.arange(s.buckets.shape[-1]) % 2 == 0)
    ),
    "all rounds alike": alike,
    "positions for buckets": lambda s: replace(s, buckets=s.slot),
    "not sorted": lambda s: replace(s, order=s.slot.sort().values, slot=s.slot.sort().values),
    "sorted backwards": lambda s: replace(s, order=s.order.flip(-1)),
    "another way back": lambda s: replace(s, slot=s.slot.roll(1, -1)),
}


@pytest.mark.parametrize("how", WRONG_STATES)
def test_a_wrong_hash_or_order_gets_no_number(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference takes the state as it is: it is held against buckets in float64."""
    prepare = Reformer.prepare
    cell = Cell("reformer:chunk=64", "blockwise")
    group = Group(
        problem=P, block_size=(64, 64), cells=(cell,), phases=("fwd",), device="cpu", seed=0,
        rounds=1, seconds=0.0, run="test",
    )  # fmt: skip
    machine = Machine(environment(torch.device("cpu")))
    (right,) = measure_group(group, machine, lambda cell: None, Clockwork()).rows[cell]
    assert right.status == "ok"
    monkeypatch.setattr(Reformer, "prepare", lambda *given: WRONG_STATES[how](prepare(*given)))
    (wrong,) = measure_group(group, machine, lambda cell: None, Clockwork()).rows[cell]
    assert (wrong.status, wrong.median_us) == ("mismatch", None)
    assert any(x in wrong.reason for x in ("other buckets", "the order of", "the inverse of"))


@pytest.mark.parametrize("seed", range(6))
def test_a_token_that_is_listed_twice_and_alone_keeps_its_gradient(seed: int) -> None:
    """On a ring a first chunk sees the last one of the round before: itself a second time."""
    method = Reformer(chunk=64, n_rounds=4, mode="transformers")
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 4, 448, 16)
    x, v, weights = (torch.randn(shape, generator=generator) for _ in range(3))
    p = Problem(batch=2, seq_len=448, q_heads=4, head_dim=16, dtype="float32")
    state, found = method.prepare(x, x, p), []
    for dtype in (torch.float32, torch.float64):
        own = [t.to(dtype).requires_grad_() for t in (x, v)]
        layout = method.layout(own[0], *own, replace(p, dtype=str(dtype)[6:]), state, (64, 64))
        out = layout.restore(
            *blockwise(layout.q, layout.k, layout.v, layout.block_mask, layout.score_mod)
        )
        found.append(torch.autograd.grad((out * weights.to(dtype)).sum(), own)[1])
    assert (found[0] - found[1]).abs().max() < 1e-4
