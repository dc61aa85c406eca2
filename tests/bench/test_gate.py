"""What the gate sees of wrong kernels, and of methods that see the future."""

from dataclasses import replace

import pytest
import torch

from bench.backends import BACKENDS
from bench.cells import Cell
from bench.gate import Gate
from methods import Problem
from tests.bench.test_measure import GROUP, run


def spoil(monkeypatch, change):
    """What blockwise returns becomes change(out)."""
    backend = BACKENDS["blockwise"]

    def build(*cell):
        attention = backend.build(*cell)

        def run(q, k, v):
            out, lse = attention(q, k, v)
            return change(out), lse

        return run

    monkeypatch.setitem(BACKENDS, "blockwise", replace(backend, build=build))


def positions(out):
    return torch.arange(out.shape[2])[:, None]


def test_a_wrong_backend_gets_no_number(monkeypatch):
    spoil(monkeypatch, lambda out: torch.where(positions(out) == 64, 1.05 * out, out))
    rows = run()
    for row in rows[Cell("spattention", "blockwise")]:
        assert (row.status, row.median_us, row.samples) == ("mismatch", None, [])
        assert row.error_budget > 1
        assert row.reason
    assert {row.status for row in rows[Cell("standard", "sdpa-flash")]} == {"ok", "unsupported"}


def test_the_kernel_without_gradients_is_gated_too(monkeypatch):
    """A backend may run another kernel there, and that is the one that fwd times."""
    spoil(monkeypatch, lambda out: out if torch.is_grad_enabled() else 1.1 * out)
    for row in run()[GROUP.cells[0]]:
        assert (row.status, row.samples) == ("mismatch", [])
        assert row.error_budget > 1


def test_what_is_kept_of_earlier_inputs_is_wrong(monkeypatch):
    """Buckets of the first call, say: a gate that gave the same inputs again would not see it."""
    backend = BACKENDS["blockwise"]

    def build(*cell):
        attention, kept = backend.build(*cell), []

        def run(q, k, v):
            kept.append(k.detach())
            return attention(q, k + (kept[0] - k.detach()), v)

        return run

    monkeypatch.setitem(BACKENDS, "blockwise", replace(backend, build=build))
    for row in run(replace(GROUP, phases=("fwd", "fwd_bwd")))[GROUP.cells[0]]:
        assert (row.status, row.samples) == ("mismatch", [])


def test_a_call_that_changes_its_inputs_gets_no_number(monkeypatch):
    backend = BACKENDS["blockwise"]

    def build(*cell):
        attention = backend.build(*cell)

        def run(q, k, v):
            answer = attention(q, k, v)
            with torch.no_grad():
                k.mul_(1.01)
            return answer

        return run

    monkeypatch.setitem(BACKENDS, "blockwise", replace(backend, build=build))
    found = run(replace(GROUP, phases=("fwd",)))
    for row in found[GROUP.cells[0]]:
        assert (row.status, row.reason) == ("mismatch", "the call changes what it is given")
    assert {row.status for row in found[Cell("standard", "sdpa-flash")]} == {"ok"}


@pytest.mark.parametrize("n", [200, 131_072, 1 << 20])
def test_every_block_of_rows_has_one_that_the_gate_looks_at(n):
    p = Problem(seq_len=n, q_heads=2, head_dim=16, dtype="float32")
    rows = Gate(p, (128, 128), torch.Generator(), 0).rows
    for head in rows:
        assert (head // 128).unique().equal(torch.arange(-(-n // 128)))


def test_blocks_larger_than_the_gates_hide_no_fault(monkeypatch):
    """One row in 64 is seen although the kernel's blocks hold 1024 rows."""
    spoil(monkeypatch, lambda out: torch.where(positions(out) % 64 == 17, 1.5 * out, out))
    p = Problem(seq_len=1024, q_heads=8, head_dim=16, dtype="float32")
    group = replace(GROUP, problem=p, block_size=(1024, 128), cells=GROUP.cells[:1])
    (row,) = run(replace(group, phases=("fwd",)))[GROUP.cells[0]]
    assert row.status == "mismatch"


AHEAD = """
from dataclasses import dataclass
from methods import Method

@dataclass(frozen=True)
class Ahead(Method):
    name, paper = "ahead", "none"

    def mask_mod(self, p, device, state=None):
        return lambda b, h, q, k: abs(q - k) < 8

METHOD = Ahead()
"""


def test_a_mask_that_sees_the_future_is_refused_where_the_problem_is_causal(tmp_path):
    path = tmp_path / "ahead.py"
    path.write_text(AHEAD)
    cell = Cell(f"{path}:METHOD", "blockwise")
    group = replace(GROUP, cells=(cell,), phases=("fwd",))
    (row,) = run(group)[cell]
    assert (row.status, row.samples) == ("mismatch", [])
    assert "after the query" in row.reason
    both_ways = replace(group, problem=replace(group.problem, causal=False))
    assert run(both_ways)[cell][0].status == "ok"


def test_memory_is_poisoned_before_the_gate(monkeypatch):
    """An output that nobody writes must not pass because memory happened to hold it."""

    def unwritten(out):
        return torch.where(positions(out) == out.shape[2] - 1, torch.empty_like(out), out)

    spoil(monkeypatch, unwritten)
    (row,) = run(replace(GROUP, cells=GROUP.cells[:1], phases=("fwd",)))[GROUP.cells[0]]
    assert row.status == "mismatch"
