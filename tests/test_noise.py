"""Noise: shares from a /proc made by hand, and from the real one under a load of our own and of another's."""

import os
import subprocess
import sys
import time

import pytest

from bertfast.noise import NOISY, Noise, Watch

PID = 42


@pytest.fixture
def proc(tmp_path):
    """write(cpu line, {pid: (parent, ticks)}): a /proc that says so."""

    def write(cpu, processes):
        (tmp_path / "stat").write_text(f"cpu  {' '.join(map(str, cpu))}\ncpu0 1 2 3\n")
        for pid, (parent, ticks) in processes.items():
            folder = tmp_path / str(pid)
            folder.mkdir(exist_ok=True)
            words = ["S", parent, *[0] * 9, *ticks, 0]
            (folder / "stat").write_text(f"{pid} (a name) with) R 7) {' '.join(map(str, words))}\n")
        (tmp_path / "uptime").touch()
        return tmp_path

    write.folder = tmp_path
    return write


def test_what_was_busy_and_not_ours_is_others(proc):
    mine = {PID: (1, (10, 5, 2, 1)), 50: (PID, (3, 0, 0, 0)), 51: (50, (1, 1, 0, 0)), 60: (1, (7, 7, 7, 7))}
    # user nice system idle iowait irq softirq steal guest: the guest's is in user too
    proc((100, 10, 50, 1000, 5, 1, 2, 30, 90, 0), mine)
    with Watch(proc.folder, PID) as watch:
        later = {PID: (1, (40, 15, 4, 3)), 50: (PID, (13, 0, 0, 0)), 51: (50, (5, 2, 0, 0)), 60: (1, (99, 9, 9, 9))}
        proc((180, 15, 70, 1060, 15, 3, 5, 50, 150, 0), later)
    # busy: 80 + 5 + 20 + 2 + 3 = 110, ours: 30 + 10 + 2 + 2 and 10 and 5 = 59; all: 110 + 60 idle + 10 iowait + 20
    assert watch.noise == Noise(51 / 200, 20 / 200)
    assert watch.noise.noisy and "other processes took 26%" in str(watch.noise) and "hypervisor 10%" in str(watch.noise)
    assert watch.noise.to_dict() == {"others": 51 / 200, "steal": 0.1, "noisy": True}


def test_alone_on_the_machine(proc):
    proc((0, 0, 0, 0, 0, 0, 0, 0), {PID: (1, (0, 0, 0, 0))})
    with Watch(proc.folder, PID) as watch:
        proc((150, 0, 0, 50, 0, 0, 0, 0), {PID: (1, (151, 0, 0, 0))})  # counters are read at two moments
    assert watch.noise == Noise(0.0, 0.0) and not watch.noise.noisy and "took 0%" in str(watch.noise)


def test_nothing_is_claimed_where_the_system_does_not_say(proc, tmp_path):
    for make in (lambda: None, lambda: (tmp_path / "stat").write_text("nonsense\n"), lambda: proc((1, 2), {})):
        make()
        with Watch(tmp_path, PID) as watch:
            pass
        assert watch.noise == Noise(None, None) and not watch.noise.noisy and "not known" in str(watch.noise)
    with Watch(tmp_path / "nowhere", PID) as watch:
        pass
    assert watch.noise == Noise(None, None)


def test_noisy_is_what_both_take_together():
    assert not Noise(NOISY, 0.0).noisy and Noise(NOISY, 0.001).noisy and not Noise(None, None).noisy


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_child_is_ours_and_not_noise():
    """One who watches for this process and one who watches for nobody differ by what the child took."""
    spin = "import time\nend = time.monotonic() + 0.6\nwhile time.monotonic() < end: pass"
    begin, before = time.monotonic(), os.times()
    with Watch() as ours, Watch(pid=10**9) as nobodys:
        subprocess.run([sys.executable, "-c", spin], check=True)
    seconds, after = time.monotonic() - begin, os.times()
    took = (after.children_user - before.children_user) / (seconds * os.cpu_count())
    assert took > 0.01
    assert nobodys.noise.others - ours.noise.others == pytest.approx(took, abs=0.3 * took + 0.02)
