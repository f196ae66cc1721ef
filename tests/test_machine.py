"""How much memory there is, read from a /proc and a /sys that are made up."""

from __future__ import annotations

import pytest

from coterie import machine
from coterie.errors import DeviceError


@pytest.fixture
def system(tmp_path, monkeypatch):
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    monkeypatch.setattr(machine, "PROC", proc)
    monkeypatch.setattr(machine, "CGROUP", cgroup)
    monkeypatch.delenv("COTERIE_RAM", raising=False)
    return proc, cgroup


def test_available_memory_is_the_systems(system):
    assert machine.memory() == machine.Memory(1024_000, 819_200)


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_less_its_usage_counts_and_its_file_cache_does_not(system, version):
    proc, cgroup = system
    group = cgroup / ("memory/a/b" if version == 1 else "a/b")
    group.mkdir(parents=True)
    (proc / "self/cgroup").write_text("5:cpu,memory:/a/b/c\n" if version == 1 else "0::/a/b/c\n")
    limit, usage = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    (group / limit).write_text("500000\n")
    (group / usage).write_text("300000\n")
    prefix = "total_" if version == 1 else ""
    (group / "memory.stat").write_text(f"{prefix}inactive_file 60000\n{prefix}active_file 40000\n")
    assert machine.memory() == machine.Memory(500_000, 300_000)


def test_the_environment_overrides_and_a_need_is_refused_with_the_numbers(system, monkeypatch):
    monkeypatch.setenv("COTERIE_RAM", "2")
    machine.require_memory(2 * 10**9, "the model")
    with pytest.raises(DeviceError, match=r"the model needs 3 GB of RAM, 2 GB of .* are available"):
        machine.require_memory(3 * 10**9, "the model")
