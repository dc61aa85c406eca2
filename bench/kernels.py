"""Which kernels a call runs, and their tiles: proof that a row timed what it names.

CUPTI is asked, and never in a process that measures: once it was at work there, every launch
takes longer, by 20 % of a short call's host time on an H200.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from torch._inductor.codecache import PyCodeCache

from bench.timing import Call, kernel_events

LEAST_SHARE = 0.02  # of the device's time; below it a kernel is a fill or a cast
# How tiles stand in the names of hand-written kernels.
IN_NAMES = (
    re.compile(r"(?P<tiles>\d+x\d+(?:x\d+)?)"),
    re.compile(r"_traits<\(?int\)?(?P<dim>\d+), (?:\(int\))?(?P<m>\d+), (?:\(int\))?(?P<n>\d+)"),
    re.compile(r"_traits<(?P<dim>\d+), (?P<m>\d+), (?P<n>\d+)"),
)
# flash-attn-4's kernels are named by their class and every argument; PyTorch's of one operation
# each are templates, whose argument says which one.
CUTE = re.compile(r"^kernel_cutlass_\w*?(Flash[A-Z]\w*?)_object_at_")
INNER = re.compile(r"\w+Functor\w*|\w+_kernel_cuda\w*|\w+_kernel_impl\w*|\w+Op\b|\w+Ops\b")
CONSTANT = re.compile(r"^\s*(BLOCK_[MN]\d?) : tl\.constexpr = (\d+)", re.MULTILINE)


class Ran(NamedTuple):
    """Kernels of a call, the longest first, and the tiles of each; semicolon-separated."""

    kernels: str
    tiles: str | None


def generated() -> int:
    """How many modules torch has generated so far; between two numbers lie those of a call."""
    return len(PyCodeCache.modules)


def ran(call: Call, device: torch.device, modules: slice) -> Ran | None:
    """What a call ran on its device, by CUPTI; None where it ran no kernel there.

    Args:
        modules: those that torch generated for the call.
    """
    spent: Counter[str] = Counter()
    for event in kernel_events(call, device):
        spent[event.name] += event.time_range.elapsed_us()
    if not spent:
        return None
    total = sum(spent.values())
    names = [name for name, us in spent.most_common() if us >= LEAST_SHARE * total]
    sources = [Path(module.__file__).read_text() for module in PyCodeCache.modules[modules]]
    tiles = [tiles_of(name, sources) or "-" for name in names]
    known = any(text != "-" for text in tiles)
    return Ran(";".join(map(short, names)), ";".join(tiles) if known else None)


def short(name: str) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    if cute := CUTE.search(name):
        return cute[1]
    plain = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    return re.split(r"[<(;]", plain)[0].strip()


def described(name: str) -> str:
    """A kernel's short name, and which of PyTorch's own it is where that has many uses."""
    name_only = short(name)
    inner = [x for x in INNER.findall(name) if x not in name_only]
    return f"{name_only} ({inner[0]})" if inner else name_only


def tiles_of(name: str, sources: list[str]) -> str | None:
    """Tiles of a kernel: from its source where torch generated it, else from its name."""
    for source in sources:
        start = source.find(f"def {name}(")
        if start >= 0:
            end = source.find("\n''', device_str", start)
            found = dict(CONSTANT.findall(source[start : end if end > 0 else len(source)]))
            return " ".join(f"{key[6:]}={size}" for key, size in found.items()) or None
    for pattern in IN_NAMES:
        if match := pattern.search(name):
            parts = match.groupdict()
            return parts.get("tiles") or f"{parts['m']}x{parts['n']}"
    return None
