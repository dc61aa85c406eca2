"""What BigBird refuses, in one line each, and what it takes for block numbers."""

from __future__ import annotations

import pytest
import torch

from methods.bigbird import BigBird
from tests.methods.dense import dense_mask
from tests.methods.test_bigbird import HEADS, problem


@pytest.mark.parametrize(
    "parameters",
    [{"multiplicity": "no"}, {"last_row_dense": 1}, {"seed": 1 << 64}, {"seed": 1.0}],
)
def test_parameters_of_another_type_are_refused(parameters: dict[str, object]) -> None:
    (name,) = parameters
    with pytest.raises(ValueError, match=f"bigbird: {name} is "):
        BigBird(**parameters)


@pytest.mark.parametrize(
    "parameters", [{"block": 0}, {"block": 64.0}, {"n_random": -1}, {"seed": -1}, {"seed": None}]
)
def test_bad_parameters(parameters: dict[str, object]) -> None:
    with pytest.raises(
        ValueError, match=r"bigbird: \w+ is .*; it must be a whole number"
    ) as error:
        BigBird(**parameters)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("causal", [True, False])
def test_more_random_blocks_than_exist(causal: bool) -> None:
    free = 13 if causal else 11
    BigBird(64, free).validate(problem(1000, causal))
    with pytest.raises(ValueError, match=f"n_random is {free + 1}; 1000 .* leave {free} outside"):
        BigBird(64, free + 1).validate(problem(1000, causal))
    with pytest.raises(ValueError, match="leave 0 outside"):
        BigBird(64, 1).validate(problem(64, causal))


@pytest.mark.parametrize(
    ("shape", "value", "message"),
    [
        ((2, 4, 3), 4, "random blocks are 4 to 4; they must be -1 .none. to 3"),
        ((2, 4, 3), -2, "random blocks are -2"),
        ((2, 3, 3), 0, r"shape \[2, 3, 3\]; they must be whole numbers of shape \[2, 4, any\]"),
        ((1, 4, 3), 0, r"shape \[1, 4, 3\]"),
        ((4, 3), 0, r"shape \[4, 3\]"),
    ],
)
def test_bad_blocks(shape: tuple[int, ...], value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BigBird().drawn_blocks(torch.full(shape, value), problem(256))
    for blocks, kind in (
        (torch.zeros(2, 4, 3), "torch.float32 of"),
        (torch.zeros(2, 4, 3, dtype=torch.bool), "torch.bool of"),
        ([[[1]]], "a list;"),
        (None, "a NoneType;"),
    ):
        with pytest.raises(ValueError, match=f"^bigbird: random blocks are {kind} .* whole num"):
            BigBird().drawn_blocks(blocks, problem(256))


def test_blocks_of_any_integers() -> None:
    p, method = problem(256), BigBird(16, 2)
    drawn = torch.randint(0, 16, (HEADS, 16, 3), generator=torch.Generator().manual_seed(0))
    expected = dense_mask(method, p, method.drawn_blocks(drawn, p))
    for dtype in (torch.int8, torch.uint8, torch.int32):
        state = method.drawn_blocks(drawn.to(dtype), p)
        assert torch.equal(dense_mask(method, p, state), expected)
        assert method.allowed_pairs(p, state) == int(expected.sum())
