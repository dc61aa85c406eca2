"""What is asked of NVML, and what of it is held."""

from types import SimpleNamespace

import pynvml
import pytest
import torch

from bench import chip


@pytest.fixture
def nvml(monkeypatch):
    """A chip whose answers a test sets; `asked` counts the questions by name."""
    state = SimpleNamespace(reasons=0, mhz=1980, milliwatts=650_000, celsius=55, asked=[])
    answers = {
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: uuid,
        "nvmlDeviceGetCurrentClocksEventReasons": lambda handle: state.reasons,
        "nvmlDeviceGetClockInfo": lambda handle, kind: state.mhz,
        "nvmlDeviceGetPowerUsage": lambda handle: state.milliwatts,
        "nvmlDeviceGetTemperature": lambda handle, sensor: state.celsius,
    }
    for name, answer in answers.items():

        def ask(*arguments, name=name, answer=answer):
            state.asked.append((name, *arguments))
            return answer(*arguments)

        monkeypatch.setattr(pynvml, name, ask)
    properties = SimpleNamespace(uuid="1234-abcd")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return state


def test_clock_and_reasons_are_of_the_moment_and_the_rest_is_held(nvml):
    read = chip.reader(torch.device("cuda:0"))
    assert read() == chip.Reading(1980, 650.0, 55, ())
    nvml.mhz, nvml.milliwatts, nvml.celsius = 1200, 300_000, 90
    nvml.reasons = pynvml.nvmlClocksEventReasonSwThermalSlowdown
    second = read()
    assert second == chip.Reading(1200, 650.0, 55, ("thermal",))
    assert second.slowed
    assert ("nvmlDeviceGetHandleByUUID", "GPU-1234-abcd") in nvml.asked
    powers = [x for x in nvml.asked if x[0] == "nvmlDeviceGetPowerUsage"]
    assert len(powers) == 1


def test_the_power_cap_is_no_slowdown(nvml):
    nvml.reasons = pynvml.nvmlClocksEventReasonSwPowerCap
    reading = chip.reader(torch.device("cuda:0"))()
    assert reading.reasons == ("power cap",)
    assert not reading.slowed


def test_what_a_chip_does_not_tell_is_none(nvml, monkeypatch):
    def refused(*arguments):
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", refused)
    assert chip.reader(torch.device("cuda:0"))().power_w is None
    monkeypatch.setattr(pynvml, "nvmlInit", refused)
    assert chip.reader(torch.device("cuda:0"))() is None


@pytest.fixture
def cores(monkeypatch):
    """Two cores of a CPU of four: seconds of the clock, of these cores' work, and of our own."""
    state = SimpleNamespace(wall=0.0, busy=0.0, elsewhere=0.0, stolen=0.0, own=0.0)
    ticks = chip.os.sysconf("SC_CLK_TCK")

    def text():
        half, stolen, other = (
            round(x * ticks) for x in (state.busy / 2, state.stolen, state.elsewhere)
        )
        return (
            f"cpu  9 9 9 9 9 9 9 9 0 0\ncpu0 {half} 0 0 99 9 0 0 {stolen} 0 0\n"
            f"cpu1 0 0 {half} 99 9 0 0 0 0 0\ncpu2 {other} 0 0 99 9 0 0 0 0 0\nintr 1 2 3\n"
        )

    monkeypatch.setattr(chip, "CPU_TIMES", SimpleNamespace(exists=lambda: True, read_text=text))
    monkeypatch.setattr(chip.os, "sched_getaffinity", lambda pid: {0, 1})
    clock = SimpleNamespace(perf_counter=lambda: state.wall, process_time=lambda: state.own)
    monkeypatch.setattr(chip, "time", clock)
    return state


@pytest.mark.parametrize(
    ("spent", "reasons"),
    [
        ({"busy": 1.9, "own": 1.9}, ()),
        ({"busy": 1.0, "own": 0.9}, ()),
        ({"busy": 1.5, "own": 1.0}, (chip.SHARED_CORES,)),
        ({"busy": 0.5, "own": 0.5, "stolen": 0.4}, (chip.SHARED_CORES,)),
        ({"busy": 0.5, "own": 0.5, "elsewhere": 1.0}, ()),
    ],
    ids=["all ours", "hardly others", "others", "another machine", "on other cores"],
)
def test_others_on_the_cores_of_a_cpu_are_told(cores, spent, reasons):
    read = chip.reader(torch.device("cpu"))
    read()
    vars(cores).update(spent, wall=1.0)
    assert read() == chip.Reading(None, None, None, reasons)
    assert not read().slowed  # it is told; where it never ends there would be no sample


def test_the_cores_are_looked_at_over_half_a_second(cores):
    read = chip.reader(torch.device("cpu"))
    read()
    cores.wall, cores.busy = 0.4, 0.4
    assert read().reasons == ()
    cores.wall, cores.busy = 0.6, 0.6
    assert read().reasons == (chip.SHARED_CORES,)
    cores.wall = 1.0  # nobody since then, but not for long
    assert read().reasons == (chip.SHARED_CORES,)
    cores.wall = 1.2
    assert read().reasons == ()


def test_who_worked_before_the_first_sample_is_no_matter(cores):
    """Processes of a sweep's own compile on all cores then."""
    read = chip.reader(torch.device("cpu"))
    cores.wall, cores.busy = 60.0, 120.0
    assert read().reasons == ()
    cores.wall, cores.busy = 61.0, 121.0
    assert read().reasons == (chip.SHARED_CORES,)


def test_a_cpu_that_tells_nothing_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(chip, "CPU_TIMES", tmp_path / "no such file")
    assert chip.reader(torch.device("cpu"))() is None
