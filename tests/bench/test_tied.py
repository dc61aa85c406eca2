"""The reference of one tensor for queries and keys: its gradient is dQ + dK, in every block."""

import pytest
import torch

from bench.gate import tied
from bench.oracle import build_reference, cotangent, judge, sample_rows
from methods import Problem
from methods.reformer import Reformer

P = Problem(seq_len=200, q_heads=3, head_dim=16, dtype="float64", causal=False)
METHOD = Reformer(chunk=50, n_rounds=2, n_buckets=4)


def gradients():
    """Output, gradients of the one tensor by queries and by keys, of values; what judges them."""
    generator = torch.Generator().manual_seed(0)
    x, v = (torch.randn(1, 3, 200, 16, generator=generator).double() for _ in range(2))
    q, k, v = (t.requires_grad_() for t in (x, x.clone(), v))
    rows = sample_rows(P, 64, "cpu")
    state, cot = METHOD.prepare(x, x, P), cotangent(P, rows, "cpu")
    bias = METHOD.rows(P, x.device, torch.arange(200).expand(3, -1), state)
    out = ((q @ METHOD.keys(k).mT) / 4 + bias).softmax(-1) @ v
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), cot)
    given = METHOD, P, x, x, v.detach(), rows, cot

    def reference(block_size):
        return tied(build_reference(*given, state=state, block_size=block_size))

    return out.detach(), dq, dk, dv, reference


@pytest.mark.parametrize("block_size", [(64, 64), (64, 32), (32, 64)])
def test_the_sum_passes_and_nothing_less(block_size):
    out, dq, dk, dv, reference = gradients()
    reference = reference(block_size)
    found = judge(reference, out, None, (None, dq + dk, dv))
    assert found.passed and found.error_dq is None and found.error_dk > 0
    torch.testing.assert_close(reference.tensors["dk"].value, dq + dk, atol=1e-12, rtol=1e-10)
    for wrong in (dk, dq, dq + dk.roll(1, 2), (dq + dk) * (1 + 1e-11)):
        assert not judge(reference, out, None, (None, wrong, dv)).passed


@pytest.mark.parametrize("block_size", [(64, 64), (64, 32), (32, 64)])
def test_budgets_are_those_of_the_blocks_that_meet(block_size):
    reference = gradients()[-1](block_size)
    rows, keys = block_size
    dq, dk = (reference.tensors[name] for name in ("dq", "dk"))
    place = torch.arange(200)
    assert dk.budget.shape[2] == -(-200 // keys) and dq.budget.shape[2] == -(-200 // rows)
    for block in range(dk.budget.shape[2]):
        met = (place[place // keys == block] // rows).unique()
        assert (dk.budget[..., block] > dq.budget[..., met].sum(-1)).all()
