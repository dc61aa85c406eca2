"""What a caller gives a method, through the compiled kernels: forward and gradients."""

import pytest
import torch

from methods import Problem, attend
from methods.bigbird import BigBird
from methods.longformer import Longformer

pytestmark = pytest.mark.gpu

N, HEADS, BATCH = 1000, 4, 2
# float32 products of the kernels are float32's; sums of a thousand terms stay far below this.
TOLERANCE = 2e-5


def tensors(count):
    generator = torch.Generator("cuda").manual_seed(count)
    return [
        torch.randn(BATCH, HEADS, N, 64, generator=generator, device="cuda", requires_grad=True)
        for _ in range(count)
    ]


def error(got, expected):
    got, expected = got.detach().double(), expected.detach()
    return float((got - expected).norm() / expected.norm())


def check(method, causal, own=0, **given):
    """attend on flex against attend on blockwise in float64: out and all gradients."""
    single = tensors(3 + own)
    double = [x.detach().double().requires_grad_() for x in single]
    cotangent = torch.randn(BATCH, HEADS, N, 64, device="cuda")
    found = []
    for inputs, backend in ((single, "flex"), (double, "blockwise")):
        if own:
            given["global_qkv"] = tuple(inputs[3:])
        out = attend(*inputs[:3], method, causal=causal, backend=backend, **given)
        grads = torch.autograd.grad(out, inputs, cotangent.to(out.dtype))
        found.append((out, *grads))
    assert max(error(got, want) for got, want in zip(*found, strict=True)) < TOLERANCE


def scattered():
    chosen = torch.zeros(BATCH, N, dtype=torch.bool, device="cuda")
    chosen[0, [3, 400, 999]] = True
    chosen[1, 128:256] = True
    return chosen


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("own", [0, 3])
def test_global_tokens_and_their_projections(causal, own):
    check(Longformer(window=64), causal, own, global_tokens=scattered())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dilation", [3, (1, 2, 1, 8)])
def test_dilation(causal, dilation):
    check(Longformer(window=64, n_global=2, dilation=dilation), causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("multiplicity", [True, False])
def test_random_blocks_given_twice(causal, multiplicity):
    method = BigBird(block=64, multiplicity=multiplicity)
    p = Problem(batch=BATCH, q_heads=HEADS, seq_len=N, causal=causal)
    blocks = torch.randint(0, 16, (HEADS, 16, 2), device="cuda").repeat(1, 1, 2)
    check(method, causal, state=method.drawn_blocks(blocks, p))
