"""The gate of one problem: inputs that no call has seen, what they must give, and the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.backends import BACKWARD_PHASES, Attention, forward
from bench.confirm import TOLERANCE, relative_error
from bench.oracle import (
    ROWS_PER_BLOCK,
    Expected,
    Reference,
    Verdict,
    build_reference,
    cotangent,
    judge,
    sample_rows,
)
from methods import Method, Problem

# It looks at blocks of at most this many rows and keys, whatever a kernel visits.
BLOCK = 128
# From this many blocks a head on, up to ROWS_PER_BLOCK of them share their sampled rows: the cost
# goes with the square of N, and at a million tokens would be minutes a method.
ROW_BLOCKS = 1024


def draw(p: Problem, device: torch.device, generator: torch.Generator) -> tuple[Tensor, ...]:
    """q, k, v as leaves, and a dense gradient of the output; normal."""
    heads = (p.q_heads, p.kv_heads, p.kv_heads, p.q_heads)
    drawn = [
        torch.randn(
            (p.batch, h, p.seq_len, p.head_dim), generator=generator, device=device,
            dtype=torch.float64 if p.dtype == "float64" else torch.float32,
        ).to(p.torch_dtype)
        for h in heads
    ]  # fmt: skip
    return (*(x.requires_grad_() for x in drawn[:3]), drawn[3])


class Gate:
    """Judges the calls of one problem.

    What a method or a backend keeps of the inputs of an earlier call is wrong for these, and what
    it writes into them shows, since every call gets copies.
    """

    def __init__(
        self, p: Problem, block_size: tuple[int, int], generator: torch.Generator, seed: int
    ) -> None:
        self.p, self.device = p, generator.device
        self.blocks = tuple(min(size, BLOCK) for size in block_size)
        apart = min(p.seq_len // ROW_BLOCKS, ROWS_PER_BLOCK * self.blocks[0])
        self.rows = sample_rows(p, max(apart, self.blocks[0]), self.device, seed)
        self.cotangent = cotangent(p, self.rows, self.device, seed)
        self.inputs = [x.detach() for x in draw(p, self.device, generator)[:3]]
        # Cells come method by method, and a reference holds float64 gradients: one is kept.
        self._known: tuple[Method, Reference | str] | None = None

    def verdict(
        self, method: Method, attention: Attention, phases: Sequence[str], ties: bool
    ) -> Verdict:
        """Of every function that will be timed: without gradients is another kernel.

        Args:
            phases: that are to be timed.
            ties: whether the backend takes q for k where the method shares them.
        """
        reference, given = self._reference(method), self._given(method)
        if isinstance(reference, str):
            return _refused(reference)
        one = method.shared_qk and ties
        # Leaves of their own, so that the gradients of q and k are judged apart.
        q, k, v = (x.clone().requires_grad_() for x in given)
        if one:
            k, reference = q, tied(reference)
        verdicts, cotangent = [], self.cotangent.clone()
        gradients = any(phase in BACKWARD_PHASES for phase in phases)
        if "fwd" in phases or not gradients:
            _poison(q)
            out, lse = forward(attention, q.detach(), k.detach(), v.detach())
            verdicts.append(judge(reference, out, lse, None))
        if gradients:
            _poison(q)
            out, lse = attention(q, k, v)
            backward = partial(torch.autograd.grad, out, (q, k, v), cotangent)
            dq, dk, dv = backward(retain_graph="bwd" in phases)
            verdicts.append(judge(reference, out.detach(), lse, (None if one else dq, dk, dv)))
            # What `bwd` times runs again and again on one graph.
            if "bwd" in phases and relative_error(backward(), (dq, dk, dv)) > TOLERANCE:
                return _refused("a second backward on one graph gives other gradients")
        if not all(map(torch.equal, (q, k, v, cotangent), (*given, self.cotangent))):
            return _refused("the call changes what it is given")
        worst = max(verdict.error_budget for verdict in verdicts)
        judged = next((x for x in verdicts if not x.passed), verdicts[-1])
        return replace(judged, error_budget=worst)

    def sees_future(self, method: Method, state: Any) -> bool:
        """Whether a later key is allowed, in a few rows of every head."""
        some = self.rows[:, :: max(1, self.rows.shape[1] // 8)]
        later = torch.arange(self.p.seq_len, device=self.device) > some[..., None]
        return bool((method.rows(self.p, self.device, some, state).isfinite() & later).any())

    def release(self) -> None:
        """Gives back what verdicts need, of which there are no more."""
        del self._known, self.inputs, self.cotangent

    def _given(self, method: Method) -> tuple[Tensor, ...]:
        q, k, v = self.inputs
        return (q, q, v) if method.shared_qk else (q, k, v)

    def _reference(self, method: Method) -> Reference | str:
        """What every backend must return, or what the method's own state has wrong."""
        if self._known is None or self._known[0] != method:
            q, k, v = self._given(method)
            state = method.prepare(q, k, self.p)
            found = method.state_fault(q, k, self.p, state) or build_reference(
                method, self.p, q, k, v, self.rows, self.cotangent, state=state,
                block_size=self.blocks,
            )  # fmt: skip
            self._known = method, found
        return self._known[1]


def _refused(reason: str) -> Verdict:
    """On what is wrong whatever it returned."""
    return Verdict(error_out=math.inf, error_budget=math.inf, reason=reason)


def _poison(like: Tensor) -> None:
    """Leaves NaN in memory that the allocator will hand out again: unwritten outputs show."""
    held = [torch.full_like(like.detach(), torch.nan) for _ in range(4)]
    del held


def tied(reference: Reference) -> Reference:
    """For a backend that takes one tensor as queries and keys.

    As `reference`, but what stands under dk is dQ + dK, the gradient of the one tensor.

    It is known exactly everywhere, since the cotangent makes dQ 0 outside the sampled rows. In a
    block of keys the error may be as large as in those of dK and of the rows' dQ together.

    Args:
        reference: of a method with as many key heads as query heads.
    """
    dq, dk = reference.tensors["dq"], reference.tensors["dk"]
    index = reference.rows[None, :, :, None].expand_as(dq.value)
    rows, keys = (
        torch.arange(x.budget.shape[2], device=index.device) * length
        for x, length in zip((dq, dk), reference.block_size, strict=True)
    )
    rows = rows[:, None]
    meet = (rows < keys + reference.block_size[1]) & (keys < rows + reference.block_size[0])
    meet = meet.to(dq.budget.dtype)
    total = Expected(
        dk.value.scatter_add(2, index, dq.value), dk.block,
        dk.size + dq.size @ meet, dk.budget + dq.budget @ meet,
    )  # fmt: skip
    return replace(reference, tensors=reference.tensors | {"dk": total})
