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
    assert chip.reader(torch.device("cpu"))() is None
