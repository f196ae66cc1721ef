"""Memory is compared with what there is before it is taken; machines are pretended."""

from __future__ import annotations

import pytest
import torch

from coterie import Experts, memory
from coterie.errors import DeviceError

GB = 10**9


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with the memory and control groups given: (available bytes, lines of /proc/self/cgroup, {file: text})."""

    def pretend(available: int | None, groups: str = "", files: dict[str, object] | None = None) -> None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available >> 10} kB\n" if available else "")
        (tmp_path / "cgroup").write_text(groups)
        for name, text in (files or {}).items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")
        monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
        monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
        monkeypatch.setattr(memory, "CGROUP_ROOT", tmp_path / "fs")

    return pretend


def test_of_this_machine():
    found = memory.available()
    assert found is not None and 1 << 20 < found < 1 << 50


def test_of_the_system(machine):
    machine(8 << 30)
    assert memory.available() == 8 << 30
    machine(None)
    assert memory.available() is None
    memory.check(1 << 60, "anything")


def test_of_control_groups(machine):
    """The least of all above this process; what can be dropped does not count as used."""
    stat = "anon 5000\ninactive_file 300\nactive_file 20\nshmem 7"
    inner = {"a/b/memory.max": "max", "a/b/memory.current": 5000, "a/b/memory.stat": stat}
    machine(1 << 30, "0::/a/b\n", inner)
    assert memory.available() == 1 << 30
    machine(1 << 30, "0::/a/b\n", {"a/memory.max": 9000, "a/memory.current": 6000, "a/memory.stat": stat})
    assert memory.available() == 9000 - 6000 + 320
    machine(1 << 30, "0::/a/b\n", {"memory.max": 5900, "memory.current": 6000})
    assert memory.available() == 0


def test_of_control_groups_of_the_first_version(machine):
    groups = "3:cpuset:/\n4:memory:/job\n"
    stat = "inactive_file 1\ntotal_inactive_file 100\ntotal_active_file 10"
    files = {
        "memory/job/memory.limit_in_bytes": 5000,
        "memory/job/memory.usage_in_bytes": 2000,
        "memory/job/memory.stat": stat,
        "memory/memory.limit_in_bytes": 2**63 - 4096,
        "memory/memory.usage_in_bytes": 7000,
    }
    machine(1 << 30, groups, files)
    assert memory.available() == 5000 - 2000 + 110


def test_experts_that_do_not_fit(machine):
    experts = Experts.empty(4, 1024, 1024, format="int8")
    machine(experts.nbytes - 2_500_000)
    with pytest.raises(DeviceError, match=r"packed int8 experts: expected 12\.6 MB .* found 10\.1 MB: 2\.5 MB are missing"):
        Experts.empty(4, 1024, 1024, format="int8")
    machine(experts.nbytes + 4096)
    Experts.empty(4, 1024, 1024, format="int8")


def test_bytes_that_stay_in_a_file_need_no_memory(machine):
    experts = Experts.pack(*torch.randn(3, 2, 64, 64), format="int8")
    parts = {(name, e, part): data for name, e, part, data in experts.parts()}
    machine(1 << 10)
    Experts.from_parts(2, 64, 64, experts.spec, lambda *key: parts[key], copy=False)
    with pytest.raises(DeviceError):
        Experts.from_parts(2, 64, 64, experts.spec, lambda *key: parts[key])


def test_what_the_system_refuses_all_the_same(machine):
    machine(None)
    with pytest.raises(DeviceError, match="the system refuses"):
        memory.allocate(1 << 60, "too much")
