"""What errors mean: those of compilers, kernels and devices, and of a method's author."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch
from torch._inductor.exc import InductorError

from bench.specs import AUTHOR_ERRORS, OWN_MODULES

# How torch's compiler says "not this shape on this chip"; it wraps any other error, too.
REFUSALS = (
    "NotImplementedError", "NoValidChoices", "No choices to select", "No valid triton configs",
    "OutOfResources", "out of resource",
)  # fmt: skip
# What a cell may raise: a kernel, its compiler, or the code of the method's author.
CELL_ERRORS = (*AUTHOR_ERRORS, MemoryError)
# Beside torch's own class: its CPU allocator, CUDA's runtime and driver, NCCL; cuBLAS.
SHORT_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def status_of(error: BaseException, says_no: tuple[type[BaseException], ...] = ()) -> str:
    """oom, unsupported or crash.

    Memory is asked for first: a compiler wraps whatever happens while it loads a kernel.

    Args:
        says_no: further errors by which a backend refuses.
    """
    if out_of_memory(error):
        return "oom"
    refused = isinstance(error, InductorError) and any(x in str(error) for x in REFUSALS)
    refused = refused or isinstance(error, (NotImplementedError, *says_no))
    return "unsupported" if refused else "crash"


def out_of_memory(error: BaseException) -> bool:
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(text in str(error) for text in SHORT_MEMORY)


def raise_if_lost(device: torch.device) -> None:
    """Raises what happened to a device that this process cannot use any more.

    After an error of a call: the error itself may be harmless, or wrapped beyond recognition. So
    it is after a capture that failed: an allocator left in the middle of one says so here, too.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def one_line(error: BaseException) -> str:
    """What went wrong, and where in a file of the user's own, if it was there."""
    text = " ".join(str(error).split())
    told = f"{type(error).__name__}: {text[:300]}"
    own = [
        f"{Path(frame.f_code.co_filename).name}, line {line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").startswith(OWN_MODULES)
    ]
    return f"{told} ({own[-1]})" if own else told


def no_tiles(block_size: tuple[int, int], error: BaseException) -> str | None:
    """What torch means where none of the tiles it tries on a device divides the blocks."""
    if "NoValidChoicesError" not in str(error) or not any(size % 128 for size in block_size):
        return None
    rows, keys = block_size
    return (
        f"FlexAttention has no tiles on this device for blocks of {rows}x{keys}; "
        "multiples of 128 always have some"
    )
