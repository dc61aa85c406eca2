"""Planted faults through the compiled kernels of a CUDA device: the gate catches them."""

import pytest

from methods import Problem
from tests.faults import CLEAN, FAULTS, HIDDEN, on_cuda, verdicts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore"),  # torch's compiler speaks of itself
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_fault_above_rounding_is_caught(dtype):
    p = Problem(seq_len=8192, head_dim=64, dtype=dtype)
    found = dict(verdicts("spattention", p, "cuda:0", on_cuda()))
    assert found.keys() == {CLEAN, *FAULTS}
    caught = {fault for fault, verdict in found.items() if not verdict.passed}
    assert caught == set(FAULTS) - HIDDEN[dtype]
    assert found[CLEAN].error_budget < 0.9
