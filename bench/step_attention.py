"""Attention as a model calls it in a step: inside the compiled model where that is possible."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from bench.backends import BACKENDS
from methods import Method, Problem

Call = Callable[[Tensor, Tensor, Tensor], Tensor]

BLOCK = (128, 128)


class StepAttention(NamedTuple):
    """How a model attends.

    Attributes:
        call: (q [B, Hq, N, D], k and v [B, Hkv, N, D]) -> [B, Hq, N, D].
        inlined: whether a compiler takes it into the graph of the model that calls it.
    """

    call: Call
    inlined: bool


@dataclass(frozen=True)
class Identity(Method):
    """Attention of zero cost: q + k + v, which keeps every projection at work.

    It is no attention. A model with it shows what the rest of a step costs, which no method gets
    below.
    """

    name: ClassVar[str] = "identity"
    paper: ClassVar[str] = "the bound of every method's speed-up in training"

    def allowed_pairs(self, p: Problem, state: None = None) -> int:
        return 0


IDENTITY = Identity()


def trains(method: Method) -> str | None:
    """Why no model here can train with a method, or None."""
    if method.shared_qk or not method.static:
        return f"{method.name} shares queries and keys, which the models of `train` do not"
    return None


def step_attention(
    method: Method, backend: str, p: Problem, device: torch.device, compiled: bool
) -> StepAttention:
    """The attention of a model.

    Args:
        backend: a name in BACKENDS; of no account for the identity.
        compiled: whether the model is compiled. If it is not, flex is compiled on its own.
    """
    if method == IDENTITY:
        return StepAttention(_sum, True)
    if backend == "flex" and compiled and (inline := _flex(method, p, device)) is not None:
        return StepAttention(inline, True)
    run = BACKENDS[backend].build(method, p, device, BLOCK)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v)[0]

    if backend.startswith("sdpa-"):
        return StepAttention(call, True)
    return StepAttention(torch.compiler.disable(call), False)


def _sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rest = k + v
    group = q.shape[1] // k.shape[1]
    return q + (rest.repeat_interleave(group, dim=1) if group > 1 else rest)


def _flex(method: Method, p: Problem, device: torch.device) -> Call | None:
    """FlexAttention over block lists built beforehand; None where a layout has other tensors."""
    shapes = [(p.batch, heads, p.seq_len, p.head_dim) for heads in (p.q_heads, *[p.kv_heads] * 2)]
    given = [torch.empty(shape, dtype=p.torch_dtype, device=device) for shape in shapes]
    layout = method.layout(*given, p, None, BLOCK)
    laid = layout.q, layout.k, layout.v
    if layout.restore is not None or any(x is not y for x, y in zip(laid, given, strict=True)):
        return None
    mask, score_mod, grouped = layout.block_mask, layout.score_mod, p.group > 1

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(
            q, k, v, score_mod=score_mod, block_mask=mask, enable_gqa=grouped
        )  # fmt: skip

    return call
