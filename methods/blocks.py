"""Interval rule -> BlockMask and pair counts; never anything of the size N x N."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

if TYPE_CHECKING:
    from methods.method import MaskMod, Method, Problem

Lists = tuple[Tensor, Tensor]
STRIP_ELEMENTS = 1 << 24


def block_mask(
    method: Method, p: Problem, device: torch.device | str,
    block_size: tuple[int, int] = (128, 128), *, state: Any = None, narrow: bool = False,
) -> BlockMask:  # fmt: skip
    """Block lists of a method: partial and full blocks, by query row and by key column.

    Args:
        block_size: (query rows, keys) of a block.
        state: what the method's `prepare` gave, or None.
        narrow: lists only as wide as the longest one. CUDA kernels take them; the compiled
            CPU kernel, `str()` and `to_dense()` do not.

    Returns:
        A BlockMask whose lists equal those of `create_block_mask` for the method's mask_mod, in
        memory proportional to the lists. A method without a `grid` goes through
        `create_block_mask` itself, which evaluates all N x N pairs.

    Raises:
        ValueError: block_size is no pair of sizes, there is no such device, or the mask_mod is a
            bound method or, of a method without a `grid`, gives anything but a bool tensor.
    """
    device = _checked(device, block_size)
    mask_mod = method.mask_mod(p, device, state)
    if isinstance(mask_mod, MethodType):  # torch would count its self among four positions
        raise ValueError(f"{method.name}: mask_mod gives a bound method; it must give a closure")
    evaluate = _grid_of(method, p, device, block_size, state)
    if evaluate is None:
        _check_gives_bool(mask_mod, method.name, device)
        batch = None if state is None else p.batch
        return create_block_mask(
            mask_mod, batch, p.q_heads, p.seq_len, p.seq_len, device, BLOCK_SIZE=block_size
        )
    partial_kv, full_kv = _lists(evaluate, p, block_size, narrow)
    partial_q, full_q = _lists(evaluate, p, block_size, narrow, transposed=True)
    return BlockMask(
        (p.seq_len, p.seq_len), *partial_kv, *full_kv, *partial_q, *full_q,
        BLOCK_SIZE=block_size, mask_mod=mask_mod,
    )  # fmt: skip


def _check_gives_bool(mask_mod: MaskMod, name: str, device: torch.device) -> None:
    """Numbers would be taken for a mask, and wrongly; of anything else torch says little."""
    at = torch.zeros((), dtype=torch.int32, device=device)
    given = mask_mod(at, at, at, at)
    if not isinstance(given, Tensor) or given.dtype != torch.bool:
        what = f"a tensor of {given.dtype}" if isinstance(given, Tensor) else repr(given)
        raise ValueError(f"{name}: mask_mod gives {what}; it must give a tensor of torch.bool")


def _checked(device: torch.device | str, block_size: tuple[int, int]) -> torch.device:
    pair = isinstance(block_size, tuple) and len(block_size) == 2
    if not pair or any(type(size) is not int or size < 1 for size in block_size):
        raise ValueError(
            f"block_size is {block_size!r}; it must be (query rows, keys), whole numbers above 0"
        )
    with suppress(RuntimeError, TypeError):
        if (known := torch.device(device)).type != "meta":  # whose lists nobody could read
            return known
    raise ValueError(f"device is {device!r}; it must be one that computes, as cpu or cuda:0")


def computed_pairs(mask: BlockMask, p: Problem) -> int:
    """Pairs in the blocks that a kernel visits, over the heads of one batch element."""
    blocks = mask.kv_num_blocks[0].sum()
    if mask.full_kv_num_blocks is not None:
        blocks = blocks + mask.full_kv_num_blocks[0].sum()
    copies = p.q_heads // mask.kv_num_blocks.shape[1]
    return int(blocks) * copies * mask.BLOCK_SIZE[0] * mask.BLOCK_SIZE[1]


def _grid_of(
    method: Method, p: Problem, device: torch.device, block_size: tuple[int, int], state: Any
) -> Callable[[slice, slice], Lists] | None:
    """A function (block rows, block columns) -> (some, every), or None without a `grid`."""
    b = torch.arange(1 if state is None else p.batch, device=device, dtype=torch.int32)
    h = torch.arange(p.q_heads, device=device, dtype=torch.int32)
    heads = (b[:, None, None, None], h[None, :, None, None])
    (q0, q1, whole_q), (k0, k1, whole_k) = (_spans(p.seq_len, x, device) for x in block_size)

    def evaluate(rows: slice, columns: slice) -> Lists | None:
        bounds = (q0[rows, None], q1[rows, None], k0[None, columns], k1[None, columns])
        answer = method.grid(p, device, *heads, *bounds, state=state)
        if answer is None:
            return None
        # create_block_mask pads with False, so a ragged block is never full.
        whole = (whole_q[rows, None] & whole_k[None, columns])[None, None]
        some, every, whole = torch.broadcast_tensors(*answer, whole)
        return some, some & every & whole

    return None if evaluate(slice(0, 1), slice(0, 1)) is None else evaluate


def _spans(seq_len: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """First and last position of each block, and whether it is whole."""
    first = torch.arange(0, seq_len, size, device=device, dtype=torch.int32)
    last = first + (size - 1)
    return first, last.clamp(max=seq_len - 1), last < seq_len


def _lists(
    evaluate: Callable[[slice, slice], Lists],
    p: Problem,
    block_size: tuple[int, int],
    narrow: bool,
    transposed: bool = False,
) -> tuple[Lists, Lists]:
    """(counts, indices) of partial and of full blocks, by row, or by column if transposed."""
    rows, columns = (-(-p.seq_len // size) for size in block_size)
    if transposed:
        rows, columns = columns, rows
    partial, full = [], []
    for strip in _strips(rows, columns * p.q_heads):
        if transposed:
            some, every = (x.transpose(-1, -2) for x in evaluate(slice(None), strip))
        else:
            some, every = evaluate(strip, slice(None))
        partial.append(_pack(some & ~every))
        full.append(_pack(every))
    # The CUDA kernels read both lists with the strides of one, so both have one width.
    width = max(_longest(partial), _longest(full), 1) if narrow else columns
    return _join(partial, width), _join(full, width)


def _strips(rows: int, row_elements: int) -> Iterator[slice]:
    height = max(1, STRIP_ELEMENTS // row_elements)
    for start in range(0, rows, height):
        yield slice(start, min(rows, start + height))


def _pack(listed: Tensor) -> Lists:
    """Counts [B, H, rows] and the column of every listed block, row after row."""
    counts = listed.sum(-1, dtype=torch.int32)
    return counts, listed.nonzero()[:, -1].to(torch.int32)


def _longest(strips: list[Lists]) -> int:
    return max(int(count.max()) for count, _ in strips)


def _join(strips: list[Lists], width: int) -> Lists:
    """The strips' packed columns as one padded index tensor."""
    counts = torch.cat([count for count, _ in strips], dim=-1)
    indices = counts.new_zeros((*counts.shape, width))
    place = torch.arange(width, device=counts.device, dtype=torch.int32)
    row = 0
    for count, packed in strips:
        strip = indices[..., row : row + count.shape[-1], :]
        strip[place < count[..., None]] = packed
        row += count.shape[-1]
    return counts, indices
