"""Banded methods as causal sliding windows over shifted keys, in calls of variable length.

A head that sees the distances S to S + W - 1 is causal sliding-window attention, W keys wide, of
the queries i >= S over the keys moved by S: q[S:] and k[:N - S] are aligned sequences of equal
length. The windows of all heads of one width are one call: no mask, no block lists, and nothing
computed outside the band but the edges of tiles. Several windows of a head, and a global prefix,
are calls whose results are merged by their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from methods.banded import Banded, merged_bands
from methods.compiled import fused
from methods.first_order import first_order
from methods.flash_kernels import Kernel, Spans, kernel_for, spans
from methods.method import Method, Problem

# Results of N x D elements a head that are merged: each costs a pass over memory of its own.
MOST_LAYERS = 2
# Of rows in use and idle, by turns: more are listed row by row.
MOST_STRETCHES = 100


class Piece(NamedTuple):
    """Consecutive queries of a head over consecutive keys.

    Query q + r sees the keys k + max(0, r - window + 1) to k + r; all of them if window is None.
    """

    head: int
    q: int
    queries: int
    k: int
    keys: int
    window: int | None


def layers(method: Banded, p: Problem) -> list[list[Piece]]:
    """The method's pairs, each in one piece; a layer has no query and no key of a head twice.

    Bands lie beyond the prefix, whose keys are a layer of their own: all of them for the queries
    after it. Its own queries are a causal square in the first layer, which has nothing there.
    """
    n, prefix = p.seq_len, min(method.prefix(p), p.seq_len)
    merged = merged_bands(method, p).tolist()
    heads = merged * p.q_heads if len(merged) == 1 else merged
    made = []
    for place in range(len(heads[0])):
        bands = [(head, *bands[place]) for head, bands in enumerate(heads)]
        made.append([
            Piece(head, prefix + lo, n - prefix - lo, prefix, n - prefix - lo, hi - lo + 1)
            for head, lo, hi in bands
            if lo <= hi and prefix + lo < n
        ])  # fmt: skip
    if prefix:
        # A window that is wider than the square is no limit there: one call can hold both.
        widths = [max(prefix, bands[0][1] - bands[0][0] + 1) for bands in heads]
        squares = [Piece(h, 0, prefix, 0, prefix, w) for h, w in enumerate(widths)]
        made[0] = sorted(made[0] + squares)
    if 0 < prefix < n:
        made.append([Piece(h, prefix, n - prefix, 0, prefix, None) for h in range(p.q_heads)])
    return made


def refusal(method: Method, p: Problem) -> str | None:
    """Why a method cannot be computed by windows, whatever the kernel; or None."""
    kind = type(method)
    plain = isinstance(method, Banded) and method.static
    plain = plain and kind.keys is Method.keys
    if not plain or method.score_mod(p, torch.device("cpu")) is not None:
        return f"varlen takes methods given by bands of distances alone; {method.name} is not"
    if not p.causal:
        return "varlen is causal; this problem is not"
    count = merged_bands(method, p).shape[1] + (0 < method.prefix(p) < p.seq_len)
    if count > MOST_LAYERS:
        return (
            f"varlen merges at most {MOST_LAYERS} windows a head; "
            f"{method.name} has {count} with these parameters"
        )
    if p.batch * p.q_heads * p.seq_len >= 1 << 31:
        return "varlen counts rows in int32; batch x q_heads x seq_len must be below 2^31"
    return None


@dataclass(frozen=True, eq=False)
class Idle:
    """Rows of a tensor that no sequence has.

    Attributes:
        lengths: cut all rows, by turns, into those in use and idle ones; the first may be 0.
        rows: the idle ones, int64, where there are many stretches: each costs the host a view.
    """

    lengths: tuple[int, ...]
    rows: Tensor | None

    def zero(self, x: Tensor) -> None:
        """Sets these rows of x [rows, 1, D] to zero."""
        if self.rows is not None:
            # By 16 bytes, of which a row is a multiple in every kernel's dtypes and head dims.
            x.flatten(1).view(torch.complex128).index_fill_(0, self.rows, 0)
        elif len(self.lengths) > 1:
            # An optimiser's call for its gradients: few kernels, however many tensors.
            torch._foreach_zero_(x.split(self.lengths)[1::2])


@dataclass(frozen=True, eq=False)
class Layer:
    """Calls whose query rows, and key rows, are all different.

    Attributes:
        idle_queries: of out.
        idle: of dq, dk and dv below one another.
    """

    calls: tuple[Spans, ...]
    idle_queries: Idle
    idle: Idle


@torch.inference_mode(False)
def prepared(method: Banded, p: Problem, device: torch.device) -> tuple[Layer, ...]:
    """The layers on a device: a call takes one window, so that pieces are grouped by it."""
    made, rows = [], p.batch * p.q_heads * p.seq_len
    for pieces in layers(method, p):
        placed = [
            ((b * p.q_heads + x.head) * p.seq_len, x) for b in range(p.batch) for x in pieces
        ]  # fmt: skip
        windows = {piece.window: None for piece in pieces}
        calls = [_call([y for y in placed if y[1].window == w], rows, device) for w in windows]
        queries = _unused([(first + x.q, x.queries) for first, x in placed], rows)
        keys = _unused([(first + x.k, x.keys) for first, x in placed], rows)
        made.append(
            Layer(tuple(calls), _idle([queries], device), _idle([queries, keys, keys], device))
        )
    return tuple(made)


def _unused(taken: Sequence[tuple[int, int]], rows: int) -> Tensor:
    """Whether no sequence has a row, bool [rows], from first rows and lengths."""
    unused = torch.ones(rows, dtype=torch.bool, device="cpu")
    for start, length in taken:
        unused[start : start + length] = False
    return unused


def _idle(unused: list[Tensor], device: torch.device) -> Idle:
    """Of tensors below one another."""
    all_rows = torch.cat(unused)
    kinds, lengths = all_rows.unique_consecutive(return_counts=True)
    many = len(lengths) > MOST_STRETCHES
    rows = all_rows.nonzero().flatten().to(device) if many else None
    return Idle((*[0] * int(kinds[0]), *lengths.tolist()), rows)


def _call(placed: Sequence[tuple[int, Piece]], rows: int, device: torch.device) -> Spans:
    """Pieces of one window behind the first row of their head, as rows of [B * Hq * N, 1, D]."""
    return spans(
        [first + x.q for first, x in placed],
        [x.queries for _, x in placed],
        [first + x.k for first, x in placed],
        [x.keys for _, x in placed],
        rows, placed[0][1].window, device,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Windows:
    """A function (q, k, v) -> (out, lse) for one banded problem, without a layout.

    lse is the natural log-sum-exp [B, Hq, N], -inf in rows without a key; it has no gradient.

    Raises:
        ValueError: the method is not made of windows, or no kernel here takes the problem.
    """

    method: Banded
    problem: Problem
    _ready: dict[torch.device, tuple[Kernel, tuple[Layer, ...]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        _raise(refusal(self.method, self.problem))

    @torch.compiler.disable
    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, state: Any = None
    ) -> tuple[Tensor, Tensor]:
        if state is not None:
            raise ValueError("varlen takes no state of a call: its windows are fixed")
        if q.device not in self._ready:
            kernel = kernel_for(q.device)
            _raise(kernel.refusal(self.problem))
            self._ready[q.device] = kernel, prepared(self.method, self.problem, q.device)
        if self.problem.group > 1:
            # Heads that share keys see them shifted differently: each has its own sequence.
            k, v = (x.repeat_interleave(self.problem.group, dim=1) for x in (k, v))
        return _Attention.apply(q, k, v, *self._ready[q.device])


def _raise(reason: str | None) -> None:
    if reason is not None:
        raise ValueError(reason)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor,
        kernel: Kernel, layers: tuple[Layer, ...],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        shape = q.shape
        # Contiguous, [B, H, N, D] is the packed layout of B * H sequences of one head.
        q, k, v = (x.reshape(-1, 1, shape[-1]) for x in (q, k, v))
        out, lse = _layer_forward(kernel, layers[0], q, k, v)
        for layer in layers[1:]:
            out, lse = fused(_merge, out, lse, *_layer_forward(kernel, layer, q, k, v))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.shape, ctx.kernel, ctx.layers = shape, kernel, layers
        out, lse = out.view(shape), lse.view(shape[:-1])
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)  # zeros for lse, which nobody reads
        return out, lse

    @staticmethod
    @first_order
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        dout, total = dout.reshape(out.shape), None
        for layer in ctx.layers:
            # With the merged out and lse each layer's weights are its part of the one softmax,
            # so that its gradients are terms of a sum.
            grads = q.new_empty(3, *q.shape)
            layer.idle.zero(grads.flatten(0, 1))
            for call in layer.calls:
                ctx.kernel.backward(dout, q, k, v, out, lse, *grads, call)
            total = grads if total is None else total.add_(grads)
        return *(x.view(ctx.shape) for x in total), None, None


def _layer_forward(
    kernel: Kernel, layer: Layer, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    layer.idle_queries.zero(out)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = torch.full((1, len(q)), -torch.inf, dtype=dtype, device=q.device)
    for call in layer.calls:
        kernel.forward(q, k, v, out, lse, call)
    return out, lse


def _merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two sets of keys, from out [rows, 1, D] and lse [1, rows] of each."""
    # Without keys in either, all is -inf and the peak is not: weights of 0, never NaN.
    peak = torch.maximum(lse, other_lse).clamp(min=torch.finfo(lse.dtype).min)
    first, second = (lse - peak).exp(), (other_lse - peak).exp()
    total = first + second
    # The peak adds 1 to the total, which is below 1 only without keys.
    scale = 1 / total.clamp(min=1)
    first, second = ((x * scale).view(-1, 1, 1) for x in (first, second))
    return (out * first + other * second).to(out.dtype), total.log() + peak
