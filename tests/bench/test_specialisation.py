import dataclasses
import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from bench.masks import mask_grid
from bench.paper import SPECIALISATION
from bench.specialisation import (
    ENTROPY_TOLERANCE,
    MASKS,
    RECIPE,
    SIGMA_TOLERANCE,
    divergence,
    measure,
    specialisation,
    uniform,
    untrained,
)
from methods import METHODS


@pytest.fixture(scope="module")
def lines():
    return list(specialisation())


def chosen(lines, method, weights):
    return [x for x in lines if (x.method, x.weights) == (method, weights)]


@pytest.mark.parametrize(
    "name, method", [("Standard", "standard"), ("SPAttention", "spattention_released")]
)
def test_each_of_five_seeds_comes_near_the_papers_figures(lines, name, method):
    assert (ENTROPY_TOLERANCE, SIGMA_TOLERANCE) == (3e-4, 6e-4)
    theirs, ours = SPECIALISATION[name], chosen(lines, method, "untrained")
    for seed in range(5):
        layers = [x for x in ours if x.seed == seed]
        assert [x.layer for x in layers] == [1, 2, 3, 4]
        found = sum(x.entropy for x in layers) / 4
        assert found == pytest.approx(theirs.entropy, abs=ENTROPY_TOLERANCE)
        for x in layers:
            assert theirs.sigma_low - SIGMA_TOLERANCE <= x.sigma
            assert x.sigma <= theirs.sigma_high + SIGMA_TOLERANCE


def test_uniform_attention_has_the_same_sigma_without_any_weights(lines):
    (dense,), (released,), (own,) = (chosen(lines, name, "uniform") for name in MASKS)
    assert dense.entropy == pytest.approx(sum(map(math.log, range(1, 257))) / 256, abs=1e-5)
    assert dense.sigma == pytest.approx(0, abs=1e-9)
    assert released.sigma == pytest.approx(0.18474, abs=1e-5)
    counted = [3.378, 3.921, 3.850, 3.765, 3.681, 3.596, 3.511, 3.427]
    assert released.by_head == pytest.approx(counted, abs=6e-4)
    assert own.bound == pytest.approx(math.log(256 / 8))
    assert own.empty == pytest.approx(7 / 16)
    # 3.15, where the rows without a key do not count
    assert own.entropy == pytest.approx(3.154, abs=1e-3)


def test_the_other_measures_are_zero_for_uniform_attention_under_any_mask():
    p = dataclasses.replace(RECIPE, batch=1, seq_len=96)
    for name, method in METHODS.items():
        if name in ("bigbird", "reformer"):
            continue  # too short for its blocks, or not given by the mask alone
        allowed = torch.from_numpy(mask_grid(method, p))
        found = measure(uniform(allowed), allowed, method=name, weights="uniform")
        assert found.normalised == pytest.approx(1, abs=1e-6), name
        assert found.excess == pytest.approx(0, abs=1e-6), name
        assert found.divergence in (None, pytest.approx(0, abs=1e-6)), name


def test_divergence_tells_heads_that_differ_from_heads_that_do_not():
    allowed = torch.ones(2, 4, 4, dtype=torch.bool).tril()
    one_hot = torch.zeros(1, 2, 4, 4)
    one_hot[:, 0, :, 0] = 1  # the first head looks at the first token, the second at itself
    one_hot[:, 1] = torch.eye(4)
    assert divergence(one_hot, allowed) == pytest.approx(1)  # one bit: supports are disjoint
    assert divergence(one_hot[:, :1].expand(1, 2, 4, 4), allowed) == pytest.approx(0)
    apart = torch.stack([torch.eye(4) > 0, ~torch.eye(4, dtype=torch.bool)])
    assert divergence(one_hot, apart) is None


def test_measures_of_attention_that_was_worked_out_by_hand():
    allowed = torch.ones(2, 2, 2, dtype=torch.bool).tril()
    attention = torch.tensor([[[[1, 0], [0.5, 0.5]], [[1, 0], [0.25, 0.75]]]])
    found = measure(attention, allowed, method="m", weights="w")
    half, quarter = math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert found.by_head == pytest.approx([half / 2, quarter / 2], abs=1e-5)
    assert found.entropy == pytest.approx((half + quarter) / 4)
    assert found.sigma == pytest.approx((half - quarter) / 4)
    assert found.normalised == pytest.approx((1 + quarter / half) / 2)
    assert found.excess == pytest.approx((1 - quarter / half) / 2)


def test_rows_without_a_key_are_zero_and_do_not_count(lines):
    for x in chosen(lines, "spattention", "untrained"):
        assert math.isfinite(x.entropy) and 0 < x.entropy < x.bound
        assert x.divergence is None


def test_the_stack_is_attention():
    """Its first layer's output, by torch's own attention."""
    allowed = torch.from_numpy(mask_grid(METHODS["spattention_released"], RECIPE))
    random = torch.Generator().manual_seed(3)
    width = RECIPE.q_heads * RECIPE.head_dim
    x = torch.randn(RECIPE.batch, RECIPE.seq_len, width, generator=random)
    q, k, v = (
        (x @ drawn[:-1] + drawn[-1]).unflatten(-1, (8, 64)).transpose(1, 2)
        for drawn in (
            (torch.rand(width + 1, width, generator=random) * 2 - 1) / width**0.5 for _ in range(3)
        )
    )
    attention = next(untrained(allowed, RECIPE, 1, seed=3))
    expected = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
    torch.testing.assert_close(attention @ v, expected, atol=1e-5, rtol=1e-5)
