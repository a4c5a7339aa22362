"""Energy: the meter on a library that is made of Python, and on a machine that has none."""

import pytest

from bertfast.energy import Meter


class Library:
    """NVML as far as the meter uses it: functions that fill in their last argument and return 0 where all went well."""

    def __init__(self, joules=(), uuid="GPU-ab", starts=0):
        self.millijoules = [round(1e3 * j) for j in joules]
        self.uuid, self.starts = uuid.encode(), starts

    def nvmlInit_v2(self):
        return self.starts

    def nvmlDeviceGetHandleByIndex_v2(self, index, device):
        device._obj.value = 70 + index
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid, device):
        device._obj.value = 99
        return 0 if uuid == self.uuid else 6

    def nvmlDeviceGetTotalEnergyConsumption(self, device, used):
        if not self.millijoules:
            return 3  # not supported
        self.asked, used._obj.value = device.value, self.millijoules.pop(0)
        return 0


@pytest.mark.parametrize(("uuid", "device"), [(None, 70), ("ab", 99), ("GPU-ab", 99)])
def test_joules_between_two_readings(uuid, device):
    library = Library([1.0, 5000.25, 5012.5])
    meter = Meter.find(uuid, library)
    before = meter.joules()
    assert meter.joules() - before == pytest.approx(12.25) and library.asked == device


def test_no_meter_where_nothing_tells():
    assert Meter.find("another", Library([1.0])) is None
    assert Meter.find(None, Library()) is None, "an old card"
    assert Meter.find(None, Library([1.0], starts=9)) is None, "a driver that does not start"
    assert Meter.find(None, object()) is None, "an old driver"


def test_a_counter_that_stops_telling():
    meter = Meter.find(None, Library([1.0]))
    assert meter.joules() is None


def test_no_meter_without_a_driver(monkeypatch):
    monkeypatch.setattr("bertfast.energy._LIBRARY", "libnothing-of-the-kind.so.1")
    assert Meter.find() is None
