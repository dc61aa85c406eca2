"""What a chip says about itself round a sample: clock, power, temperature, why it is slow."""

from __future__ import annotations

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pynvml
import torch

# By NVML's bits. What slows a chip down from outside makes a sample worthless.
SLOWDOWN = {
    pynvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal",
    pynvml.nvmlClocksEventReasonHwThermalSlowdown: "thermal (hardware)",
    pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
    pynvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
}
# A chip at its power cap is at its own limit: normal in large dense cells, so only recorded.
RECORDED = SLOWDOWN | {pynvml.nvmlClocksEventReasonSwPowerCap: "power cap"}


class Reading(NamedTuple):
    """One look at the chip; None for what it does not tell."""

    sm_mhz: int | None
    power_w: float | None
    celsius: int | None
    reasons: tuple[str, ...]

    @property
    def slowed(self) -> bool:
        return any(reason in SLOWDOWN.values() for reason in self.reasons)


Reader = Callable[[], Reading | None]

KEPT = 0.01  # seconds that a reading holds: NVML's own figures are no fresher, and cost 1 ms


def reader(device: torch.device) -> Reader:
    """What reads the chip of a device; it reads None on a CPU, and where NVML does not answer."""
    if device.type != "cuda":
        return lambda: None
    try:
        pynvml.nvmlInit()
        # By its name, since CUDA_VISIBLE_DEVICES may have numbered the devices anew.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return lambda: None
    return _kept(lambda: _read(handle))


def _kept(read: Reader) -> Reader:
    """A reader that asks again only when the last answer is older than KEPT."""
    last, when = None, -math.inf

    def again() -> Reading | None:
        nonlocal last, when
        if time.perf_counter() - when > KEPT:
            last, when = read(), time.perf_counter()
        return last

    return again


def summary(readings: Sequence[Reading]) -> dict:
    """The fields of a row: medians, the highest temperature, and how often each reason was met."""
    reasons = Counter(reason for reading in readings for reason in reading.reasons)
    clocks, powers, degrees = (
        [value for value in values if value is not None]
        for values in list(zip(*readings, strict=True))[:3] or [[], [], []]
    )
    return {
        "sm_mhz": round(statistics.median(clocks)) if clocks else None,
        "power_w": statistics.median(powers) if powers else None,
        "celsius": max(degrees, default=None),
        "throttled": "; ".join(f"{name} {n}/{len(readings)}" for name, n in reasons.items())
        or None,
    }


def _read(handle: object) -> Reading:
    reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, handle) or 0
    milliwatts = _ask(pynvml.nvmlDeviceGetPowerUsage, handle)
    return Reading(
        _ask(pynvml.nvmlDeviceGetClockInfo, handle, pynvml.NVML_CLOCK_SM),
        None if milliwatts is None else milliwatts / 1000,
        _ask(pynvml.nvmlDeviceGetTemperature, handle, pynvml.NVML_TEMPERATURE_GPU),
        tuple(name for bit, name in RECORDED.items() if reasons & bit),
    )


def _ask(question: Callable, *arguments: object) -> int | None:
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None  # not every chip tells everything, nor every user
