"""What a sample on a GPU holds, on a simulated one: a host that queues, a device that works it off, two clocks."""

from types import SimpleNamespace

import pytest
import torch

from benchmarks import harness
from benchmarks.harness import FLOOR, OURS, Case, DeviceLost, Race

CYCLES_PER_S = 1e9


class Device:
    """Times in seconds; what is queued starts when the host has queued it and the device has done all before it."""

    def __init__(self):
        self.host = self.device = 0.0
        self.lost = False

    def queue(self, host, device):
        self.host += host
        self.device = max(self.device, self.host) + device

    def synchronize(self):
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.host = max(self.host, self.device) + 5e-6

    def event(self, enable_timing):
        def record():
            event.at = self.device = max(self.device, self.host)

        event = SimpleNamespace(record=record, elapsed_time=lambda end: 1e3 * (end.at - event.at))
        return event


@pytest.fixture
def device(monkeypatch):
    simulated = Device()
    monkeypatch.setattr(torch.cuda, "Event", simulated.event)
    monkeypatch.setattr(torch.cuda, "synchronize", simulated.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: simulated.queue(5e-6, cycles / CYCLES_PER_S))
    monkeypatch.setattr(harness, "cycles_per_second", lambda: CYCLES_PER_S)
    monkeypatch.setattr(harness, "flush_buffer", lambda: SimpleNamespace(random_=lambda: simulated.queue(5e-6, 1e-4)))
    monkeypatch.setattr(harness, "time", SimpleNamespace(perf_counter=lambda: simulated.host))
    return simulated


def race_of(device, *cases):
    race = Race(cases, "cuda", memory=False, clock=lambda: device.host)
    race.warm_up()
    for _ in range(3):
        race.round()
    return race


def test_the_hosts_launches_are_outside_of_a_sample_and_told_apart(device):
    def launch_bound():  # ten kernels of 2 µs, each 10 µs of the host's
        for _ in range(10):
            device.queue(10e-6, 2e-6)

    case = Case(OURS, launch_bound)
    race_of(device, case)
    assert case.repeats > 10
    assert case.samples == pytest.approx([20e-6] * 3, rel=0.02)
    assert case.with_host == pytest.approx([100e-6] * 3, rel=0.1)


def test_a_short_replay_is_repeated_fifty_times_and_a_case_with_fresh_inputs_once(device):
    short = Case(OURS, lambda: device.queue(6e-6, 3e-6))
    fresh = Case(FLOOR, lambda: device.queue(6e-6, 3e-6), prepare=lambda: device.queue(5e-6, 1e-3))
    race_of(device, short, fresh)
    assert short.repeats >= 50
    assert fresh.repeats == 1
    for case in (short, fresh):
        assert case.samples == pytest.approx([3e-6] * 3, rel=0.02)


def test_a_case_that_waits_for_the_device_pays_for_it(device):
    def synchronous():
        device.queue(10e-6, 100e-6)
        device.synchronize()
        device.queue(500e-6, 100e-6)

    case = Case(OURS, synchronous)
    race_of(device, case)
    assert min(case.samples) > 600e-6


def test_a_long_case_has_no_time_with_the_hosts(device):
    case = Case(OURS, lambda: device.queue(1e-4, 50e-3))
    race_of(device, case)
    assert case.samples == pytest.approx([50e-3] * 3, rel=0.01)
    assert case.with_host == []


def test_a_whole_model_is_timed_with_its_launches(device):
    case = Case(OURS, lambda: device.queue(100e-3, 20e-3))
    race = Race([case], "cuda", memory=False, clock=lambda: device.host, by_host=True)
    race.warm_up()
    race.round()
    assert case.samples == pytest.approx([120e-3], rel=0.01)
    assert not case.with_host


def test_a_peer_that_takes_the_device_down_ends_the_race_with_its_reason(device):
    def illegal():
        device.lost = True
        device.synchronize()

    race = Race([Case(OURS, lambda: device.queue(1e-5, 1e-3)), Case("peer", illegal)], "cuda", memory=False)
    with pytest.raises(DeviceLost, match="after peer"):
        race.warm_up()
    row = race.cases[1]
    assert row.extra == {"device_lost": True}
    assert "illegal memory access" in row.problem
