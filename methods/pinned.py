"""A pattern drawn for a fixed number of tokens, under calls that are shorter or padded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from methods.blocks import block_mask
from methods.method import Layout, MaskMod, Method, Problem, ScoreMod

Parts = tuple[BlockMask, ScoreMod | None]


@dataclass(frozen=True, eq=False)
class Spans:
    """State of a call whose samples are padded: sample b is length[b] tokens from start[b] on.

    Attributes:
        start, length: int32 [B].
        inner: state of the method itself, in positions of the sample.
        parts: block masks made so far; the layers of a model share them.
    """

    start: Tensor
    length: Tensor
    inner: Any = None
    parts: dict[Any, Parts] = field(default_factory=dict)

    def place(self, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """A closure (b, place in the call) -> nearest position in the sample."""
        start, length = self.start.to(device), self.length.to(device)
        return lambda b, x: torch.minimum(x - start[b], length[b] - 1).clamp(min=0)

    def within(self, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """A closure (b, first, last) -> (some place of first..last is a token, every one is)."""
        start, end = self.start.to(device), (self.start + self.length).to(device)
        return lambda b, first, last: (
            (first < end[b]) & (last >= start[b]) & (end[b] > start[b]),
            (first >= start[b]) & (last < end[b]),
        )


@dataclass(frozen=True)
class Pinned(Method):
    """A method's pattern for seq_len tokens, of which a sample sees the first.

    Attributes:
        inner: a method; a layout of its own is not used.
        seq_len: length that the pattern is drawn for; None for that of the call.
    """

    name: ClassVar[str] = "pinned"
    paper: ClassVar[str] = "of the method inside"
    inner: Method
    seq_len: int | None = None

    @property
    def shared_qk(self) -> bool:
        return self.inner.shared_qk

    def keys(self, k: Tensor) -> Tensor:
        return self.inner.keys(k)

    def validate(self, p: Problem) -> None:
        if self.seq_len is not None and p.seq_len > self.seq_len:
            raise ValueError(
                f"{self.inner.name}: {p.seq_len} tokens; it was registered for {self.seq_len}"
            )
        self.inner.validate(self.drawn_for(p))

    def check_state(self, state: Spans, p: Problem) -> None:
        """`methods.huggingface`, which alone makes it, has looked at what it was given."""

    def drawn_for(self, p: Problem) -> Problem:
        return p if self.seq_len is None else replace(p, seq_len=self.seq_len)

    def mask_mod(self, p: Problem, device: torch.device, state: Spans | None = None) -> MaskMod:
        if state is None:
            return self.inner.mask_mod(self.drawn_for(p), device)
        inner = self.inner.mask_mod(self.drawn_for(p), device, state.inner)
        place, within = state.place(device), state.within(device)

        def mask(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            tokens = within(b, q_idx, q_idx)[1] & within(b, kv_idx, kv_idx)[1]
            return inner(b, h, place(b, q_idx), place(b, kv_idx)) & tokens

        return mask

    def score_mod(
        self, p: Problem, device: torch.device, state: Spans | None = None
    ) -> ScoreMod | None:
        inner_state = None if state is None else state.inner
        inner = self.inner.score_mod(self.drawn_for(p), device, inner_state)
        if inner is None or state is None:
            return inner
        place = state.place(device)
        return lambda score, b, h, q_idx, kv_idx: inner(
            score, b, h, place(b, q_idx), place(b, kv_idx)
        )

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: Spans | None = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        if state is None:
            return self.inner.grid(self.drawn_for(p), device, b, h, q0, q1, k0, k1)
        place, within = state.place(device), state.within(device)
        # The tokens of a block are a smaller block.
        bounds = (place(b, x) for x in (q0, q1, k0, k1))
        answer = self.inner.grid(self.drawn_for(p), device, b, h, *bounds, state=state.inner)
        if answer is None:
            return None
        (some_q, every_q), (some_k, every_k) = within(b, q0, q1), within(b, k0, k1)
        return answer[0] & some_q & some_k, answer[1] & every_q & every_k

    def layout(
        self, q: Tensor, k: Tensor, v: Tensor, p: Problem, state: Spans | None = None,
        block_size: tuple[int, int] = (128, 128),
    ) -> Layout:  # fmt: skip
        if state is None:
            return super().layout(q, k, v, p, None, block_size)
        key = self, p, q.device, block_size
        if key not in state.parts:
            mask = block_mask(self, p, q.device, block_size, state=state)
            state.parts[key] = mask, self.score_mod(p, q.device, state)
        return Layout(q, self.keys(k), v, *state.parts[key])
