"""Methods of a user's own: keys and scores that they change, and what they must be."""

from __future__ import annotations

import dataclasses
from functools import cached_property
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from methods import METHODS, Banded, Method, Problem, attend, block_mask
from methods.huggingface import register
from methods.longformer import Longformer
from methods.pinned import Pinned, Spans
from methods.residue import ResidueOrder
from tests.methods.dense import CPU, attention
from tests.methods.models import small_model, token_ids


def weighed(k: Tensor) -> Tensor:
    """Unlike in every key head."""
    return F.normalize(k, dim=-1) * torch.arange(1, k.shape[1] + 1, device=k.device)[:, None, None]


def slope(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
    return score - (h + 1) * (q_idx - kv_idx).abs() / 8 + q_idx / 64  # exact in float32


@dataclasses.dataclass(frozen=True)
class Own(Banded):
    name: ClassVar[str] = "own"
    width: int = 10

    def bands(self, p: Problem) -> Any:
        return [[(0, self.width)]]

    def keys(self, k: Tensor) -> Tensor:
        return weighed(k)

    def score_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return slope

    def grows(self, causal: bool = True) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class OwnLongformer(Longformer):
    name: ClassVar[str] = "own_longformer"

    def keys(self, k: Tensor) -> Tensor:
        return weighed(k)

    def score_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return slope


def problem(n: int, heads: int = 4, kv_heads: int = 2, causal: bool = True) -> Problem:
    return Problem(
        batch=2, q_heads=heads, kv_heads=kv_heads, seq_len=n, head_dim=16, dtype="float64",
        causal=causal,
    )  # fmt: skip


def operands(p: Problem, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, heads, p.seq_len, 16) for heads in (p.q_heads, p.kv_heads, p.kv_heads))
    return [
        torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for x in shapes
    ]


def dense(
    method: Method, p: Problem, q: Tensor, k: Tensor, v: Tensor, state: Any = None
) -> Tensor:
    every = torch.arange(p.seq_len).expand(p.q_heads, -1)
    return attention(q, method.keys(k), v, method.rows(p, CPU, every, state))


def assert_same(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected, atol=1e-11, rtol=0)
    weights = torch.cos(torch.arange(expected.numel()).double()).view_as(expected)
    grads = (torch.autograd.grad((x * weights).sum(), inputs) for x in (found, expected))
    for mine, reference in zip(*grads, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-11, rtol=0)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "method", [Own(), Pinned(Own(), 200), OwnLongformer(window=8, n_global=3)], ids=str
)
def test_keys_and_scores_of_its_own(method: Method, causal: bool) -> None:
    p = problem(150, causal=causal)
    inputs = operands(p)
    assert_same(attend(*inputs, method, causal), dense(method, p, *inputs), inputs)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dilation", [4, (1, 2, 4, 3)])
def test_keys_and_scores_in_residue_order(dilation: int | tuple, causal: bool) -> None:
    p, method = problem(600, causal=causal), OwnLongformer(64, 6, dilation)
    inputs = operands(p)
    layout = ResidueOrder(method).layout(*inputs, p)
    assert layout.q is not inputs[0]
    assert_same(attend(*inputs, method, causal), dense(method, p, *inputs), inputs)


def test_keys_and_scores_of_padded_samples() -> None:
    p, method = problem(90), Pinned(Own(), 200)
    inputs, state = operands(p), Spans(torch.tensor([0, 30]).int(), torch.tensor([90, 50]).int())
    assert_same(attend(*inputs, method, state=state), dense(method, p, *inputs, state), inputs)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_keys_and_scores_beside_projections_of_global_rows(given: bool, causal: bool) -> None:
    p, method = problem(150, causal=causal), OwnLongformer(window=8, n_global=3)
    inputs, own = operands(p), operands(p, 1)
    chosen = torch.arange(150).expand(2, -1) < 3
    if given:
        chosen = torch.rand(2, 150, generator=torch.Generator().manual_seed(2)) < 0.05
    state = method.globals_state(chosen, p)
    out = attend(
        *inputs, method, causal, global_tokens=chosen if given else None, global_qkv=tuple(own)
    )
    ordinary, rows = (dense(method, p, *x, state) for x in (inputs, own))
    assert_same(out, torch.where(chosen[:, None, :, None], rows, ordinary), [*inputs, *own])


def test_keys_and_scores_where_keys_are_cached() -> None:
    register({"own": Own()}, backend="blockwise")
    model, ids = small_model("llama", "own", use_cache=True).double().eval(), token_ids(2, 40)
    with torch.no_grad():
        start = model(ids[:, :39])
        last = model(ids[:, 39:], past_key_values=start.past_key_values).logits
        expected = model(ids, use_cache=False).logits[:, 39:]
    torch.testing.assert_close(last, expected, atol=1e-10, rtol=0)


# what they must be


@dataclasses.dataclass(frozen=True)
class Windowed(Banded):
    name: ClassVar[str] = "windowed"
    half: int = 1

    @cached_property
    def width(self) -> int:
        return 2 * self.half

    def bands(self, p: Problem) -> Any:
        return [[(0, self.width)]]


class Fixed(Windowed):
    """Its attributes can be set, since the class itself is no dataclass."""


@dataclasses.dataclass
class Thawed(Banded):
    name: ClassVar[str] = "windowed"


class Plain(Method):
    name = "windowed"
    width = 2


class Nameless(Method):
    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return lambda b, h, q_idx, kv_idx: q_idx >= kv_idx


REFUSED = {
    "windowed: its class Fixed must be a @dataclass(frozen=True)": Fixed(2),
    "windowed: its class Thawed must be a @dataclass(frozen=True)": Thawed(),
    "windowed: its class Plain must be a @dataclass(frozen=True)": Plain(),
    "Nameless has no name; give the class an attribute name, a str": Nameless(),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_method_is_a_value_with_a_name(message: str) -> None:
    q = torch.randn(1, 2, 20, 16, dtype=torch.float64)
    with pytest.raises(ValueError) as error:
        attend(q, q, q, REFUSED[message])
    assert str(error.value) == message


def test_what_follows_from_fields_is_part_of_the_value() -> None:
    q = torch.randn(1, 2, 20, 16, dtype=torch.float64)
    expected = attend(q, q, q, Windowed(3))
    used = Windowed(3)
    assert used.width == 6 and torch.equal(attend(q, q, q, used), expected)


def test_a_name_is_that_of_the_table_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.randn(1, 2, 20, 16, dtype=torch.float64)
    before = attend(q, q, q, "sliding_window")
    narrow = dataclasses.replace(METHODS["sliding_window"], window=3)
    monkeypatch.setitem(METHODS, "sliding_window", narrow)
    after = attend(q, q, q, "sliding_window")
    assert torch.equal(after, attend(q, q, q, narrow)) and not torch.equal(after, before)


@dataclasses.dataclass(frozen=True)
class Bound(Method):
    name: ClassVar[str] = "bound"
    by_grid: bool = False

    def mask(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return q_idx >= kv_idx

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
        return self.mask

    def grid(self, *given: Any, **state: Any) -> Any:
        q0, q1, k0, k1 = given[4:8]
        return (q1 >= k0, q0 >= k1) if self.by_grid else None


@pytest.mark.parametrize("by_grid", [True, False])
def test_a_bound_method_is_no_mask_mod(by_grid: bool) -> None:
    message = "^bound: mask_mod gives a bound method; it must give a closure$"
    with pytest.raises(ValueError, match=message):
        block_mask(Bound(by_grid), problem(40), "cpu")


@pytest.mark.parametrize(
    ("gives", "what"),
    [
        (lambda b, h, q, k: (q >= k).float(), "a tensor of torch.float32"),
        (lambda b, h, q, k: None, "None"),
        (lambda b, h, q, k: True, "True"),
    ],
)
def test_a_mask_is_of_bool(gives: Any, what: str) -> None:
    """Of numbers torch makes a mask without a word."""

    @dataclasses.dataclass(frozen=True)
    class Own(Method):
        name: ClassVar[str] = "own"

        def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> Any:
            return gives

    message = f"^own: mask_mod gives {what}; it must give a tensor of torch.bool$"
    with pytest.raises(ValueError, match=message):
        block_mask(Own(), problem(40), "cpu")


@pytest.mark.parametrize("device", ["nope", "cpu:x", "meta", None])
def test_devices_that_compute_nothing(device: Any) -> None:
    with pytest.raises(ValueError) as error:
        block_mask(METHODS["standard"], problem(40), device)
    assert str(error.value) == (
        f"device is {device!r}; it must be one that computes, as cpu or cuda:0"
    )
