"""Dense N x N counterparts of what the methods compute without one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from methods import METHODS, Layout, Method, Problem, block_mask

CPU = torch.device("cpu")
# The presets whose mask does not follow from the inputs.
STATIC = [name for name, method in METHODS.items() if method.static]


def dense_mask(method: Method, p: Problem, state: Any = None) -> Tensor:
    """bool [B, H, N, N] by evaluating mask_mod on every pair."""
    return evaluate(method.mask_mod(p, CPU, state), p)


def evaluate(mask_mod: Any, p: Problem) -> Tensor:
    shape = (p.batch, p.q_heads, p.seq_len, p.seq_len)
    indices = (torch.arange(size, dtype=torch.int32) for size in shape)
    axes = (x.view(*(-1 if i == j else 1 for j in range(4))) for i, x in enumerate(indices))
    return mask_mod(*axes).expand(shape)


def listed(mask: BlockMask, kind: str, p: Problem) -> Tensor:
    """bool [B, H, rows, columns] of the blocks in the lists "kv", "full_kv", "q" or "full_q"."""
    counts, indices = getattr(mask, f"{kind}_num_blocks"), getattr(mask, f"{kind}_indices")
    rows, columns = (-(-p.seq_len // size) for size in mask.BLOCK_SIZE)
    if kind.endswith("q"):
        rows, columns = columns, rows
    table = torch.zeros(*indices.shape[:2], rows, columns + 1, dtype=torch.bool)
    used = torch.arange(indices.shape[-1]) < counts[..., None]
    table.scatter_(3, indices.long().masked_fill(~used, columns), True)
    table = table[..., :columns]
    assert torch.equal(table.sum(-1), counts.long()), "a block is listed twice"
    return table.expand(p.batch, p.q_heads, rows, columns)


def both_masks(
    method: Method, p: Problem, block_size: tuple[int, int], state: Any = None
) -> tuple[BlockMask, BlockMask]:
    """The mask in closed form, and torch's, which evaluates every pair."""
    mask_mod = method.mask_mod(p, CPU, state)
    batch = None if state is None else p.batch
    reference = create_block_mask(
        mask_mod, batch, p.q_heads, p.seq_len, p.seq_len, CPU, BLOCK_SIZE=block_size
    )
    return block_mask(method, p, CPU, block_size, state=state), reference


def assert_lists_equal(
    method: Method, p: Problem, block_size: tuple[int, int], state: Any = None
) -> None:
    mine, reference = both_masks(method, p, block_size, state)
    for kind in ("kv", "full_kv", "q", "full_q"):
        same = torch.equal(listed(mine, kind, p), listed(reference, kind, p))
        assert same, f"{method} {p} {block_size} {kind}"


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention with an additive bias [B or 1, H, N, N]; rows without a key give 0."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5 + bias
    empty = (bias == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v


def attend_layout(layout: Layout, valid: Tensor | None = None) -> tuple[Tensor, None]:
    """An executor that evaluates mask_mod on every pair; `valid` [B, N] takes out padded keys."""
    batch, heads, n, _ = layout.q.shape
    p = Problem(batch=batch, q_heads=heads, seq_len=n)
    allowed = evaluate(layout.block_mask.mask_mod, p)
    if valid is not None:
        allowed = allowed & valid[:, None, None]
    bias = torch.zeros(allowed.shape, dtype=layout.q.dtype).masked_fill(~allowed, -torch.inf)
    return attention(layout.q, layout.k, layout.v, bias), None
