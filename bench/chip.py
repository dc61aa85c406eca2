"""What a chip says about itself round a sample: clock, power, temperature, why it is slow.

Of a CPU what the kernel says: whether others are at work on its cores.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
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
POWER_CAP = "power cap"
# A chip at its power cap is at its own limit: normal in large dense cells, so only recorded.
RECORDED = SLOWDOWN | {pynvml.nvmlClocksEventReasonSwPowerCap: POWER_CAP}
# Threads that wait for one whose core another process has make a call many times too slow.
SHARED_CORES = "others on its cores"
OTHERS = 0.1  # of the time of the cores; below it they do not count
LOOKED_BACK = 0.5  # seconds; /proc/stat counts in hundredths
CPU_TIMES = Path("/proc/stat")


class Reading(NamedTuple):
    """One look at the chip; None for what it does not tell.

    Attributes:
        sm_mhz, reasons: of this moment.
        power_w, celsius: averages that the chip makes, so of the cells before this one too.
    """

    sm_mhz: int | None
    power_w: float | None
    celsius: int | None
    reasons: tuple[str, ...]

    @property
    def slowed(self) -> bool:
        return any(reason in SLOWDOWN.values() for reason in self.reasons)


Reader = Callable[[], Reading | None]

HELD = 0.1  # seconds; power and temperature are averages over about as long, and slow to ask


def reader(device: torch.device) -> Reader:
    """What reads the chip of a device; it reads None where nothing is told."""
    if device.type != "cuda":
        return _Cores().read if CPU_TIMES.exists() else lambda: None
    try:
        pynvml.nvmlInit()
        # By its name, since CUDA_VISIBLE_DEVICES may have numbered the devices anew.
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return lambda: None
    return _Watch(handle).read


class _Watch:
    """Clock and reasons anew at every look; power and temperature, which change slowly, held."""

    def __init__(self, handle: object) -> None:
        self.handle, self.asked = handle, -math.inf
        self.power_w: float | None = None
        self.celsius: int | None = None

    def read(self) -> Reading:
        reasons = _ask(pynvml.nvmlDeviceGetCurrentClocksEventReasons, self.handle) or 0
        sm_mhz = _ask(pynvml.nvmlDeviceGetClockInfo, self.handle, pynvml.NVML_CLOCK_SM)
        if time.perf_counter() - self.asked > HELD:
            milliwatts = _ask(pynvml.nvmlDeviceGetPowerUsage, self.handle)
            self.power_w = None if milliwatts is None else milliwatts / 1000
            sensor = pynvml.NVML_TEMPERATURE_GPU
            self.celsius = _ask(pynvml.nvmlDeviceGetTemperature, self.handle, sensor)
            self.asked = time.perf_counter()
        named = tuple(name for bit, name in RECORDED.items() if reasons & bit)
        return Reading(sm_mhz, self.power_w, self.celsius, named)


class _Cores:
    """Whether others were at work on this process's cores: other processes, or other machines."""

    def __init__(self) -> None:
        self.cores = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        self.before, self.reasons = None, ()

    def read(self) -> Reading:
        if self.before is None:  # until the first sample others were compiling for this process
            self.before = self._spent()
        wall, busy, own = (b - a for a, b in zip(self.before, self._spent(), strict=True))
        if wall >= LOOKED_BACK:
            shared = busy - own > OTHERS * wall * len(self.cores)
            self.reasons = (SHARED_CORES,) if shared else ()
            self.before = self._spent()
        return Reading(None, None, None, self.reasons)

    def _spent(self) -> tuple[float, float, float]:
        """Seconds: of the clock; that the cores were at work for anybody; and for this process."""
        ticks = 0
        for line in CPU_TIMES.read_text().splitlines():
            name, *counts = line.split()
            if name in self.cores:
                user, nice, system, _idle, _waiting, *others = map(int, counts[:8])
                ticks += user + nice + system + sum(others)  # interrupts, and other machines
        return time.perf_counter(), ticks / os.sysconf("SC_CLK_TCK"), time.process_time()


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


def _ask(question: Callable, *arguments: object) -> int | None:
    try:
        return question(*arguments)
    except pynvml.NVMLError:
        return None  # not every chip tells everything, nor every user
