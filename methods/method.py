"""The contract of the suite: what is attended over (Problem) and what attends (Method)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from methods.blocks import STRIP_ELEMENTS, block_mask

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}
# Above these a request is a slip of the keyboard: positions must fit int32 with room to spare.
LIMITS = {
    "batch": (1, 1 << 16),
    "q_heads": (1, 1 << 12),
    "kv_heads": (1, 1 << 12),
    "seq_len": (1, 1 << 24),
    "head_dim": (16, 1 << 10),
}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is attended over: shapes, element type and causality.

    Attributes:
        batch: sequences.
        q_heads: query heads; a multiple of kv_heads.
        kv_heads: key and value heads; as many as q_heads where not given.
        seq_len: tokens a sequence, of queries and keys alike.
        head_dim: features a head, of queries, keys and values alike.
        dtype: "bfloat16", "float16", "float32" or "float64".
        causal: whether a query sees only keys at or before its own position.

    kv_heads is a number from then on, which `dataclasses.replace` keeps: give it None along with
    other q_heads for as many of them.

    Raises:
        ValueError: a figure is outside its range, in one line that names the range.
    """

    batch: int = 1
    q_heads: int = 8
    kv_heads: int | None = None
    seq_len: int = 4096
    head_dim: int = 128
    dtype: str = "bfloat16"
    causal: bool = True

    def __post_init__(self) -> None:
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", self.q_heads)
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value <= high:
                raise ValueError(
                    f"{name} is {value!r}; it must be a whole number, {low} to {high}"
                )
        if self.q_heads % self.kv_heads:
            raise ValueError(
                f"q_heads {self.q_heads} is not a multiple of kv_heads {self.kv_heads}"
            )
        if type(self.causal) is not bool:
            raise ValueError(f"causal is {self.causal!r}; it must be True or False")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def group(self) -> int:
        """Query heads that share one key and value head."""
        return self.q_heads // self.kv_heads


class Layout(NamedTuple):
    """What a kernel receives, and the way back to token order.

    Attributes:
        q, k, v: [B, Hq, L, D], [B, Hkv, L, D], [B, Hkv, L, D], in the order of the kernel.
        block_mask: the blocks to visit and the mask inside partial ones.
        score_mod: (score, b, h, q_idx, kv_idx) -> score, or None.
        restore: (out, lse) -> out in token order; None where L is already token order.
        needs_lse: whether restore reads the log-sum-exp.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    block_mask: BlockMask
    score_mod: ScoreMod | None = None
    restore: Callable[[Tensor, Tensor | None], Tensor] | None = None
    needs_lse: bool = False


class Method:
    """One sparse attention method: a frozen dataclass of the paper's parameters.

    Only `name` and `mask_mod` must be written. `grid` makes block lists cheap, `allowed_pairs` a
    closed form; without them both are found by evaluating `mask_mod`. What follows from a method
    is kept by its value, so that one whose attributes can change is refused.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    # Whether queries and keys are one tensor.
    shared_qk: ClassVar[bool] = False
    # Whether the layout's `restore` reads the log-sum-exp.
    needs_lse: bool = False

    def validate(self, p: Problem) -> None:
        """Raises ValueError, in one line, where the parameters do not fit the problem."""

    def grows(self, causal: bool = True) -> bool:
        """Whether the mask of N tokens is a corner of that of more: keys can be cached."""
        return False

    @property
    def static(self) -> bool:
        """Whether the mask is known without queries and keys: there is nothing to prepare."""
        return type(self).prepare is Method.prepare

    def prepare(self, q: Tensor, k: Tensor, p: Problem) -> Any:
        """State of one call, computed from q [B, Hq, N, D] and k; None for a static method."""
        return None

    def check_state(self, state: Any, p: Problem) -> None:
        """Raises ValueError, in one line, where a state that a caller gives is none of this call.

        One that shows wherever it is used needs no check here.
        """
        if self.static:
            kind = type(state).__name__
            raise ValueError(f"{self.name} takes no state; a {kind} was given")

    def state_fault(self, q: Tensor, k: Tensor, p: Problem, state: Any) -> str | None:
        """What is wrong with a state that `prepare` made of q and k, found another way; or None.

        References take the state as it is, so that nothing else would show it.
        """
        return None

    def keys(self, k: Tensor) -> Tensor:
        """What scores are taken with, of k [B, Hkv, N, D] in token order: a tensor like it.

        Differentiable, and homogeneous in k. `layout` applies it, one of the method's own too;
        varlen refuses methods that have one.
        """
        return k

    def mask_mod(self, p: Problem, device: torch.device, state: Any = None) -> MaskMod:
        """The definition: a closure (b, h, q_idx, kv_idx) -> bool tensor.

        It is given integer tensors that broadcast against one another, h of query heads, and
        gives any shape that broadcasts to theirs. A bound method is refused, of which torch would
        count `self`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no mask_mod")

    def score_mod(self, p: Problem, device: torch.device, state: Any = None) -> ScoreMod | None:
        """A closure (score, b, h, q_idx, kv_idx) -> score that adds a bias, or None.

        The score is q k^T / sqrt(D) in float32, or float64; positions are as for `mask_mod`. The
        closure is differentiable in the score, and may be asked about pairs that the mask
        excludes. Of tensors that it captures, one that wants a gradient gets it on a GPU alone:
        backend blockwise raises ValueError, unless gradients are disabled. `rows`, and so the
        gate, take the closure for a bias that does not depend on the score.
        """
        return None

    def grid(
        self, p: Problem, device: torch.device, b: Tensor, h: Tensor,
        q0: Tensor, q1: Tensor, k0: Tensor, k1: Tensor, state: Any = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """(some pair allowed, every pair allowed) of blocks with inclusive bounds, or None.

        The bounds are int32 tensors that broadcast to [B, H, rows, columns], already clipped to
        seq_len - 1; a result dimension of 1 means "the same for all of it".
        """
        return None

    def allowed_pairs(self, p: Problem, state: Any = None) -> int:
        """(head, query, key) triples that take part, over the heads of one batch element."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        mask = self.mask_mod(p, device, state)
        rows = max(1, STRIP_ELEMENTS // p.seq_len)
        keys = torch.arange(p.seq_len, device=device, dtype=torch.int32)
        batch = torch.zeros((), dtype=torch.int32, device=device)
        total = 0
        for head in torch.arange(p.q_heads, device=device, dtype=torch.int32):
            for queries in keys.split(rows):
                allowed = mask(batch, head, queries[:, None], keys[None, :])
                total += int(allowed.expand(len(queries), p.seq_len).sum())
        return total

    def rows(self, p: Problem, device: torch.device, index: Tensor, state: Any = None) -> Tensor:
        """Additive bias of single query rows, for the gate: 0 or the score's bias, -inf outside.

        Args:
            index: query positions, int [H, R]: R rows of every head.

        Returns:
            float64 [B or 1, H, R, N] in token order.
        """
        b, h, keys = _axes(p, device)
        queries = index.to(device=device, dtype=torch.int32)[None, :, :, None]
        allowed = self.mask_mod(p, device, state)(b, h, queries, keys)
        bias = torch.zeros((), dtype=torch.float64, device=device)
        score_mod = self.score_mod(p, device, state)
        if score_mod is not None:
            bias = score_mod(bias, b, h, queries, keys).double()
        shape = torch.broadcast_shapes(allowed.shape, bias.shape, (1, *index.shape, p.seq_len))
        return torch.where(allowed, bias, -torch.inf).expand(shape)

    def layout(
        self, q: Tensor, k: Tensor, v: Tensor, p: Problem, state: Any = None,
        block_size: tuple[int, int] = (128, 128),
    ) -> Layout:  # fmt: skip
        """What the kernel receives; the default is token order with a block mask.

        Args:
            q, k, v: [B, Hq, N, D], [B, Hkv, N, D], [B, Hkv, N, D].
            state: what `prepare` gave, or a caller and `check_state` let pass.
            block_size: (query rows, keys) of a block.

        Raises:
            ValueError: no state where the method needs one, or a block size that is none.
        """
        if state is None:
            mask, score_mod = static_parts(self, p, q.device, block_size)
        else:
            mask = self.blocks(p, q.device, block_size, state)
            score_mod = self.score_mod(p, q.device, state)
        return Layout(q, self.keys(k), v, mask, score_mod)

    def blocks(
        self, p: Problem, device: torch.device, block_size: tuple[int, int] = (128, 128),
        state: Any = None,
    ) -> BlockMask:  # fmt: skip
        """The blocks that a kernel visits, in the order of the layout: [B or 1, H or 1, L, L].

        Raises:
            ValueError: as `methods.block_mask`.
        """
        # Of full width with a state: one that followed the data would be compiled anew for each.
        narrow = device.type == "cuda" and state is None
        return block_mask(self, p, device, block_size, state=state, narrow=narrow)


def kept(most: int) -> Callable[[Callable], Callable]:
    """lru_cache for what makes tensors: made in inference mode, they would fail in training."""
    return lambda function: lru_cache(most)(torch.inference_mode(False)(function))


@kept(256)
def static_parts(
    method: Method, p: Problem, device: torch.device, block_size: tuple[int, int]
) -> tuple[BlockMask, ScoreMod | None]:
    """Block mask and score_mod of a static method, built once a problem."""
    return method.blocks(p, device, block_size), method.score_mod(p, device)


def _axes(p: Problem, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Batch, head and key positions that broadcast to [B, H, rows, N]."""
    b = torch.arange(p.batch, device=device, dtype=torch.int32)[:, None, None, None]
    h = torch.arange(p.q_heads, device=device, dtype=torch.int32)[None, :, None, None]
    keys = torch.arange(p.seq_len, device=device, dtype=torch.int32)[None, None, None, :]
    return b, h, keys
