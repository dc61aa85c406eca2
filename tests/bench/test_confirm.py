"""What was timed follows its inputs, or has no number; whatever the gate saw of it."""

import functools
from dataclasses import replace
from math import inf

import pytest
import torch

from bench import measure
from bench.backends import BACKENDS
from bench.cells import Cell, Group, rows_of
from bench.confirm import TOLERANCE, change, copies, relative_error
from bench.measure import Clockwork, Machine, measure_group
from bench.record import environment
from bench.sampling import Series
from methods import Problem
from methods.reformer import Reformer

GROUP = Group(
    problem=Problem(seq_len=200, q_heads=4, kv_heads=2, head_dim=16, dtype="float32"),
    block_size=(64, 32), cells=(Cell("spattention", "blockwise"), Cell("standard", "sdpa-flash")),
    phases=("fwd", "bwd", "fwd_bwd"), device="cpu", seed=3, rounds=2, seconds=0.0, run="test",
)  # fmt: skip
ENVIRONMENT = environment(torch.device("cpu"))


def statuses(group=GROUP):
    """Of the first cell, by phase; the others are sound."""
    rows = measure_group(group, Machine(ENVIRONMENT), lambda cell: None, Clockwork()).rows
    first, *others = rows.values()
    assert {row.status for cell in others for row in cell} <= {"ok"}
    for row in first:
        assert (row.status == "ok") == bool(row.samples)
    return {row.phase: (row.status, row.reason) for row in first}


def wrap(monkeypatch, make):
    """blockwise becomes make(what it was)."""
    backend = BACKENDS["blockwise"]
    build = lambda *cell: make(backend.build(*cell))  # noqa: E731
    monkeypatch.setitem(BACKENDS, "blockwise", replace(backend, build=build))


def by_identity(attention):
    """Keeps results for the tensors that they are of."""
    kept = {}

    def run(q, k, v):
        key = (q.data_ptr(), k.data_ptr(), v.data_ptr(), torch.is_grad_enabled())
        if key not in kept:
            kept[key] = (q, k, v), attention(q, k, v)  # the tensors, so that none takes the place
        return kept[key][1]

    return run


def test_a_result_that_is_kept_for_its_tensors_has_no_number(monkeypatch):
    wrap(monkeypatch, by_identity)
    found = statuses(replace(GROUP, phases=("fwd",)))
    status, reason = found["fwd"]
    assert status == "mismatch" and "does not follow its inputs" in reason


def test_buckets_that_are_kept_for_a_tensor_have_no_number(monkeypatch):
    kept = functools.lru_cache(Reformer.prepare)
    monkeypatch.setattr(Reformer, "prepare", lambda self, q, k, p: kept(self, q, k, p))
    p = replace(GROUP.problem, kv_heads=4)
    cells = (Cell("reformer:chunk=64,n_rounds=2", "blockwise"), GROUP.cells[1])
    found = statuses(replace(GROUP, problem=p, cells=cells, phases=("fwd", "fwd_bwd")))
    assert {status for status, _ in found.values()} == {"mismatch"}


def test_what_follows_its_inputs_keeps_its_numbers():
    p = replace(GROUP.problem, kv_heads=4, dtype="bfloat16")
    cells = (Cell("reformer:chunk=64,n_rounds=2", "blockwise"), GROUP.cells[1])
    phases = (*GROUP.phases, "prepare")
    found = statuses(replace(GROUP, problem=p, cells=cells[:1], phases=phases))
    assert set(found) == set(phases) and {status for status, _ in found.values()} == {"ok"}


class FirstTime(torch.autograd.Function):
    """A gradient that a second backward on one graph does not get."""

    @staticmethod
    def forward(ctx, x):
        ctx.done = False
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        factor, ctx.done = 0.0 if ctx.done else 1.0, True
        return factor * grad


@pytest.mark.parametrize(("phases", "status"), [(("fwd_bwd",), "ok"), (("bwd",), "mismatch")])
def test_every_backward_on_a_graph_counts(monkeypatch, phases, status):
    wrap(monkeypatch, lambda attention: lambda q, k, v: attention(FirstTime.apply(q), k, v))
    found = statuses(replace(GROUP, phases=phases))
    assert {found[phase][0] for phase in phases} == {status}


class Spoils(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad.mul_(3) / 3


def test_a_backward_that_changes_its_cotangent_spoils_no_other_cell(monkeypatch):
    def make(attention):
        def run(q, k, v):
            out, lse = attention(q, k, v)
            return Spoils.apply(out), lse

        return run

    wrap(monkeypatch, make)
    found = statuses(replace(GROUP, phases=("fwd_bwd",)))
    assert found["fwd_bwd"] == ("mismatch", "the call changes what it is given")


def test_what_finds_no_memory_for_it_runs_alone(monkeypatch):
    original = measure.Bench._confirm

    def short(self, prepared, phases):
        if prepared.cell == GROUP.cells[0] and len(self.group.cells) == 2:
            raise MemoryError("the others hold it")
        return original(self, prepared, phases)

    monkeypatch.setattr(measure.Bench, "_confirm", short)
    found = measure_group(GROUP, Machine(ENVIRONMENT), lambda cell: None, Clockwork())
    assert found.alone == [GROUP.cells[0]] and list(found.rows) == [GROUP.cells[1]]
    assert {row.status for row in found.rows[GROUP.cells[1]]} == {"ok"}


@pytest.mark.parametrize(
    ("result", "status"), [(1.001, "ok"), (1.5, "mismatch"), (inf, "mismatch")]
)
def test_a_graph_that_gives_other_results_has_no_number(result, status):
    """By every clock, and in no other phase."""
    device = torch.device("cpu")
    cell, group = GROUP.cells[1], replace(GROUP, cells=GROUP.cells[1:])
    bench = measure.Bench(group, device, Clockwork())
    prepared = bench.prepare(cell)
    for phase in ("fwd", "fwd_bwd"):
        for clock in ("device", "host"):
            prepared.series[phase, clock] = Series([(0, 10.0)])
    last = prepared.timed["fwd"]

    def graph():
        number, (out, lse) = last()
        return number, (result * out, lse)

    prepared.timed["fwd"] = graph
    assert bench.confirm([prepared], lambda cell: None) == []
    rows = rows_of(replace(group, device="cuda:0"), ENVIRONMENT, prepared, None)
    told = {(row.phase, row.clock): (row.status, bool(row.median_us)) for row in rows}
    for clock in ("device", "host"):
        assert told["fwd", clock] == (status, status == "ok")
        assert told["fwd_bwd", clock] == ("ok", True)


def test_a_lost_block_of_one_head_is_seen_however_many_there_are():
    torch.manual_seed(0)
    whole = torch.randn(1, 32, 4096, 8)
    lost = whole.clone()
    lost[0, 7, -8:] = 0
    assert (whole - lost).norm() / whole.norm() < TOLERANCE
    assert relative_error((lost,), (whole,)) > 0.1


def test_error_between_results():
    x = torch.randn(2, 3, 200, 4)
    hidden = x.clone()
    hidden[0, 0, 0] = -torch.inf
    assert relative_error((x, None), (x, None)) == 0
    assert relative_error((1.1 * x,), (x,)) == pytest.approx(0.1)
    assert relative_error((hidden,), (hidden,)) == 0
    assert relative_error((hidden,), (x,)) == inf
    lse = torch.randn(2, 3, 200)
    off = lse.clone()
    off[1, 2, 150:] += 1
    assert relative_error((lse,), (lse,)) == 0 < TOLERANCE < relative_error((off,), (lse,))
    zeros = torch.zeros(1, 2, 256, 4)
    assert relative_error((zeros,), (zeros,)) == 0
    # Rows without a key may have a rounding error where others have values.
    some = torch.cat((zeros, x[:1, :2].repeat(1, 1, 2, 1)[:, :, :256]), 2)
    assert relative_error((some + 1e-5,), (some,)) < TOLERANCE


def test_values_change_under_a_graph_of_autograd_and_what_is_shared_stays_so():
    x = torch.arange(8.0).view(1, 1, 2, 4).requires_grad_()
    y = (x * x).sum()
    change([x])  # by a place and a token; every third token is half as long
    assert x.tolist() == [[[[3.5, 2, 2.5, 3], [3, 0, 1, 2]]]]
    y.backward()
    assert torch.equal(x.grad, 2 * x.detach())
    q = torch.randn(1, 1, 6, 8, dtype=torch.bfloat16)
    scores = q @ q.mT
    change([q])
    assert not torch.allclose(q @ q.mT, scores)  # of one tensor that is queries and keys, too
    q, k, v = copies((x, x, torch.ones(2)))
    assert q is k and q is not x and torch.equal(q, x) and q.requires_grad
    assert not v.requires_grad
