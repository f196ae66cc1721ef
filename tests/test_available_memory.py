"""Memory is compared with what there is before it is taken; the machines are made up."""

from __future__ import annotations

import pytest
import torch
from engine_cases import made_of

from coterie import Experts, memory
from coterie.errors import DeviceError


@pytest.fixture
def system(tmp_path, monkeypatch):
    """(/proc, /sys/fs/cgroup) of a machine of 1 MB, of which 0.8 are available."""
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    cgroup.mkdir()
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 800 kB\n")
    monkeypatch.setattr(memory, "PROC", proc)
    monkeypatch.setattr(memory, "CGROUP", cgroup)
    monkeypatch.delenv("COTERIE_RAM", raising=False)
    return proc, cgroup


def test_of_this_machine():
    found = memory.found()
    assert 1 << 20 < found.available <= found.total < 1 << 50


def test_available_memory_is_the_systems(system):
    assert memory.found() == memory.Memory(1024_000, 819_200)


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_groups_limit_less_its_usage_counts_and_its_file_cache_does_not(system, version):
    """The least of all groups above this process."""
    proc, cgroup = system
    group = cgroup / ("memory/a/b" if version == 1 else "a/b")
    (group / "c").mkdir(parents=True)
    (proc / "self/cgroup").write_text("5:cpu,memory:/a/b/c\n" if version == 1 else "0::/a/b/c\n")
    limit, usage = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    )
    (group / "c" / limit).write_text(f"{2**63 - 4096}\n" if version == 1 else "max\n")
    (group / "c" / usage).write_text("200000\n")
    (group / limit).write_text("500000\n")
    (group / usage).write_text("300000\n")
    prefix = "total_" if version == 1 else ""
    (group / "memory.stat").write_text(f"anon 5\n{prefix}inactive_file 60000\n{prefix}active_file 40000\nshmem 7\n")
    assert memory.found() == memory.Memory(500_000, 300_000)
    (group / usage).write_text("900000\n")
    assert memory.found().available == 0


def test_the_environment_overrides_and_a_need_is_refused_with_the_numbers(system, monkeypatch):
    monkeypatch.setenv("COTERIE_RAM", "2")
    memory.require(2 * 10**9, "the model")
    with pytest.raises(DeviceError, match=r"the model needs 3 GB of RAM, 2 GB of .* are available"):
        memory.require(3 * 10**9, "the model")


def test_experts_that_do_not_fit(system, monkeypatch):
    monkeypatch.setenv("COTERIE_RAM", "10MB")
    with pytest.raises(DeviceError, match=r"packed int8 experts needs 0\.0126 GB of RAM, 0\.01 GB of"):
        Experts.empty(4, 1024, 1024, format="int8")
    monkeypatch.setenv("COTERIE_RAM", "13MB")
    Experts.empty(4, 1024, 1024, format="int8")


def test_bytes_that_stay_in_a_file_need_no_memory(system, monkeypatch):
    experts = Experts.pack(*torch.randn(3, 2, 64, 64), format="int8")
    monkeypatch.setenv("COTERIE_RAM", "1KB")
    made_of(experts.spec, (2, 64, 64), experts.packed)
    with pytest.raises(DeviceError):
        Experts.empty(2, 64, 64, format="int8")


def test_what_the_system_refuses_all_the_same(system, monkeypatch):
    monkeypatch.setenv("COTERIE_RAM", "9000000TB")
    with pytest.raises(DeviceError, match="the system refuses"):
        memory.allocate(1 << 60, "too much")
