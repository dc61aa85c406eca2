"""One sample of a call, by one of three clocks that are never mixed.

device: replay of a CUDA graph of several calls, divided by their number; host launch costs are
outside. kernels: first kernel start to last kernel end by CUPTI, for what no graph can capture.
host: what an eager caller waits, launch and synchronisation included.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

Call = Callable[[], object]
Sampler = Callable[[], float]

REPLAY_US = 2000.0  # a replay at least this long makes the cost of starting it negligible


def host_sampler(call: Call, device: torch.device) -> Sampler:
    """Microseconds from call to completion; on CUDA with a flushed L2.

    On CUDA a call that is not timed comes first: samples of other cells have gone before, and a
    caller who calls again and again finds the processor's own caches warm.
    """
    if device.type == "cpu":
        return lambda: _elapsed_us(call)
    flush = _flush(device)

    def synchronised() -> None:
        call()
        torch.cuda.synchronize(device)

    def sample() -> float:
        call()
        flush.fill_(1)
        torch.cuda.synchronize(device)
        return _elapsed_us(synchronised)

    return sample


def device_sampler(calls: Sequence[Call], device: torch.device) -> Replay:
    """Microseconds a call by replay of a CUDA graph that goes round the calls.

    Args:
        calls: the same work on different inputs, together larger than twice the L2. A backward is
            captured on the stream that its forward ran on, so the caller's current stream must
            not be the default one (`use_side_stream`).

    Raises:
        RuntimeError: the work cannot be captured.
    """
    calls[0]()  # every lazy initialisation happens before the capture
    _must_not_wait(calls[0])
    for call in calls[1:]:
        call()
    once = Replay(calls, len(calls), device)
    once()
    rounds = math.ceil(REPLAY_US / (len(calls) * max(once(), 0.1)))
    sample = once if rounds == 1 else Replay(calls, len(calls) * rounds, device)
    sample()
    return sample


def _must_not_wait(call: Call) -> None:
    """Raises RuntimeError where a call waits for the device, as no capture can.

    A capture that breaks off for it would leave torch's allocator in the middle of a capture.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is a prototype and does not find everything
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def span_us(call: Call, device: torch.device) -> float:
    """Microseconds from the start of a call's first kernel to the end of its last."""
    spans = [event.time_range for event in kernel_events(call, device)]
    if not spans:
        raise RuntimeError("CUPTI saw no kernel: another profiler may be at work")
    return max(span.end for span in spans) - min(span.start for span in spans)


def kernel_events(call: Call, device: torch.device) -> list:
    """What a call runs on the device, as events of torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        call()
        torch.cuda.synchronize(device)
    cuda = torch.profiler.DeviceType.CUDA
    return [event for event in profile.events() if event.device_type == cuda]


@lru_cache(maxsize=8)
def _flush(device: torch.device) -> Tensor:
    """Memory whose filling leaves nothing else in the L2; one for all samplers of a device."""
    return torch.empty(2 * l2_bytes(device), dtype=torch.int8, device=device)


def release() -> None:
    """Gives back the memory that flushes fill."""
    _flush.cache_clear()


def l2_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size


def input_sets(bytes_each: int, device: torch.device) -> int:
    """How many input sets exceed twice the L2 together, so that no call finds its own there."""
    return max(1, math.ceil(2 * l2_bytes(device) / bytes_each))


def use_side_stream(device: torch.device) -> None:
    """Makes a stream that can be captured the current one, for the rest of the process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.cuda.set_stream(torch.cuda.Stream(device))


class Span:
    """Microseconds from the start of a call's first kernel to the end of its last, by CUPTI."""

    count = 1

    def __init__(self, call: Call, device: torch.device) -> None:
        self.call, self.device = call, device

    def __call__(self) -> float:
        self._prepare()
        return span_us(self.call, self.device)

    def events(self) -> list:
        """What a call runs, as events of torch's profiler."""
        self._prepare()
        return kernel_events(self.call, self.device)

    def _prepare(self) -> None:
        _flush(self.device).fill_(1)
        torch.cuda.synchronize(self.device)


class Replay:
    """Microseconds a call, by replay of a graph of `count` calls that goes round those given.

    The graph knows addresses only: whoever made the calls keeps the tensors behind them alive.
    """

    def __init__(self, calls: Sequence[Call], count: int, device: torch.device) -> None:
        self.calls, self.count, self.device = calls, count, device
        self.graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream(device)):
                for index in range(count):
                    self.result = calls[index % len(calls)]()
        if any("CUDA Graph is empty" in str(warning.message) for warning in told):
            raise RuntimeError("the call runs its kernels on a stream of its own")
        self.start, self.end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def __call__(self) -> float:
        torch.cuda.synchronize(self.device)
        self.start.record()
        self.graph.replay()
        self.end.record()
        self.end.synchronize()
        return self.start.elapsed_time(self.end) * 1000 / self.count

    def events(self) -> list:
        """What `count` calls run, as events of torch's profiler."""
        return kernel_events(self, self.device)

    def last(self) -> tuple[int, Sequence[Tensor | None]]:
        """Which of the calls comes last in the graph, and what it gives now."""
        self.graph.replay()
        return (self.count - 1) % len(self.calls), self.result


def _elapsed_us(call: Call) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1000
