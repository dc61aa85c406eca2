"""What a device does in a step of training, kernel by kernel, by their names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from bench import timing
from bench.kernels import described

# In names of kernels: FlexAttention's by torch, and those of the libraries; not in those of copies
# that Inductor names by the library's call which they are for.
ATTENTION = re.compile(
    r"^(?!triton_.*scaled_dot_product).*(flex_attention|flash|fmha|sdpa|attention|attn)",
    re.IGNORECASE,
)
# Every other kind: the first whose pattern a name has.
KINDS = {
    "product": re.compile(r"gemm|gemv|nvjet|splitk|triton_tem_\w*mm", re.IGNORECASE),
    "optimizer": re.compile(r"adam", re.IGNORECASE),
    "generated": re.compile(r"^triton_"),  # by torch.compile: as a rule elementwise or reductions
    "other": re.compile(""),
}
LEAST_SHARE = 0.005  # of a step; kernels of a kind that take less are put together
OTHERS = "others"
# After a rest a chip is faster for about half a second: such steps run, but do not count.
WARM_US = 1e6
COUNTED = 5  # steps after them


class Parts(NamedTuple):
    """Where a step's time goes, as its row has it; None on a CPU, where CUPTI sees nothing."""

    attention_us: float | None = None
    other_us: float | None = None
    step_kernels: str | None = None


def kernel_split(
    step: Callable[[], None], device: torch.device, step_us: float, is_attention: bool
) -> Parts:
    """Microseconds of a step in kernels of attention, by their names, and of the rest of it.

    The rest is other kernels, less what of them runs beside attention, and what no kernel fills.
    Together they are what a step took while CUPTI looked on; both are None where no kernel is
    named for attention though there is some. Beside them all kernels of a step, one by one.

    Args:
        step_us: of a step in the middle of a training.

    Raises:
        RuntimeError: CUPTI missed kernels.
    """
    if device.type == "cpu":
        return Parts()
    boundary = _boundary(device)
    torch.cuda.synchronize(device)
    names = {event.name for event in timing.kernel_events(boundary, device)}

    def steps() -> None:
        for _ in range(math.ceil(WARM_US / step_us)):
            step()
        boundary()
        for _ in range(COUNTED):
            step()

    events = [x for x in timing.kernel_events(steps, device) if not x.is_user_annotation]
    start = max((x.time_range.end for x in events if x.name in names), default=math.inf)
    if start == math.inf:
        raise RuntimeError("CUPTI did not see where the steps that count begin")
    spans = [(x.name, x.time_range.start, x.time_range.end) for x in events]
    counted = [span for span in spans if span[1] >= start]
    attention = covered([span[1:] for span in counted if ATTENTION.search(span[0])])
    whole = max(end for _, _, end in counted) - start
    listed = _listed(counted, whole)
    if is_attention and not attention:
        return Parts(step_kernels=listed)
    return Parts(attention / COUNTED, (whole - attention) / COUNTED, listed)


def kind_of(name: str) -> str:
    """What a kernel is for, by its whole name: attention, or one of KINDS."""
    if ATTENTION.search(name):
        return "attention"
    return next(kind for kind, pattern in KINDS.items() if pattern.search(name))


def _listed(counted: Sequence[tuple[str, float, float]], whole: float) -> str:
    """Microseconds a step, kind and name of kernels, the longest first."""
    spent: Counter[tuple[str, str]] = Counter()
    for name, start, end in counted:
        spent[kind_of(name), described(name)] += end - start
    shown: Counter[tuple[str, str]] = Counter()
    for (kind, name), us in spent.items():
        shown[kind, name if us >= LEAST_SHARE * whole else OTHERS] += us
    return ";".join(
        f"{us / COUNTED:.6g} {kind} {name}" for (kind, name), us in shown.most_common()
    )


def _boundary(device: torch.device) -> timing.Call:
    """A call of one kernel that no model runs; it is found again by its name."""
    return torch.zeros(1, dtype=torch.float64, device=device).erfinv_


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
