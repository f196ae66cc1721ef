"""NUMA nodes by the numbers that the kernel gives them, gaps included."""

from __future__ import annotations

import pytest

from coterie import _native


def pretend(folder, online: str, cpus: dict[int, str]) -> str:
    (folder / "online").write_text(online + "\n")
    for number, listed in cpus.items():
        (folder / f"node{number}").mkdir()
        (folder / f"node{number}" / "cpulist").write_text(listed + "\n")
    return str(folder)


@pytest.mark.parametrize(
    ("online", "cpus", "allowed", "nodes", "mask"),
    [
        ("0", {0: "0-3"}, range(4), [(0, [0, 1, 2, 3])], [0b1]),
        ("0-1", {0: "0-1,4", 1: "2-3"}, range(5), [(0, [0, 1, 4]), (1, [2, 3])], [0b11]),
        ("0,2", {0: "0-1", 2: "2-3"}, range(4), [(0, [0, 1]), (2, [2, 3])], [0b101]),
        ("1,3", {1: "0", 3: "1"}, range(2), [(1, [0]), (3, [1])], [0b1010]),
        ("0-2", {0: "0", 1: "", 2: "1"}, range(2), [(0, [0]), (2, [1])], [0b101]),  # node 1 has memory alone
        ("0-2", {0: "0", 1: "1", 2: "2"}, [0, 2], [(0, [0]), (2, [2])], [0b101]),  # 1 is not for this process
        ("0,63-64,130", {0: "0", 63: "1", 64: "2", 130: "3"}, range(4), None, [1 | 1 << 63, 1, 1 << 2]),
        ("", {}, range(4), [], []),
    ],
)
def test_numbers_of_nodes(online, cpus, allowed, nodes, mask, tmp_path):
    found, bits = _native.numa_layout(pretend(tmp_path, online, cpus), list(allowed))
    assert bits == mask
    assert nodes is None or found == nodes


def test_a_machine_that_does_not_say(tmp_path):
    assert _native.numa_layout(str(tmp_path / "absent"), [0]) == ([], [])
