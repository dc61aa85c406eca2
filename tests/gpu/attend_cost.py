"""What `attend` costs a call beyond the compiled FlexAttention that it calls.

`python -m tests.gpu.attend_cost` times both in turn, host time of many calls in a row, and writes
a line to results/NAME.csv.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.record import ROOT, environment
from methods import METHODS, Problem, attend
from methods.attend import executor
from tests.gpu.device import the_gpu

CALLS, ROUNDS = 300, 30


def microseconds(call: Callable[[], object], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / CALLS * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "attend_cost.csv")
    output, device = parser.parse_args().output, the_gpu(parser)
    p = Problem(seq_len=1024, head_dim=64)
    q, k, v = (torch.randn(1, 8, 1024, 64, device=device, dtype=p.torch_dtype) for _ in range(3))
    layout, compiled = METHODS["spattention"].layout(q, k, v, p), executor("flex", p)
    calls = {"attend": lambda: attend(q, k, v), "compiled": lambda: compiled(layout)}
    taken: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for number in range(ROUNDS + 1):
            for name, call in calls.items():
                sample = microseconds(call, device)
                if number:  # the first round compiles
                    taken[name].append(sample)
    beyond = [a - b for a, b in zip(taken["attend"], taken["compiled"], strict=True)]
    env = environment(device)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("device", "torch", "code", "attend_us", "compiled_us", "beyond_us"))
        medians = (statistics.median(x) for x in (*taken.values(), beyond))
        writer.writerow((env.device, env.torch, env.code, *(f"{us:.1f}" for us in medians)))


if __name__ == "__main__":
    main()
