"""How often `compare` sees a difference: of nothing, of 3 % and of 1 % of real extra work.

`python -m tests.detection --device cuda --output FILE` samples a call, its twin, and the call with
an extra kernel behind it, in interleaved rounds as a sweep does, and writes how many comparisons
came out faster, slower, same or unclear. `paired` are two methods of one run; `apart` are runs one
after the other, as two files are compared. On a CPU the extra work is a product of matrices.
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

from bench import timing
from bench.backends import BACKENDS, forward_backward
from bench.compare import verdict
from bench.derived import UNPAIRED
from bench.record import ROOT, environment
from bench.request import named_device
from bench.sampling import sample_rounds
from bench.stats import ratio_interval
from methods import METHODS, Problem

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
    """A pass over so many elements; on a CPU, over a vector that its caches hold."""
    x = torch.rand(size, device=device)
    return lambda: x.mul_(1.0001).clamp_(max=1.0)


def plant(device: torch.device, call: Work, share: float) -> timing.Sampler:
    """A sampler of the call with at most so much more work, by bisection of measured times."""
    plain, low, high = samplers(device, call, None), 1 << 8, 1 << 26
    slow = samplers(device, call, work(device, low))
    for _ in range(14):
        size = int((low * high) ** 0.5)
        tried = samplers(device, call, work(device, size))
        pairs = [(tried(), plain()) for _ in range(ROUNDS)]
        if statistics.median(a / b for a, b in pairs) > 1 + share:
            high = size
        else:
            low, slow = size, tried
    return slow


def comparisons(a: timing.Sampler, b: timing.Sampler, count: int) -> Iterator[tuple[dict, dict]]:
    """Samples by round of both, interleaved."""
    for seed in range(count):
        taken = sample_rounds({"a": a, "b": b}, rounds=ROUNDS, seconds=SECONDS, seed=seed)
        yield tuple(dict(taken[name].samples) for name in "ab")


def verdicts(pairs: list[tuple[dict, dict]]) -> dict[str, Counter]:
    """Of a against b: paired, and b of the comparison after, without its rounds."""
    paired = Counter(verdict(ratio_interval(a, b)) for a, b in pairs)
    later = [{UNPAIRED + k: us for k, us in b.items()} for _, b in (*pairs[1:], pairs[0])]
    apart = Counter(verdict(ratio_interval(a, b)) for (a, _), b in zip(pairs, later, strict=True))
    return {"paired": paired, "apart": apart}


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
            pairs = list(comparisons(a, b, count))
            ratio = statistics.median(y[k] / x[k] for x, y in pairs for k in x)
            for mode, found in verdicts(pairs).items():
                rounds = statistics.median(len(x) for x, _ in pairs)
                row = (env.device, env.code, share, f"{ratio - 1:.5f}", rounds, mode, count)
                row += tuple(found[x] for x in ("same", "unclear", "slower", "faster"))
                writer.writerow(row)
                print(*row, flush=True)


if __name__ == "__main__":
    main()
