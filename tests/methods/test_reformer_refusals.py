"""What Reformer refuses, in one line each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from methods import METHODS, Problem, attend
from methods.chunks import Rounds
from methods.reformer import Reformer
from tests.methods.dense import CPU, dense_mask
from tests.methods.test_reformer import operands, problem, run


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"n_buckets": 7}, "n_buckets is 7; it must be an even number"),
        ({"n_buckets": 0}, "n_buckets is 0"),
        ({"n_buckets": (4, 3)}, "n_buckets is (4, 3)"),
        ({"n_buckets": ()}, "n_buckets is ()"),
        ({"n_rounds": 0}, "n_rounds is 0; it must be a whole number, 1 to 1024"),
        ({"n_rounds": 1 << 62}, "1 to 1024"),
        ({"chunk": 0}, "chunk is 0"),
        ({"chunk": 16.0}, "chunk is 16.0"),
        ({"seed": -1}, "seed is -1"),
        ({"before": -1}, "before is -1"),
        ({"within_buckets": 1}, "within_buckets is 1"),
        ({"mode": "trax"}, "one of exact, transformers, reformer_pytorch"),
    ],
)
def test_bad_parameters(parameters: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Reformer(**parameters)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Reformer(chunk=128), "chunk is 128; there are only 100 tokens"),
        (Reformer(chunk=16, mode="transformers"), "100 tokens are no multiple of chunk 16"),
        (Reformer(chunk=50, n_rounds=1, after=1, mode="transformers"), "ring of 2 chunks"),
        (Reformer(chunk=20, mode="reformer_pytorch"), "N / chunk is 5; give an even n_buckets"),
        (Reformer(chunk=50, n_buckets=(2,) * 31), "multiply to 2147483648; they must stay below"),
    ],
)
def test_parameters_that_do_not_fit(method: Reformer, message: str) -> None:
    with pytest.raises(ValueError) as error:
        method.validate(problem(100))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_bad_tensors() -> None:
    p = problem(100)
    x, v = operands(p)
    method = METHODS["reformer"]
    with pytest.raises(ValueError, match=r"reformer shares queries and keys; k must be the tens"):
        attend(x, x.clone(), v, method)
    with pytest.raises(ValueError, match=r"3 query and 1 key heads"):
        method.validate(replace(p, kv_heads=1))
    with pytest.raises(ValueError, match=r"they must be \[2, 3, 4, 100\]"):
        method.rounds(torch.zeros(2, 3, 1, 100, dtype=torch.long), p)
    with pytest.raises(ValueError, match=r"buckets are torch.float32; they must be integers"):
        method.rounds(torch.zeros(2, 3, 4, 100), p)
    short = Reformer(chunk=16)
    with pytest.raises(ValueError, match=r"buckets is torch.int64 \[2, 3, 2, 100\]; it must be "):
        attend(x, x, v, short, state=replace(short, n_rounds=2).prepare(x, x, p))
    with pytest.raises(
        ValueError, match=r"^reformer: the state is a \w+; rounds\(buckets\) makes"
    ):
        attend(x, x, v, short, state=x)
    with pytest.raises(
        ValueError, match=r"^reformer: the state is a \w+; rounds\(buckets\) makes"
    ):
        method.mask_mod(p, CPU)
    single = [t.detach().float() for t in (x, v)]
    with pytest.raises(ValueError, match=r"no log-sum-exp, which reformer needs"):
        attend(single[0], single[0], single[1], Reformer(chunk=16), backend="flex")


def test_more_buckets_than_tokens_fill_are_refused():
    p = Problem(seq_len=512)
    Reformer(n_buckets=1024, chunk=64).validate(p)
    with pytest.raises(ValueError, match="n_buckets has 1026 in one rotation; 512 tokens fill"):
        Reformer(n_buckets=(2, 1026), chunk=64).validate(p)


@pytest.mark.parametrize("edge", [-(1 << 31), (1 << 31) - 1])
def test_buckets_are_of_32_bits(edge: int) -> None:
    """Up to both ends they are told apart; one further and two would be one."""
    p, method = problem(64, causal=False), Reformer(chunk=16, n_rounds=2, within_buckets=True)
    x, v = (t.detach() for t in operands(p))
    plain = torch.randint(3, (2, 3, 2, 64), generator=torch.Generator().manual_seed(0))
    state = method.rounds(plain, p)
    there = edge - 2 + plain if edge > 0 else edge + plain
    far = method.rounds(there, p)
    assert torch.equal(dense_mask(method, p, far), dense_mask(method, p, state))
    assert torch.equal(run(method, x, v, p, far), run(method, x, v, p, state))
    with pytest.raises(ValueError, match=r"^reformer: buckets are -?\d+ to -?\d+; .* int32$"):
        method.rounds(there + (1 if edge > 0 else -1), p)


def test_buckets_without_a_sign_are_of_32_bits_too() -> None:
    p, method = problem(64), Reformer(chunk=16, n_rounds=2)
    for dtype in (torch.uint32, torch.uint64):
        buckets = torch.full((2, 3, 2, 64), -5).to(dtype)
        with pytest.raises(ValueError, match="they must fit in int32"):
            method.rounds(buckets, p)


BAD_ROUNDS = {
    "of None": (lambda x: Rounds(None, None, None), "buckets is a NoneType; it must be"),
    "of floats": (
        lambda x: replace(x, order=x.order.double()),
        "order is torch.float64 [2, 3, 2, 64]; it must be torch.int64 [2, 3, 2, 64]",
    ),
    "shorter": (
        lambda x: replace(x, slot=x.slot[..., :32]),
        "slot is torch.int64 [2, 3, 2, 32]; it must be torch.int64 [2, 3, 2, 64]",
    ),
}


@pytest.mark.parametrize("case", BAD_ROUNDS)
def test_a_state_made_by_hand(case: str) -> None:
    change, message = BAD_ROUNDS[case]
    p, method = problem(64), Reformer(chunk=16, n_rounds=2)
    x, v = operands(p)
    with pytest.raises(ValueError) as error:
        attend(x, x, v, method, state=change(method.prepare(x, x, p)))
    assert str(error.value).startswith(f"reformer: the state's {message}")
    assert "\n" not in str(error.value)
