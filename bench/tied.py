"""The gate's reference for a backend that takes one tensor as queries and keys."""

from __future__ import annotations

from dataclasses import replace

import torch

from bench.oracle import Expected, Reference


def tied(reference: Reference) -> Reference:
    """As `reference`, but what stands under dk is dQ + dK, the gradient of the one tensor.

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
