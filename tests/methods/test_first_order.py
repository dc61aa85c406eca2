"""What has no second derivative says so, whatever part of a graph lies around it."""

import pytest
import torch

from methods import attend
from methods.reformer import Reformer

METHODS_GIVEN = ["spattention", Reformer(chunk=16, n_rounds=1), Reformer(chunk=16, n_rounds=2)]


@pytest.mark.parametrize("method", METHODS_GIVEN, ids=["blockwise", "sort", "merge"])
def test_a_gradient_penalty_is_refused(method):
    """Reformer's keys have a second derivative; what they are sorted and merged by has none."""
    x, v = torch.randn(2, 1, 2, 64, 16, dtype=torch.float64).unbind()
    x.requires_grad_()
    out = attend(x, x, v, method, backend="blockwise")
    (plain,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    assert plain.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative: call backward without"):
        torch.autograd.grad(out.sum(), x, create_graph=True)
