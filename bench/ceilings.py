"""The chip's own two ceilings, measured by every run, and what cannot be true beside them."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.derived import FLOPS_PER_PAIR
from bench.timing import Call, device_sampler
from methods import Problem

SIDE = 8192  # of the square matrices
COPIED = 1 << 30  # bytes; far more than any L2 holds
REPEATS = 10
READS_OVER_COPY = 1.25  # reads alone can be somewhat faster than a copy
# Tensors of q's, and of k's and v's size, that a phase must read from cold memory.
READ = {"fwd": (1, 2), "bwd": (2, 2), "fwd_bwd": (2, 2)}


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


def beyond(
    ceilings: Ceilings, p: Problem, phase: str, allowed_pairs: int, us: float
) -> str | None:
    """Why a time by the device's clock cannot be true, in one line; None where it can.

    A phase that runs no product is not bounded.
    """
    if phase not in FLOPS_PER_PAIR:
        return None
    rate = FLOPS_PER_PAIR[phase] * p.head_dim * allowed_pairs * p.batch / us * 1e-6
    if rate > ceilings.matmul_tflop_s:
        return (
            f"{us:.4g} us would be {rate:.4g} TFLOP/s; a large matrix product reaches "
            f"{ceilings.matmul_tflop_s:.4g} on this chip"
        )
    # So many pairs lie in at least this share of the rows and of the keys; each is read once.
    of_q, of_kv = READ[phase]
    rows = p.batch * p.seq_len * (of_q * p.q_heads + of_kv * p.kv_heads)
    needed = allowed_pairs / (p.q_heads * p.seq_len**2)
    read = needed * rows * p.head_dim * p.torch_dtype.itemsize / us * 1e-3
    if read > READS_OVER_COPY * ceilings.copy_gb_s:
        return (
            f"{us:.4g} us would be {read:.4g} GB/s of cold reads; a large copy reaches "
            f"{ceilings.copy_gb_s:.4g} on this chip"
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
