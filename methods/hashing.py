"""Angular hashing: which random direction, or its opposite, is nearest (arXiv:1509.02897)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)  # a seed for each layer of a deep model
def draw(
    heads: int, dim: int, rounds: int, columns: int, seed: int, device: torch.device
) -> Tensor:
    """Random rotations, float32 [H, D, R, columns]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(heads, dim, rounds, columns, generator=generator).to(device)


def rotated(q: Tensor, drawn: Tensor, sizes: tuple[int, ...]) -> Iterator[tuple[Tensor, int]]:
    """q by each rotation, [B, H, R, N, buckets / 2] in its dtype, and its buckets."""
    turned = torch.einsum("bhnd,hdrx->bhrnx", q, drawn.to(q.dtype))
    return zip(turned.split([x // 2 for x in sizes], -1), sizes, strict=True)


def nearest(q: Tensor, drawn: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Of every rotation the direction nearest to q or its opposite, as one number."""
    buckets, counted = 0, 1
    for part, size in rotated(q.float(), drawn, sizes):
        # The largest of the part and of its negative, without a copy of both.
        high, low = part.max(-1), part.min(-1)
        buckets = buckets + counted * torch.where(high[0] >= -low[0], high[1], low[1] + size // 2)
        counted *= size
    return buckets
