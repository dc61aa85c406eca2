"""Cells of a sweep compiled and timed one after the other in one process, as most harnesses do.

`python -m tests.gpu.serial --output FILE` takes five presets at six lengths from empty caches,
forward and backward, with torch.compile and CUDA events and without a gate, and writes the wall
time, to be held against that of a sweep.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from bench.record import ROOT, environment
from methods import METHODS, Problem
from methods.attend import plan

METHODS_TAKEN = ("standard", "spattention", "spattention_released", "longformer", "bigbird")
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
REPEATS = 30


def one_by_one(device: torch.device) -> float:
    """Seconds of one process, its imports not counted."""
    start = time.perf_counter()
    for n in LENGTHS:
        for name in METHODS_TAKEN:
            p = Problem(seq_len=n)
            shape = (1, p.q_heads, n, p.head_dim)
            q, k, v, grad = (torch.randn(shape, device=device, dtype=p.torch_dtype)
                             for _ in range(4))  # fmt: skip
            inputs = [x.requires_grad_() for x in (q, k, v)]
            attention = plan(METHODS[name], p, "flex")
            median = statistics.median(timed(attention, inputs, grad) for _ in range(REPEATS))
            print(f"{name} {n}: {median:.0f} us", flush=True)
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
    output, device = parser.parse_args().output, torch.device("cuda:0")
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": folder, "TRITON_CACHE_DIR": f"{folder}/triton"}
        seconds = one_by_one(device)
    env = environment(device)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("device", "code", "cells", "seconds"))
        cells = len(METHODS_TAKEN) * len(LENGTHS)
        writer.writerow((env.device, env.code, cells, f"{seconds:.0f}"))


if __name__ == "__main__":
    main()
