"""Whether what was timed computes: from other values in the timed tensors, what it must.

The gate judges calls on tensors of their own. What is timed are the same calls, or graphs of them,
on the same tensors again and again: a result that somebody keeps for a tensor, or that a graph
holds in place of the kernels behind it, costs nothing there, and is right until the values change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Results = Sequence[Tensor | None]

# Between two runs of one kernel: additions in another order, rounded to 16 bits.
TOLERANCE = 0.01
ROWS = 128  # of a head, which are looked at by themselves: one lost block is little of the whole
FLOOR = 0.1  # of a tensor's typical block: to what is smaller, errors are held against this


def change(tensors: Iterable[Tensor]) -> None:
    """Gives tensors [B, H, N, D] other values in place, unseen by autograd's graphs.

    Every tensor's tokens and features move by another distance, and tokens get other lengths.
    """
    for shift, x in enumerate(tensors, 1):
        number = torch.arange(x.shape[2], device=x.device)[:, None]
        factor = torch.where(number % 3 == 0, 0.5, 1.0).to(x.dtype)  # exact in every type
        for head in x.data.flatten(0, 1):  # one at a time, which takes little memory
            head.copy_(head.roll((shift, shift), (0, 1)) * factor)


def copies(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """New tensors of the same values; what is one tensor stays one."""
    made = {id(x): x.detach().clone().requires_grad_(x.requires_grad) for x in tensors}
    return tuple(made[id(x)] for x in tensors)


def relative_error(results: Results, expected: Results) -> float:
    """The largest Frobenius error of ROWS rows of a head over their norm.

    inf where other values are finite.
    """
    worst = 0.0
    for x, y in zip(results, expected, strict=True):
        if x is None:
            continue
        if not torch.equal(x.isfinite(), y.isfinite()):
            return math.inf
        x, y = (t.float().nan_to_num(posinf=0, neginf=0) for t in (x, y))
        error, size = _norms(x - y), _norms(y)
        least = FLOOR * float(size.square().mean().sqrt())
        worst = max(worst, float((error / size.clamp(min=max(least, 1e-30))).max()))
    return worst


def _norms(x: Tensor) -> Tensor:
    """Of every ROWS rows of [..., N, D], or of [B, H, N]."""
    x = x.unsqueeze(-1) if x.dim() == 3 else x
    padded = F.pad(x, (0, 0, 0, -x.shape[-2] % ROWS))
    return padded.unflatten(-2, (-1, ROWS)).square().sum((-1, -2)).sqrt()
