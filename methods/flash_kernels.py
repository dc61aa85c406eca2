"""Flash-attention kernels for sequences of different lengths in one call, behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from methods.method import Problem

FLASH_DTYPES = ("bfloat16", "float16")
# A beta: the functions that are called here have no stable signature, and some earlier ones gave
# wrong gradients without a word.
FLASH_4 = "4.0.0b36"


class Packed(NamedTuple):
    """The rows of the sequences, one sequence after the other, and where each begins."""

    q_index: Tensor
    k_index: Tensor
    q_starts: Tensor
    k_starts: Tensor


@dataclass(frozen=True, eq=False)
class Spans:
    """The sequences of one call, as rows of tensors [rows, 1, D].

    Attributes:
        q_starts, k_starts: int32 [sequences + 1], first rows in ascending order, then the number
            of rows; between two sequences rows may belong to none.
        q_lengths, k_lengths: int32 [sequences].
        max_q, max_k: the longest.
        window: query r of a sequence sees its keys r - window + 1 to r; None: all of its keys.
    """

    q_starts: Tensor
    k_starts: Tensor
    q_lengths: Tensor
    k_lengths: Tensor
    max_q: int
    max_k: int
    window: int | None

    @property
    def left(self) -> int | None:
        """Keys seen before a query's own; None where a window reaches to the first."""
        if self.window is None or self.window >= self.max_q:
            return None
        return self.window - 1

    @cached_property
    @torch.inference_mode(False)
    def packed(self) -> Packed:
        """For kernels that take packed sequences alone."""
        q_starts, k_starts = (_offsets(x) for x in (self.q_lengths, self.k_lengths))
        return Packed(
            _index(self.q_starts, q_starts, self.q_lengths),
            _index(self.k_starts, k_starts, self.k_lengths),
            q_starts,
            k_starts,
        )


def spans(
    q_first: Sequence[int], q_lengths: Sequence[int], k_first: Sequence[int],
    k_lengths: Sequence[int], rows: int, window: int | None, device: torch.device,
) -> Spans:  # fmt: skip
    """Spans of sequences given by first rows and lengths, in ascending order."""
    tensors = (
        torch.tensor(x, dtype=torch.int32, device=device)
        for x in ([*q_first, rows], [*k_first, rows], q_lengths, k_lengths)
    )
    return Spans(*tensors, max(q_lengths), max(k_lengths), window)


def _offsets(lengths: Tensor) -> Tensor:
    """Where each sequence begins when nothing lies between them, and where the last one ends."""
    return torch.cat((lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)))


def _index(starts: Tensor, offsets: Tensor, lengths: Tensor) -> Tensor:
    """Row of every position of the packed sequences."""
    shift = (starts[:-1] - offsets[:-1]).long().repeat_interleave(lengths)
    return shift + torch.arange(len(shift), device=shift.device)


class Kernel(Protocol):
    """Attention of sequences of one head, softmax scale 1 / sqrt(D).

    q, k, v, out and the gradients are [rows, 1, D], lse [1, rows]: natural, float32 (float64
    for float64). Rows outside the sequences are neither read nor written.
    """

    def refusal(self, p: Problem) -> str | None:
        """Why the kernel does not take the problem's dtype or head dimension, or None."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> None:
        """Writes out and lse."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, spans: Spans,
    ) -> None:  # fmt: skip
        """Writes dq, dk and dv of these sequences' share in a softmax over more keys.

        out and lse are those of the whole softmax: weights are exp(score - lse).
        """


class FlashAttention4:
    """flash-attn-4, in place: start rows and used lengths select the rows, nothing is copied.

    Its public function allocates outputs and gradients itself and leaves unused rows unwritten;
    the functions beneath it write into tensors that they are given.
    """

    def refusal(self, p: Problem) -> str | None:
        return flash_refusal(p)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> None:
        from flash_attn.cute.interface import _flash_attn_fwd

        _flash_attn_fwd(q, k, v, out=out, lse=lse, **self._selection(spans))

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, spans: Spans,
    ) -> None:  # fmt: skip
        from flash_attn.cute.interface import _flash_attn_bwd

        _flash_attn_bwd(
            q, k, v, out, dout, lse, dq=dq, dk=dk, dv=dv, **self._selection(spans)
        )  # fmt: skip

    @staticmethod
    def _selection(spans: Spans) -> dict:
        return {
            "cu_seqlens_q": spans.q_starts, "cu_seqlens_k": spans.k_starts,
            "seqused_q": spans.q_lengths, "seqused_k": spans.k_lengths,
            "max_seqlen_q": spans.max_q, "max_seqlen_k": spans.max_k,
            "causal": spans.window is not None, "window_size_left": spans.left,
            "window_size_right": None if spans.left is None else 0,
        }  # fmt: skip


class FlashAttention2:
    """flash-attn 2 as PyTorch contains it; it takes packed sequences, so rows are copied."""

    def refusal(self, p: Problem) -> str | None:
        return flash_refusal(p)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, spans: Spans
    ) -> None:
        rows, keys, *_ = spans.packed
        part, part_lse, *_ = torch.ops.aten._flash_attention_forward(
            q[rows], k[keys], v[keys], *self._lengths(spans), False, **self._window(spans)
        )
        out.index_copy_(0, rows, part)
        lse.index_copy_(1, rows, part_lse)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        dq: Tensor, dk: Tensor, dv: Tensor, spans: Spans,
    ) -> None:  # fmt: skip
        rows, keys, *_ = spans.packed
        # Without dropout the state of the random numbers is not read.
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        parts = torch.ops.aten._flash_attention_backward(
            dout[rows], q[rows], k[keys], v[keys], out[rows], lse[:, rows],
            *self._lengths(spans), state, torch.empty(0, device=q.device), **self._window(spans),
        )  # fmt: skip
        for whole, index, part in zip((dq, dk, dv), (rows, keys, keys), parts, strict=True):
            whole.index_copy_(0, index, part)

    @staticmethod
    def _lengths(spans: Spans) -> tuple:
        """Starts, longest lengths, no dropout, and whether plainly causal."""
        causal = spans.window is not None and spans.left is None
        starts = spans.packed.q_starts, spans.packed.k_starts
        return (*starts, spans.max_q, spans.max_k, 0.0, causal)

    @staticmethod
    def _window(spans: Spans) -> dict[str, int]:
        if spans.left is None:
            return {}
        return {"window_size_left": spans.left, "window_size_right": 0}


def flash_refusal(p: Problem) -> str | None:
    """Why flash-attention kernels do not take a problem's dtype or head dimension, or None."""
    if p.dtype not in FLASH_DTYPES:
        return f"dtype is {p.dtype}; flash-attention kernels take {' and '.join(FLASH_DTYPES)}"
    if p.head_dim % 8 or p.head_dim > 256:
        return f"head_dim is {p.head_dim}; flash-attention kernels take multiples of 8 up to 256"
    return None


def flash_4_missing(device: torch.device) -> str | None:
    """Why flash-attn-4 cannot run on a device, forward and backward; or None."""
    if device.type != "cuda":
        return "a CUDA kernel"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 9:
        return f"flash-attn-4 needs compute capability 9.0; this device has {major}.{minor}"
    return _flash_4_fault()


@lru_cache
def _flash_4_fault() -> str | None:
    """Why flash-attn-4 cannot be used here, whatever the device."""
    try:
        found = version("flash-attn-4")
    except PackageNotFoundError:
        return "flash-attn-4 is not installed (extra `flash`)"
    if found != FLASH_4:
        return f"flash-attn-4 is {found}; {FLASH_4} is what is known to be right (extra `flash`)"
    try:
        import flash_attn.cute.interface  # noqa: F401
    except (AttributeError, ImportError, OSError, RuntimeError) as error:
        return f"flash-attn-4 cannot be imported: {type(error).__name__}: {error}"
    return None


def kernel_for(device: torch.device) -> Kernel:
    """flash-attn-4 where it can run, else flash-attn 2.

    Raises:
        ValueError: the device has neither.
    """
    if device.type != "cuda":
        raise ValueError(f"varlen has flash-attention kernels for CUDA alone, none for {device}")
    if flash_4_missing(device) is None:
        return FlashAttention4()
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    if not capable or not torch.backends.cuda.is_flash_attention_available():
        raise ValueError(f"varlen: neither flash-attn-4 nor flash-attn 2 runs on {device}")
    return FlashAttention2()
