"""Angular hashing: which random direction, or its opposite, is nearest (arXiv:1509.02897)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from methods.method import kept


@kept(256)  # a seed for each layer of a deep model
def draw(
    heads: int, dim: int, rounds: int, columns: int, seed: int, device: torch.device
) -> Tensor:
    """Random rotations, float32 [H, D, R, columns]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(
        heads, dim, rounds, columns, generator=generator, dtype=torch.float32, device="cpu"
    )
    return drawn.to(device)


def rotated(q: Tensor, drawn: Tensor) -> Tensor:
    """q [B, H, N, D] by every rotation, [B, H, R, N, columns] in its dtype."""
    return torch.einsum("bhnd,hdrx->bhrnx", q, drawn.to(q.dtype))


def parts(turned: Tensor, sizes: tuple[int, ...]) -> Iterator[tuple[Tensor, int]]:
    """Each rotation's columns, half as many as its buckets, and its buckets."""
    return zip(turned.split([x // 2 for x in sizes], -1), sizes, strict=True)


def nearest(turned: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Of every rotation the direction nearest to it or its opposite, as one number."""
    buckets, counted = 0, 1
    for part, size in parts(turned, sizes):
        # The largest of the part and of its negative, without a copy of both.
        high, low = part.max(-1), part.min(-1)
        buckets = buckets + counted * torch.where(high[0] >= -low[0], high[1], low[1] + size // 2)
        counted *= size
    return buckets
