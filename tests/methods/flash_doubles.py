"""Stand-ins for flash-attention kernels: dense, a sequence at a time, in the inputs' dtype."""

from __future__ import annotations

import sys
import types

import torch
from torch import Tensor

from methods.flash_kernels import FlashAttention2, FlashAttention4, Spans


def scores(q: Tensor, k: Tensor, causal: bool, left: int | None, right: int | None) -> Tensor:
    """Masked scores; the last query and the last key are aligned, as in flash-attention."""
    distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    allowed = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    allowed &= distance <= (len(k) if left is None else left)
    allowed &= distance >= -(len(q) if right is None else right)
    return (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(~allowed, -torch.inf)


def forward(q, k, v, *mask) -> tuple[Tensor, Tensor]:
    s = scores(q, k, *mask)
    return s.softmax(-1) @ v, s.logsumexp(-1)


def backward(dout, q, k, v, out, lse, *mask) -> tuple[Tensor, Tensor, Tensor]:
    weights = (scores(q, k, *mask) - lse[:, None]).exp()
    ds = weights * (dout @ v.mT - (dout * out).sum(-1, keepdim=True)) / q.shape[-1] ** 0.5
    return ds @ k, ds.mT @ q, weights.mT @ dout


def write_forward(q, k, v, out, lse, q_rows, k_rows, mask) -> None:
    for rows, keys in zip(q_rows, k_rows, strict=True):
        out[rows, 0], lse[0, rows] = forward(q[rows, 0], k[keys, 0], v[keys, 0], *mask)


def write_backward(dout, q, k, v, out, lse, dq, dk, dv, q_rows, k_rows, mask) -> None:
    for rows, keys in zip(q_rows, k_rows, strict=True):
        queries = (x[rows, 0] for x in (q, out))
        own_q, own_out = queries
        dq[rows, 0], dk[keys, 0], dv[keys, 0] = backward(
            dout[rows, 0], own_q, k[keys, 0], v[keys, 0], own_out, lse[0, rows], *mask
        )


def slices(starts: Tensor, lengths: Tensor) -> list[slice]:
    return [slice(a, a + n) for a, n in zip(starts[:-1].tolist(), lengths.tolist(), strict=True)]


class Reference:
    """The protocol itself, straight from its docstring."""

    def refusal(self, p):
        return None

    def forward(self, q, k, v, out, lse, spans):
        write_forward(q, k, v, out, lse, *self._rows(spans), self._mask(spans))

    def backward(self, dout, q, k, v, out, lse, dq, dk, dv, spans):
        rows, mask = self._rows(spans), self._mask(spans)
        write_backward(dout, q, k, v, out, lse, dq, dk, dv, *rows, mask)

    @staticmethod
    def _rows(spans: Spans):
        queries = slices(spans.q_starts, spans.q_lengths)
        return queries, slices(spans.k_starts, spans.k_lengths)

    @staticmethod
    def _mask(spans: Spans):
        return (False, None, None) if spans.window is None else (True, spans.window - 1, 0)


class Any4(FlashAttention4):
    def refusal(self, p):
        return None


class Any2(FlashAttention2):
    def refusal(self, p):
        return None


def flash_4_module() -> types.ModuleType:
    """flash_attn.cute.interface with the arguments of 4.0.0b27 and later that are used here."""

    def checked(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, longest):
        counts = (cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in counts)
        assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k)
        assert all((x.diff() > 0).all() for x in counts[:2]), "starts must ascend"
        assert longest == (seqused_q.max(), seqused_k.max())
        return slices(cu_seqlens_q, seqused_q), slices(cu_seqlens_k, seqused_k)

    def _flash_attn_fwd(
        q, k, v, *, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right,
    ):  # fmt: skip
        longest = (max_seqlen_q, max_seqlen_k)
        rows = checked(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, longest)
        write_forward(q, k, v, out, lse, *rows, (causal, window_size_left, window_size_right))
        return out, lse, None, None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, *, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right,
    ):  # fmt: skip
        longest = (max_seqlen_q, max_seqlen_k)
        rows = checked(q, k, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, longest)
        mask = (causal, window_size_left, window_size_right)
        write_backward(dout, q, k, v, out, lse, dq, dk, dv, *rows, mask)
        return dq, dk, dv

    module = types.ModuleType("flash_attn.cute.interface")
    module._flash_attn_fwd, module._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    return module


def install_flash_4(monkeypatch) -> None:
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", flash_4_module())


def install_flash_2() -> torch.library.Library:
    """A CPU implementation of PyTorch's own operators, until the library is dropped."""

    def cut(x, starts):
        return x.split(starts.diff().tolist())

    def mask(is_causal, left, right):
        return is_causal, left, right

    def fwd(q, k, v, cu_q, cu_k, max_q, max_k, dropout, is_causal, debug, *, scale=None,
            window_size_left=None, window_size_right=None, **_):  # fmt: skip
        parts = [
            forward(*(x[:, 0] for x in xs), is_causal, window_size_left, window_size_right)
            for xs in zip(cut(q, cu_q), cut(k, cu_k), cut(v, cu_k), strict=True)
        ]
        assert (max_q, max_k) == (cu_q.diff().max(), cu_k.diff().max())
        out = torch.cat([x for x, _ in parts])[:, None]
        nothing = torch.empty(0)
        return out, torch.cat([x for _, x in parts])[None], nothing, nothing, nothing

    def bwd(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, is_causal, state, unused,
            *, scale=None, window_size_left=None, window_size_right=None):  # fmt: skip
        on_q, on_k = [dout, q, out, lse.mT[:, None]], [k, v]
        groups = zip(*(cut(x, cu_q) for x in on_q), *(cut(x, cu_k) for x in on_k), strict=True)
        parts = [
            backward(
                *(x[:, 0] for x in (do, q, k, v, out)), lse[:, 0, 0],
                is_causal, window_size_left, window_size_right,
            )
            for do, q, out, lse, k, v in groups
        ]  # fmt: skip
        return tuple(torch.cat(x)[:, None] for x in zip(*parts, strict=True))

    library = torch.library.Library("aten", "IMPL", "CPU")
    library.impl("_flash_attention_forward", fwd)
    library.impl("_flash_attention_backward", bwd)
    return library
