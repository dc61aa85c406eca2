"""Cells of a sweep compiled and timed one after the other in one process, as most harnesses do.

`python -m tests.gpu.serial --output FILE` takes five presets at six lengths and three head counts
from empty caches, forward and backward, with torch.compile and CUDA events and without a gate, and
writes the wall time, to be held against that of a sweep of the same cells from empty caches:
`make results ARGS="serial sweep_serial"`.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.record import ROOT, environment
from methods import METHODS, Problem
from methods.attend import plan
from tests.gpu.device import the_gpu

METHODS_TAKEN = (
    "standard", "sliding_window", "spattention", "spattention_released", "longformer"
)  # fmt: skip
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
HEADS = (8, 16, 32)
REPEATS = 30


def one_by_one(heads: Sequence[int], device: torch.device) -> float:
    """Seconds of one process, its imports not counted."""
    start = time.perf_counter()
    for n, count, name in itertools.product(LENGTHS, heads, METHODS_TAKEN):
        p = Problem(seq_len=n, q_heads=count, kv_heads=count, head_dim=128)
        shape = (1, count, n, p.head_dim)
        q, k, v, grad = (torch.randn(shape, device=device, dtype=p.torch_dtype) for _ in range(4))
        inputs = [x.requires_grad_() for x in (q, k, v)]
        attention = plan(METHODS[name], p, "flex")
        median = statistics.median(timed(attention, inputs, grad) for _ in range(REPEATS))
        print(f"{name}, {count} heads, {n}: {median:.0f} us", flush=True)
    return time.perf_counter() - start


def timed(attention: object, inputs: list[torch.Tensor], grad: torch.Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.autograd.grad(attention(*inputs)[0], inputs, grad)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "serial.csv")
    parser.add_argument("--heads", type=int, nargs="+", default=HEADS)
    given, device = parser.parse_args(), the_gpu(parser)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        seconds = one_by_one(given.heads, device)
    env = environment(device)
    names = [" ".join(map(str, axis)) for axis in (METHODS_TAKEN, given.heads, LENGTHS)]
    cells = len(METHODS_TAKEN) * len(given.heads) * len(LENGTHS)
    with given.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("device", "code", "methods", "heads", "lengths", "cells", "seconds"))
        writer.writerow((env.device, env.code, *names, cells, f"{seconds:.0f}"))


if __name__ == "__main__":
    main()
