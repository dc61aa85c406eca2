"""The chip's own two ceilings, measured by every run, and what cannot be true beside them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.derived import FLOPS_PER_PAIR
from bench.timing import Call, device_sampler
from methods import Method, Problem

SIDE = 8192  # of the square matrices
COPIED = 1 << 30  # bytes; far more than any L2 holds
REPEATS = 10
# A copy turns the memory's bus round between reads and writes; reads alone need not. Nothing goes
# faster than the pins: those of an H200 carry 1.13 times what a copy reaches there, and other
# chips' copies may reach a smaller share.
READS_OVER_COPY = 1.25


class Ceilings(NamedTuple):
    """Rates that no attention of this chip exceeds: each the best of several measurements.

    Attributes:
        matmul_tflop_s: a bfloat16 product of large square matrices of random numbers.
        copy_gb_s: a large copy by a kernel, bytes read and bytes written.
    """

    matmul_tflop_s: float
    copy_gb_s: float


def measure_ceilings(device: torch.device) -> Ceilings | None:
    """Both ceilings of a CUDA device; None on a CPU, and where memory is too short to measure."""
    if device.type != "cuda":
        return None
    try:
        product, copy = _product_us(device), _copy_us(device)
    except torch.OutOfMemoryError:
        return None
    finally:
        torch.cuda.empty_cache()
    return Ceilings(2 * SIDE**3 / product * 1e-6, 2 * COPIED / copy * 1e-3)


class Needed(NamedTuple):
    """Rows that take part in an allowed pair, of all heads and samples: at least so many.

    Attributes:
        queries: of q, and of the output's gradient.
        keys: of k, and of v.
    """

    queries: int
    keys: int


def needed_rows(method: Method, p: Problem, device: torch.device, state: Any = None) -> Needed:
    """What a kernel that computes every allowed score must read, in memory linear in N.

    The pairs at one distance are counted, in either direction: the nearest that the last query,
    or the first, sees in that head. Of bands of distances no row is missed by it.
    """
    mask, n = method.mask_mod(p, device, state), p.seq_len
    b = torch.arange(p.batch, device=device, dtype=torch.int32)[:, None, None]
    h = torch.arange(p.q_heads, device=device, dtype=torch.int32)[:, None]
    tokens = torch.arange(n, device=device, dtype=torch.int32)

    def allowed(queries: Tensor, keys: Tensor) -> Tensor:
        inside = (queries >= 0) & (queries < n) & (keys >= 0) & (keys < n)
        return inside & mask(b, h, queries.clamp(0, n - 1), keys.clamp(0, n - 1))

    shape = p.batch, p.q_heads, n
    queries, keys = (torch.zeros(shape, dtype=torch.bool, device=device) for _ in range(2))
    for end, way in ((n - 1, -1), (0, 1)):
        index = torch.full((p.q_heads, 1), end, device=device)
        seen = method.rows(p, device, index, state)[:, :, 0].isfinite()
        away = torch.where(seen, (tokens - end).abs(), n).amin(-1, keepdim=True)
        queries |= allowed(tokens, tokens + way * away)
        keys |= allowed(tokens - way * away, tokens)
    of_group = keys.unflatten(1, (p.kv_heads, p.group)).any(2)
    return Needed(int(queries.sum()), int(of_group.sum()))


def cold_bytes(
    p: Problem, phase: str, needed: Needed, *, shared_qk: bool, l2_bytes: int, sets: int
) -> float:
    """Bytes that a call must move between memory and chip, whatever the cache keeps.

    Every needed row is read once (q, k and v; in a backward the output's gradient too), every row
    of the results written once. Calls go round so many sets of inputs and write to the same
    results. Of all sets together the L2 holds its own size when a turn begins, and of a call's
    results when it ends; all else crosses the pins.

    Args:
        shared_qk: whether k is q.
    """
    backward, of_kv = phase != "fwd", 1 if shared_qk else 2
    row = p.head_dim * p.torch_dtype.itemsize
    read = (1 + backward) * needed.queries + of_kv * needed.keys
    written = p.q_heads + backward * (of_kv * p.kv_heads)
    written *= p.batch * p.seq_len
    return max(0.0, read * row - l2_bytes / sets) + max(0.0, written * row - l2_bytes)


def beyond(
    ceilings: Ceilings, p: Problem, phase: str, allowed_pairs: int, cold: float, us: float
) -> str | None:
    """Why a time by a clock of the device cannot be true, in one line; None where it can.

    Args:
        phase: one of FLOPS_PER_PAIR: without products nothing bounds it.
        cold: bytes that a call must move (`cold_bytes`).
    """
    rate = FLOPS_PER_PAIR[phase] * p.head_dim * allowed_pairs * p.batch / us * 1e-6
    if rate > ceilings.matmul_tflop_s:
        return (
            f"{us:.4g} us would be {rate:.4g} TFLOP/s; a large matrix product reaches "
            f"{ceilings.matmul_tflop_s:.4g} on this chip"
        )
    moved = cold / us * 1e-3
    if moved > READS_OVER_COPY * ceilings.copy_gb_s:
        return (
            f"{us:.4g} us would be {moved:.4g} GB/s to and from memory; a large copy reaches "
            f"{ceilings.copy_gb_s:.4g} on this chip, reads at most {READS_OVER_COPY} times that"
        )
    return None


def _product_us(device: torch.device) -> float:
    a, b = (torch.randn(SIDE, SIDE, device=device, dtype=torch.bfloat16) for _ in range(2))
    return _fastest_us(lambda: a @ b, device)


def _copy_us(device: torch.device) -> float:
    source = torch.randn(COPIED // 4, device=device)
    target = torch.empty_like(source)
    # By a kernel: inside a graph a plain copy goes to the copy engine, which is slower.
    return _fastest_us(lambda: torch.neg(source, out=target), device)


def _fastest_us(call: Call, device: torch.device) -> float:
    sample = device_sampler([call], device)
    return min(sample() for _ in range(REPEATS))
