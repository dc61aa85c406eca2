"""Pairs of a method, counted from its definition: equations 5 to 8 of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.specs import parameters_text
from methods import METHODS, Method, Problem, block_mask
from methods.banded import dense_pairs

STRIP_ELEMENTS = 1 << 22
SIZES = ((1000, 16), (1024, 8), (1024, 16), (4096, 8), (4096, 16))  # (N, H)


@dataclass(frozen=True, kw_only=True)
class Complexity:
    """The pairs (head, query, key) of one method on one (N, H), causal.

    Attributes:
        reason: why there are no counts, which are then None.
        allowed_pairs: pairs that take part, over all heads.
        computed_pairs: pairs in the blocks that hold one, over all heads.
        seen_pairs: (query, key) that some head sees; seen_once: that exactly one sees.
        empty_rows: (head, query) without any key.
        head_allowed, head_computed: the pairs of each head; semicolon-separated.
    """

    method: str
    params: str | None
    seq_len: int
    q_heads: int
    q_block: int
    kv_block: int
    reason: str | None = None
    allowed_pairs: int | None = None
    computed_pairs: int | None = None
    seen_pairs: int | None = None
    seen_once: int | None = None
    empty_rows: int | None = None
    head_allowed: str | None = None
    head_computed: str | None = None

    @property
    def causal_pairs(self) -> int:
        """(query, key) with the key at or before the query."""
        return dense_pairs(self.seq_len, causal=True)

    @property
    def allowed_by_head(self) -> list[int]:
        return [int(x) for x in (self.head_allowed or "").split(";") if x]

    @property
    def computed_by_head(self) -> list[int]:
        return [int(x) for x in (self.head_computed or "").split(";") if x]


def complexity(
    methods: Sequence[Method] = tuple(METHODS.values()), sizes: Sequence[tuple[int, int]] = SIZES
) -> list[Complexity]:
    """A line for each method and (N, H); one without counts says why."""
    problems = [Problem(seq_len=n, q_heads=h) for n, h in sizes]
    return [count(method, p) for p in problems for method in methods]


def count(method: Method, p: Problem, block_size: tuple[int, int] = (128, 128)) -> Complexity:
    """Counts by evaluating `mask_mod` on all N x N pairs, a strip of queries at a time."""
    key = {
        "method": method.name, "params": parameters_text(method), "seq_len": p.seq_len,
        "q_heads": p.q_heads, "q_block": block_size[0], "kv_block": block_size[1],
    }  # fmt: skip
    if not method.static:
        return Complexity(**key, reason="its pairs depend on the inputs")
    try:
        method.validate(p)
    except ValueError as error:
        return Complexity(**key, reason=str(error))
    head_allowed, seen, once, empty = _pairs(method, p)
    head_computed = _head_blocks(method, p, block_size) * block_size[0] * block_size[1]
    return Complexity(
        **key,
        allowed_pairs=int(head_allowed.sum()),
        computed_pairs=int(head_computed.sum()),
        seen_pairs=seen,
        seen_once=once,
        empty_rows=empty,
        head_allowed=";".join(map(str, head_allowed.tolist())),
        head_computed=";".join(map(str, head_computed.tolist())),
    )


def _pairs(method: Method, p: Problem) -> tuple[Tensor, int, int, int]:
    """Pairs of each head [H]; pairs seen by some head and by exactly one; rows without a key."""
    mask = method.mask_mod(p, torch.device("cpu"))
    keys = torch.arange(p.seq_len, dtype=torch.int32)
    heads = torch.arange(p.q_heads, dtype=torch.int32)[:, None, None]
    by_head = torch.zeros(p.q_heads, dtype=torch.int64)
    seen = once = empty = 0
    for queries in keys.split(max(1, STRIP_ELEMENTS // (p.q_heads * p.seq_len))):
        allowed = mask(heads[0, 0, 0], heads, queries[None, :, None], keys)
        allowed = allowed.expand(-1, len(queries), p.seq_len)
        copies = p.q_heads // len(allowed)  # a mask that all heads share is evaluated once
        by_row = allowed.sum(-1)
        by_head += by_row.sum(-1)
        empty += int((by_row == 0).sum()) * copies
        watchers = allowed.sum(0) * copies
        seen += int((watchers > 0).sum())
        once += int((watchers == 1).sum())
    return by_head, seen, once, empty


def block_classes(method: Method, p: Problem, block_size: tuple[int, int] = (128, 128)) -> Tensor:
    """[H, block rows, block columns]: 0 for an empty block, 1 for a partial, 2 for a full one."""
    mask = block_mask(method, p, "cpu", block_size)
    partial = mask.kv_num_blocks, mask.kv_indices
    full = mask.full_kv_num_blocks, mask.full_kv_indices
    classes = torch.zeros(mask.kv_indices.shape[1:], dtype=torch.int64)
    for value, (counts, indices) in enumerate((partial, full), 1):
        listed = torch.arange(indices.shape[-1]) < counts[0, ..., None]
        head, row, place = listed.nonzero(as_tuple=True)
        classes[head, row, indices[0][head, row, place].long()] = value
    return classes.expand(p.q_heads, -1, -1)


def _head_blocks(method: Method, p: Problem, block_size: tuple[int, int]) -> Tensor:
    return (block_classes(method, p, block_size) > 0).sum((1, 2))
