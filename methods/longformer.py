"""Longformer: a sliding window plus global tokens (Beltagy et al. 2020, arXiv:2004.05150)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from methods.banded import Banded, Interval, dense_pairs, distance_test
from methods.blocks import computed_pairs
from methods.method import Layout, MaskMod, Method, Problem, ScoreMod, kept, static_parts
from methods.residue import ResidueOrder

Run = Callable[[Layout], tuple[Tensor, Tensor | None]]
Projections = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class GlobalTokens:
    """State of one call: the global tokens of each sample.

    Attributes:
        tokens: bool [B, N], in place of the prefix.
        apart: rows of global tokens are left empty, for a call of their own.
    """

    tokens: Tensor
    apart: bool = False

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Globals before each position [B, N + 1]; next and last ordinary token [B, N]."""
        n = self.tokens.shape[1]
        place = torch.arange(n, dtype=torch.int32, device=self.tokens.device)
        after = place.masked_fill(self.tokens, n).flip(1).cummin(1).values.flip(1)
        before = place.masked_fill(self.tokens, -1).cummax(1).values
        return F.pad(self.tokens.cumsum(1, dtype=torch.int32), (1, 0)), after, before


@dataclass(frozen=True)
class Longformer(Banded):
    """Longformer: a sliding window, dilated by head at will, plus global tokens.

    Query i of head h sees key j iff |i - j| <= window / 2 * dilation[h] and dilation[h] divides
    i - j, or i or j is global; under causality also j <= i. Global are the first n_global tokens,
    or any set a sample that the caller gives.

    Attributes:
        window: total width in tokens, even (transformers' convention; the original code's is
            one-sided).
        n_global: tokens at the start that are global.
        dilation: distance between neighbours in the window, of all heads or one a head.
    Deviations: global rows share the ordinary projections unless `attend_globals` is given more.
    Dilated heads are computed in residue order, which skips more blocks, where globals are a
    prefix that shares projections; else in token order.
    """

    name: ClassVar[str] = "longformer"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv:2004.05150"
    window: int = 512
    n_global: int = 16
    dilation: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        if type(self.window) is not int or self.window < 2 or self.window % 2:
            raise ValueError(
                f"longformer: window is {self.window!r}; it must be an even whole number above 0"
            )
        if type(self.n_global) is not int or self.n_global < 0:
            raise ValueError(
                f"longformer: n_global is {self.n_global!r}; it must be a whole number, 0 or more"
            )
        steps = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)
        if not steps or any(type(step) is not int or step < 1 for step in steps):
            raise ValueError(
                f"longformer: dilation is {self.dilation!r}; "
                "it must be a whole number above 0, or a tuple with one a head"
            )

    def validate(self, p: Problem) -> None:
        if isinstance(self.dilation, tuple) and len(self.dilation) != p.q_heads:
            raise ValueError(
                f"longformer: dilation has {len(self.dilation)} entries for {p.q_heads} heads; "
                "give one a head, or a single number"
            )
        widest = max(self.steps(p))
        if widest > 1 and self.window // 2 * widest >= p.seq_len:
            raise ValueError(
                f"longformer: window {self.window} with dilation {widest} reaches "
                f"{self.window // 2 * widest} tokens; it must stay below the {p.seq_len} there are"
            )
        if self.n_global > p.seq_len:
            raise ValueError(
                f"longformer: n_global is {self.n_global}; there are only {p.seq_len} tokens"
            )

    def grows(self, causal: bool = True) -> bool:
        return True

    def steps(self, p: Problem) -> tuple[int, ...]:
        """The dilation of each head."""
        return self.dilation if isinstance(self.dilation, tuple) else (self.dilation,) * p.q_heads

    def bands(self, p: Problem) -> Sequence[Sequence[Interval]]:
        half = self.window // 2
        steps = self.dilation if isinstance(self.dilation, tuple) else (self.dilation,)
        return [
            [(0, half)] if step == 1 else [(m * step, m * step) for m in range(half + 1)]
            for step in steps
        ]

    def prefix(self, p: Problem) -> int:
        return self.n_global

    def sees(self, p: Problem, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        steps, half = self.steps(p), self.window // 2
        if max(steps) == 1:
            return super().sees(p, device)
        table = torch.tensor(steps, dtype=torch.int32, device=device)
        shared = steps[0] if len(set(steps)) == 1 else None

        def inside(h: Tensor, distance: Tensor) -> Tensor:
            step = table[h] if shared is None else shared
            return (distance >= 0) & (distance <= half * step) & (distance % step == 0)

        return inside

    def globals_state(self, tokens: Tensor, p: Problem) -> GlobalTokens:
        """State of a call whose global tokens differ from sample to sample.

        Args:
            tokens: bool [B, N]; these alone are global, n_global does not count.

        Raises:
            ValueError: tokens is not bool or not [B, N].
        """
        given = f"a {type(tokens).__name__}"
        with suppress(TypeError, ValueError, RuntimeError):
            tokens = torch.as_tensor(tokens)
            given = f"{tokens.dtype} {list(tokens.shape)}"
        if given != (wanted := f"{torch.bool} {[p.batch, p.seq_len]}"):
            raise ValueError(f"longformer: global_tokens is {given}; it must be {wanted}")
        return GlobalTokens(tokens)

    def check_state(self, state: GlobalTokens, p: Problem) -> None:
        if not isinstance(state, GlobalTokens) or state.apart:
            raise ValueError("longformer: the state is none that globals_state makes")
        self.globals_state(state.tokens, p)

    def mask_mod(
        self, p: Problem, device: torch.device, state: GlobalTokens | None = None
    ) -> MaskMod:
        if state is None:
            return super().mask_mod(p, device)
        sees, causal, apart = self.sees(p, device), p.causal, state.apart
        tokens = state.tokens.to(device)

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            distance = q_idx - kv_idx if causal else (q_idx - kv_idx).abs()
            row, column = tokens[b, q_idx], tokens[b, kv_idx]
            allowed = sees(h, distance) | column
            allowed = allowed & ~row if apart else allowed | row
            return allowed & (distance >= 0) if causal else allowed

        return mask

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: GlobalTokens | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `Method.grid`; for sets, dilated or apart, some full or empty blocks are partial."""
        if state is None:
            return super().grid(p, device, b, h, q0, q1, k0, k1)
        within = distance_test(self, p, device)
        count, after, before = (x.to(device) for x in state.tables())

        def holds(first: Tensor, last: Tensor) -> Tensor:
            """Whether a global token is in first..last."""
            return count[b, last + 1] > count[b, first]

        # From first to last ordinary token a block is a smaller one, whose distances decide.
        first_q, last_q, first_k, last_k = after[b, q0], before[b, q1], after[b, k0], before[b, k1]
        low, high = (first_q, last_q) if state.apart else (q0, q1)
        if p.causal:
            end = torch.minimum(k1, high)
            rows, columns = holds(torch.maximum(q0, k0), q1), (k0 <= end) & holds(k0, end)
        else:
            rows, columns = holds(q0, q1), holds(k0, k1)
        some = within(h, low - k1, high - k0)[0] | columns
        every = within(h, first_q - last_k, last_q - first_k)[1]
        every = every | (first_q > q1) | (first_k > k1)
        if p.causal:
            every = every & (k1 <= q0)
        if state.apart:
            return some & (first_q <= q1), every & ~holds(q0, q1)
        return some | rows, every

    def allowed_pairs(self, p: Problem, state: GlobalTokens | None = None) -> int:
        """As `Method.allowed_pairs`; of the first sample, in both calls where rows are apart."""
        if state is None:
            return super().allowed_pairs(p)
        ordinary = ~state.tokens[0]
        rest = int(ordinary.sum())
        with_global = dense_pairs(p.seq_len, p.causal) - dense_pairs(rest, p.causal)
        half = self.window // 2
        window = sum(_window_pairs(ordinary, half, step, p.causal) for step in self.steps(p))
        return p.q_heads * with_global + window

    def layout(
        self, q: Tensor, k: Tensor, v: Tensor, p: Problem, state: GlobalTokens | None = None,
        block_size: tuple[int, int] = (128, 128),
    ) -> Layout:  # fmt: skip
        """Token order, or residue order where dilation makes that touch fewer blocks."""
        dilated = state is None and max(self.steps(p)) > 1
        if dilated and _residue_saves(self, p, q.device, block_size):
            return ResidueOrder(self).layout(q, k, v, p, None, block_size)
        return super().layout(q, k, v, p, state, block_size)


@lru_cache(maxsize=256)
def _residue_saves(
    method: Longformer, p: Problem, device: torch.device, block_size: tuple[int, int]
) -> bool:
    """Whether residue order touches fewer blocks; counting them waits for the device, so once."""
    masks = (static_parts(x, p, device, block_size)[0] for x in (ResidueOrder(method), method))
    in_order, in_place = (computed_pairs(mask, p) for mask in masks)
    return in_order < in_place


def _window_pairs(ordinary: Tensor, half: int, step: int, causal: bool) -> int:
    """Pairs of ordinary tokens at most `half` places apart in their residue class."""
    ranks = -(-len(ordinary) // step)
    # One column a residue class: there the dilated window is a plain one.
    classes = F.pad(ordinary.int(), (0, ranks * step - len(ordinary))).view(ranks, step)
    before = F.pad(classes.cumsum(0), (0, 0, 1, 0))
    rank = torch.arange(ranks, device=ordinary.device)
    last = rank if causal else (rank + half).clamp(max=ranks - 1)
    seen = before[last + 1] - before[(rank - half).clamp(min=0)]
    return int((classes * seen).sum())


@dataclass(frozen=True)
class _GlobalRows(Method):
    """Rows of the global tokens alone, sorted to the front; the state is (order, count)."""

    name: ClassVar[str] = "longformer_global_rows"
    paper: ClassVar[str] = Longformer.paper

    def mask_mod(self, p: Problem, device: torch.device, state: tuple[Tensor, Tensor]) -> MaskMod:
        (order, count), causal = state, p.causal

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            row = q_idx < count[b]
            return row & (kv_idx <= order[b, q_idx]) if causal else row & (kv_idx >= 0)

        return mask

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        order, count = state
        some, every = q0 < count[b], q1 < count[b]
        if not p.causal:
            return some, every
        last = torch.minimum(q1, count[b] - 1).clamp(min=0)
        return some & (k0 <= order[b, last]), every & (k1 <= order[b, q0])


def attend_globals(
    method: Longformer, q: Tensor, k: Tensor, v: Tensor, p: Problem, run: Run,
    global_tokens: Tensor | None = None, global_qkv: Projections | None = None,
    block_size: tuple[int, int] = (128, 128),
) -> Tensor:  # fmt: skip
    """Longformer with global tokens a sample, and with projections of their own for their rows.

    Ordinary rows see the ordinary keys and values of global tokens. With global_qkv the rows of
    global tokens are a second call: they see all of its keys and values, under causality those up
    to their own position. No row is in both calls, so that the outputs add up.

    Args:
        q, k, v: [B, Hq, N, D], [B, Hkv, N, D], [B, Hkv, N, D], the ordinary projections.
        run: an executor, layout -> (out, lse or None) in the order of the layout.
        global_tokens: bool [B, N], or None for the first n_global tokens.
        global_qkv: three tensors shaped like q, k, v, or None to share the ordinary ones.

    Returns:
        [B, Hq, N, D] in token order.

    Raises:
        ValueError: global_tokens or global_qkv has the wrong shape.
    """
    state = None
    if global_tokens is not None:
        state = method.globals_state(global_tokens, p)
        state = GlobalTokens(state.tokens.to(q.device))
    if global_qkv is None:
        return _run(run, method.layout(q, k, v, p, state, block_size))
    _check_shapes(global_qkv, (q, k, v))
    if state is None:
        parts = _prefix_parts(method, p, q.device, block_size)
    else:
        parts = _apart(method, p, state.tokens, block_size)
    rows = Layout(
        _take(global_qkv[0], parts.order), method.keys(global_qkv[1]), global_qkv[2], *parts.rows,
        restore=lambda out, lse: _take(out, parts.back),
    )  # fmt: skip
    return _run(run, Layout(q, method.keys(k), v, *parts.ordinary)) + _run(run, rows)


def _check_shapes(given: Projections, wanted: Projections) -> None:
    shapes, allowed = ([list(x.shape) for x in tensors] for tensors in (given, wanted))
    if shapes != allowed:
        raise ValueError(
            f"longformer: global_qkv has shapes {shapes}; they must be those of q, k, v: {allowed}"
        )


def _run(run: Run, layout: Layout) -> Tensor:
    out, lse = run(layout)
    return out if layout.restore is None else layout.restore(out, lse)


class _Apart(NamedTuple):
    """Block lists and score_mod of ordinary rows and of global ones, and the latter's order."""

    ordinary: tuple[BlockMask, ScoreMod | None]
    rows: tuple[BlockMask, ScoreMod | None]
    order: Tensor
    back: Tensor


def _apart(method: Longformer, p: Problem, tokens: Tensor, block_size: tuple[int, int]) -> _Apart:
    """Global rows come first, the others are empty: shapes do not depend on how many there are."""
    order = (~tokens).byte().argsort(dim=1, stable=True)
    token, device, apart = order.int(), tokens.device, GlobalTokens(tokens, apart=True)
    state = (token, tokens.sum(1, dtype=torch.int32))
    score_mod = method.score_mod(p, device, apart)

    def of_rows(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score_mod(score, b, h, token[b, q_idx], kv_idx)

    return _Apart(
        (method.blocks(p, device, block_size, apart), score_mod),
        (_GlobalRows().blocks(p, device, block_size, state), score_mod and of_rows),
        order,
        order.argsort(dim=1),
    )


@kept(64)
def _prefix_parts(
    method: Longformer, p: Problem, device: torch.device, block_size: tuple[int, int]
) -> _Apart:
    """Of a prefix, which is the same in every call."""
    prefix = torch.arange(p.seq_len, device=device) < method.n_global
    return _apart(method, p, prefix.expand(p.batch, p.seq_len), block_size)


def _take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of x [B, H, N, D] in the order [B, N]."""
    return x.gather(2, order[:, None, :, None].expand_as(x))
