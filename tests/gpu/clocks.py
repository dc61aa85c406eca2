"""The device clock against two others: CUPTI's spans, and triton.testing.do_bench_cudagraph.

`python -m tests.gpu.clocks --output FILE` measures ten points across methods, forward + backward,
and writes a line each. All three time graphs: `cupti_us` is from the first kernel's start to the
last one's end in one replay, over its calls.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from bench import timing
from bench.backends import BACKENDS, forward_backward
from bench.record import ROOT, environment
from methods import METHODS, Problem
from tests.gpu.device import the_gpu

POINTS = (
    ("standard", "flex", 4096), ("standard", "flex", 8192), ("standard", "sdpa-cudnn", 16384),
    ("standard", "sdpa-flash", 4096), ("spattention", "flex", 4096),
    ("spattention", "flex", 16384), ("spattention_released", "flex", 8192),
    ("local_only", "flex", 16384), ("longformer", "flex", 16384), ("bigbird", "flex", 16384),
)  # fmt: skip
SAMPLES = 30


def inputs(p: Problem, device: torch.device) -> Iterator[tuple[torch.Tensor, ...]]:
    size = 4 * p.q_heads * p.seq_len * p.head_dim * p.torch_dtype.itemsize
    shape = (1, p.q_heads, p.seq_len, p.head_dim)
    for _ in range(timing.input_sets(size, device)):
        q, k, v, grad = (torch.randn(shape, device=device, dtype=p.torch_dtype) for _ in range(4))
        yield *(x.requires_grad_() for x in (q, k, v)), grad


def measured(name: str, backend: str, n: int, device: torch.device) -> dict[str, float]:
    """Microseconds of one call by each of the three."""
    from triton.testing import do_bench_cudagraph  # there is none without a GPU

    p = Problem(seq_len=n)
    attention = BACKENDS[backend].build(METHODS[name], p, device, (128, 128))
    calls = [partial(forward_backward, attention, x) for x in inputs(p, device)]
    replay = timing.device_sampler(calls, device)
    own, cupti = [], []
    for _ in range(SAMPLES):
        own.append(replay())
        cupti.append(timing.span_us(replay, device) / replay.count)
    with torch.cuda.stream(torch.cuda.Stream(device)):
        # Graphs as long as ours: seconds of dense work without a pause would meet the power cap.
        rep = timing.REPLAY_US / 1000
        triton = do_bench_cudagraph(calls[0], rep=rep, return_mode="median") * 1000
    times = {"device_us": own, "cupti_us": cupti, "triton_us": [triton]}
    return {clock: statistics.median(samples) for clock, samples in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "clocks.csv")
    output, device = parser.parse_args().output, the_gpu(parser)
    timing.use_side_stream(device)
    env = environment(device)
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ("device", "code", "method", "backend", "seq_len", "device_us", "cupti_us",
             "triton_us", "device_over_cupti", "device_over_triton")
        )  # fmt: skip
        for point in POINTS:
            us = measured(*point, device)
            ratios = [us["device_us"] / us[clock] for clock in ("cupti_us", "triton_us")]
            row = [*(f"{x:.2f}" for x in us.values()), *(f"{x:.4f}" for x in ratios)]
            writer.writerow((env.device, env.code, *point, *row))
            print(*point, *row, flush=True)


if __name__ == "__main__":
    main()
