"""Longformer's dilated heads in residue order: the same numbers, and fewer blocks."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch

from methods.blocks import computed_pairs
from methods.longformer import Longformer
from methods.residue import ResidueOrder
from tests.methods.dense import assert_lists_equal, attention, both_masks, dense_mask
from tests.methods.test_longformer import (
    BLOCK_SIZES,
    HEADS,
    full_bias,
    operands,
    problem,
    run_blocks,
)


@pytest.mark.parametrize("causal", [True, False])
def test_residue_order_lists(causal: bool) -> None:
    drawn = random.Random(0)
    cases = [(256, Longformer(8, 0, 4))]  # residue classes of whole blocks
    for n in (100, 256, 301):
        dilation = tuple(drawn.randint(1, 6) for _ in range(HEADS))
        method = Longformer(2 * drawn.randint(1, 8), drawn.randint(0, 20), dilation)
        cases.append((n, method))
    for (n, method), block_size in product(cases, BLOCK_SIZES):
        p = problem(n, causal)
        assert_lists_equal(ResidueOrder(method), p, block_size)
        assert ResidueOrder(method).allowed_pairs(p) == int(dense_mask(method, p).sum())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dilation", [4, (1, 2, 4, 3)])
def test_residue_order_changes_no_number(dilation: int | tuple[int, ...], causal: bool) -> None:
    method = Longformer(64, 6, dilation)
    p = replace(problem(330, causal, heads=4, batch=2), kv_heads=2)
    inputs = [x.requires_grad_() for x in operands(p)]
    layout = method.layout(*inputs, p, block_size=(16, 16))
    assert layout.restore is not None, "token order was kept"
    actual = layout.restore(*run_blocks(layout))
    expected = attention(*inputs, full_bias(method, p))
    assert (actual - expected).abs().max() < 1e-12
    weights = torch.randn(actual.shape, dtype=torch.float64)
    gradients = (torch.autograd.grad((x * weights).sum(), inputs) for x in (actual, expected))
    for mine, reference_gradient in zip(*gradients, strict=True):
        assert (mine - reference_gradient).abs().max() < 1e-12


def test_residue_order_only_where_it_saves_blocks() -> None:
    p = problem(1024)
    touched = {}
    for window, dilation in ((64, 1), (8, 2), (256, 3)):
        method = Longformer(window, 4, dilation)
        layout = method.layout(*operands(p), p)
        mask, _ = both_masks(method, p, (128, 128))
        in_layout, in_place = (computed_pairs(x, p) for x in (layout.block_mask, mask))
        assert in_layout < in_place if layout.restore else in_layout == in_place
        touched[window, dilation] = layout.restore is not None
    assert touched == {(64, 1): False, (8, 2): False, (256, 3): True}
