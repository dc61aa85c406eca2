"""How often `compare` sees a difference: of nothing, of 3 % and of 1 % of real extra work.

`python -m tests.detection --device cuda --output FILE` samples a call against its twin, and
against the call with passes over a vector behind it, in interleaved rounds as a sweep does, makes
the rows that a sweep would write, and asks of them what `compare` asks. It writes how many
comparisons came out faster, slower, same or unclear: `paired` are two methods of one run, whose
rounds are divided; `apart` are groups of rounds that follow each other, as two files are compared.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from bench import chip, derived, timing
from bench.backends import BACKENDS, forward_backward
from bench.cells import figures
from bench.compare import difference, verdict
from bench.record import ROOT, Environment, Row, environment
from bench.request import named_device
from bench.sampling import sample_rounds
from methods import METHODS, Problem
from tests.bench.rows import make_row

ROUNDS, SECONDS = 30, 2.0
Work = Callable[[], object]


def samplers(device: torch.device, call: Work, extra: Work | None) -> timing.Sampler:
    def both() -> None:
        call()
        extra()

    job = call if extra is None else both
    if device.type == "cpu":
        return timing.host_sampler(job, device)
    return timing.device_sampler([job], device)


def the_call(device: torch.device) -> Work:
    """spattention: forward + backward on a GPU, blockwise on a CPU."""
    on_gpu = device.type == "cuda"
    p = Problem(seq_len=8192) if on_gpu else Problem(seq_len=512, head_dim=32, dtype="float32")
    backend = BACKENDS["flex" if on_gpu else "blockwise"]
    attention = backend.build(METHODS["spattention"], p, device, (128, 128))
    shape = (1, p.q_heads, p.seq_len, p.head_dim)
    q, k, v, grad = (torch.randn(shape, device=device, dtype=p.torch_dtype) for _ in range(4))
    inputs = (*(x.requires_grad_() for x in (q, k, v)), grad)
    return partial(forward_backward, attention, inputs)


def work(device: torch.device, size: int) -> Work:
    """Two passes over so many elements."""
    x = torch.rand(size, device=device)
    return lambda: x.mul_(1.0001).clamp_(max=1.0)


def plant(device: torch.device, call: Work, share: float) -> timing.Sampler:
    """A sampler of the call with at most so much more work, by bisection of measured times."""
    plain, low, high = samplers(device, call, None), 1 << 8, 1 << 26
    slow = samplers(device, call, work(device, low))
    for _ in range(14):
        size = int((low * high) ** 0.5)
        extra = work(device, size)
        tried = samplers(device, call, extra)
        if device.type == "cpu":  # its calls swing by more than the work: that is timed by itself
            behind = samplers(device, extra, None)
            taken = [(plain(), behind()) for _ in range(ROUNDS)]
            more = statistics.median(us / whole for whole, us in taken)
        else:
            more = statistics.median(tried() / plain() for _ in range(ROUNDS)) - 1
        if more > share:
            high = size
        else:
            low, slow = size, tried
    return slow


def comparisons(
    a: timing.Sampler, b: timing.Sampler, count: int, read_chip: chip.Reader, env: Environment
) -> Iterator[tuple[Row, Row]]:
    """A row of both from each of so many runs."""
    clock = "host" if env.cuda is None else "device"
    for number in range(count):
        taken = sample_rounds(
            {"a": a, "b": b}, rounds=ROUNDS, seconds=SECONDS, seed=number, read_chip=read_chip
        )
        yield tuple(
            make_row(
                run=f"run {number}",
                method=name,
                clock=clock,
                cuda=env.cuda,
                **figures(taken[name], shared=True),
            )
            for name in "ab"
        )


def verdicts(pairs: list[tuple[Row, Row]]) -> dict[str, Counter]:
    """Of b against a of the same run, and against that of the run before (the last one's: after).

    Whether rounds pair is decided where `compare` decides it, by the names of the runs.
    """
    later = [b for _, b in (*pairs[1:], pairs[-2])]
    apart = [(a, b) for (a, _), b in zip(pairs, later, strict=True)]
    return {
        mode: Counter(_verdict(a, b) for a, b in chosen)
        for mode, chosen in (("paired", pairs), ("apart", apart))
    }


def _verdict(a: Row, b: Row) -> str:
    speed = derived.compare(a, b)
    return verdict(speed, difference(a, b, speed.paired))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default=str(named_device(None)))
    parser.add_argument("--comparisons", type=int, default=100)
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "detection.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    timing.use_side_stream(device)
    call, env = the_call(device), environment(device)
    a = samplers(device, call, None)
    with arguments.output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ("device", "code", "planted", "measured", "rounds", "mode", "comparisons", "same",
             "unclear", "slower", "faster")
        )  # fmt: skip
        for share in (0.0, 0.03, 0.01):
            b = plant(device, call, share) if share else samplers(device, call, None)
            count = arguments.comparisons * (1 if share else 2)
            pairs = list(comparisons(a, b, count, chip.reader(device), env))
            ratio = statistics.median(y.median_us / x.median_us for x, y in pairs)
            for mode, found in verdicts(pairs).items():
                rounds = statistics.median(len(x.samples) for x, _ in pairs)
                row = (env.device, env.code, share, f"{ratio - 1:.5f}", rounds, mode, count)
                row += tuple(found[x] for x in ("same", "unclear", "slower", "faster"))
                writer.writerow(row)
                print(*row, flush=True)


if __name__ == "__main__":
    main()
