"""The gauges of the machine itself, against psutil's own reading."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from device_agent.health import Machine


@pytest.mark.skipif(not psutil.LINUX, reason="elsewhere psutil is what is read")
def test_the_gauges_of_linux_are_those_of_psutil() -> None:
    machine = Machine()
    machine.gauges()
    found = machine.gauges()
    assert 0 <= found["cpu_percent"] <= 100
    assert found["memory_percent"] == pytest.approx(psutil.virtual_memory().percent, abs=3)
    assert found["disk_percent"] == pytest.approx(psutil.disk_usage("/").percent, abs=0.5)
    assert found["load_1m"] == pytest.approx(psutil.getloadavg()[0], abs=1)


STAT = "cpu  100 0 100 700 100 0 0 0 0 0\n"
MEMINFO = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 250 kB\n"


def test_processor_time_is_that_since_the_last_look(tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(STAT)
    (tmp_path / "meminfo").write_text(MEMINFO)
    machine = Machine(tmp_path)
    assert machine.gauges()["cpu_percent"] == 20.0
    assert machine.gauges()["cpu_percent"] == 0.0  # no time passed
    (tmp_path / "stat").write_text("cpu  190 0 100 710 100 0 0 0 0 0\n")
    assert machine.gauges()["cpu_percent"] == 90.0
    assert machine.gauges()["memory_percent"] == 75.0


@pytest.mark.parametrize("stat", ["", "cpu", "cpu a b c", "x" * 100_000, "cpu  1 2 3"])
@pytest.mark.parametrize("meminfo", [MEMINFO, "", "MemTotal: 0 kB", "MemTotal:", "\0"])
def test_a_proc_that_is_none_is_not_believed(stat: str, meminfo: str, tmp_path: Path) -> None:
    (tmp_path / "stat").write_text(stat)
    (tmp_path / "meminfo").write_text(meminfo)
    assert set(Machine(tmp_path).gauges()) >= {"cpu_percent", "memory_percent", "disk_percent"}
