"""Dilated heads with their tokens sorted by residue, where the dilated window is a plain one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from methods.method import Layout, MaskMod, Method, Problem, ScoreMod, kept

if TYPE_CHECKING:
    from methods.longformer import Longformer

Key = tuple[tuple[int, ...], int, int, torch.device]


@dataclass(frozen=True)
class ResidueOrder(Method):
    """The mask of a Longformer over slots: global tokens, then the rest by (i mod dilation, i).

    Neighbours in a dilated window are neighbours in slots, so that a head touches about as many
    blocks as an undilated one. Prefix globals only; `mask_mod` and `grid` are in slots, and the
    layout brings the output back to token order.
    """

    name: ClassVar[str] = "longformer_residue_order"
    paper: ClassVar[str] = "Beltagy et al. 2020, arXiv:2004.05150"
    inner: Longformer

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> MaskMod:
        in_tokens = self.inner.mask_mod(p, device)
        order = self._order(p, device)

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return in_tokens(b, h, order[h, q_idx], order[h, kv_idx])

        return mask

    def score_mod(self, p: Problem, device: torch.device, state: Any = None) -> ScoreMod | None:
        in_tokens, order = self.inner.score_mod(p, device), self._order(p, device)
        if in_tokens is None:
            return None
        return lambda score, b, h, q_idx, kv_idx: in_tokens(
            score, b, h, order[h, q_idx], order[h, kv_idx]
        )

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: Any = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        half, prefix = self.inner.window // 2, self.inner.n_global
        steps = torch.tensor(self.inner.steps(p), dtype=torch.int32, device=device)
        residue = self._order(p, device) % steps[:, None]
        # Globals come first here too: outside them a block is a smaller block.
        s0, t0 = (x.clamp(min=prefix, max=p.seq_len - 1) for x in (q0, k0))
        outside = (prefix <= q1) & (prefix <= k1)
        head = h if isinstance(self.inner.dilation, tuple) else 0
        rs0, rs1, rt0, rt1 = (residue[head, x] for x in (s0, q1, t0, k1))
        # Of two blocks that share a residue class, the nearest slots are both in it.
        low, high, least = s0 - k1, q1 - t0, 0 if p.causal else -half
        some = outside & (high >= least) & (low <= half) & (rs0 <= rt1) & (rt0 <= rs1)
        every = (low >= least) & (high <= half) & (rs0 == rs1) & (rt0 == rt1) & (rs0 == rt0)
        if p.causal:
            return some | ((k0 < prefix) & (k0 <= q1)), (every | ~outside) & (k1 <= q0)
        return some | (k0 < prefix) | (q0 < prefix), every | ~outside

    def allowed_pairs(self, p: Problem, state: Any = None) -> int:
        return self.inner.allowed_pairs(p)

    def _order(self, p: Problem, device: torch.device) -> Tensor:
        return token_order(*self._key(p, device))

    def _key(self, p: Problem, device: torch.device) -> Key:
        return self.inner.steps(p), self.inner.n_global, p.seq_len, device

    def layout(
        self, q: Tensor, k: Tensor, v: Tensor, p: Problem, state: Any = None,
        block_size: tuple[int, int] = (128, 128),
    ) -> Layout:  # fmt: skip
        """Tokens in slots; k and v get a copy for each query head, whose orders may differ."""
        heads = p.q_heads
        to_q, to_kv, back = _moves(*self._key(p, q.device), p.group)
        moved = (q, to_q), (self.inner.keys(k), to_kv), (v, to_kv)  # keys() counts Hkv heads
        in_slots = super().layout(*(_take(x, to, heads) for x, to in moved), p, None, block_size)
        return in_slots._replace(restore=lambda out, lse: _take(out, back, heads))


@kept(32)
def token_order(steps: tuple[int, ...], prefix: int, seq_len: int, device: torch.device) -> Tensor:
    """The token in each slot, int32 [H, N]."""
    token = torch.arange(seq_len, device=device)
    residue = token % torch.tensor(steps, device=device)[:, None]
    return residue.masked_fill(token < prefix, -1).argsort(dim=1, stable=True).int()


@kept(32)
def _moves(
    steps: tuple[int, ...], prefix: int, n: int, device: torch.device, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of [H * N] to gather for q, for k and v, and for the way back."""
    order = token_order(steps, prefix, n, device).long()
    head = torch.arange(len(order), device=device)[:, None]
    moves = head * n + order, head // group * n + order, head * n + order.argsort(1)
    return tuple(move.flatten() for move in moves)


def _take(x: Tensor, index: Tensor, heads: int) -> Tensor:
    """Rows of x [B, H, N, D] by their place in [H * N], as [B, heads, N, D]."""
    return x.flatten(1, 2).index_select(1, index).unflatten(1, (heads, -1))
