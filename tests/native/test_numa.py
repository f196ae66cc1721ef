"""NUMA: nodes by the kernel's numbers, gaps included; memory by node; the same bits whatever the nodes.

Several nodes are pretended: work is shared out as if there were, the kernel is asked for nodes that it does not have.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from engine_cases import FORMATS, Batch, dense, name_of, options, packed
from gradient_cases import gradients, random_batch, random_lora

from coterie import Experts, _native, cpu, machine
from coterie.formats import Format

HUGE_PAGE = 2 << 20
NODES = ([0, 2], [1, 3, 4, 9])


def pretend(folder, online: str, cpus: dict[int, str]) -> str:
    (folder / "online").write_text(online + "\n")
    for number, listed in cpus.items():
        (folder / f"node{number}").mkdir()
        (folder / f"node{number}" / "cpulist").write_text(listed + "\n")
    return str(folder)


@pytest.fixture
def nodes() -> Iterator[None]:
    """The machine's nodes again."""
    yield
    _native.pretend_nodes([])


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
    found, bits, _ = _native.numa_layout(pretend(tmp_path, online, cpus), list(allowed))
    assert bits == mask
    assert nodes is None or found == nodes


def test_a_machine_that_does_not_say(tmp_path):
    assert _native.numa_layout(str(tmp_path / "absent"), [0]) == ([], [], [])


@pytest.mark.parametrize(
    ("cpus", "workers"),
    [
        ({0: "0-1", 2: "2-3"}, [0, 1, 0, 1]),
        ({0: "0", 1: "1-4"}, [0, 1, 1, 1, 1]),  # no more than a node has CPUs
        ({0: "0-2", 1: "", 5: "3-4", 7: "5"}, [0, 1, 2, 0, 1, 0]),
    ],
)
def test_workers_take_turns_over_nodes(cpus, workers, tmp_path):
    online = ",".join(map(str, cpus))
    assert _native.numa_layout(pretend(tmp_path, online, cpus), list(range(8)))[2] == workers


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("first", [[0, 40, 80], [0, 0, 60], [0, 30, 30, 50, 90]])
def test_items_go_to_their_node_and_none_is_left(first, count, nodes, threads):
    _native.pretend_nodes(list(range(len(first) - 1)))
    cpu.set_threads(count)
    taken = _native.taken_items(first)
    assert len(taken) == count and sorted(itertools.chain(*taken)) == list(range(first[-1]))
    for thread, items in enumerate(taken):
        own = thread % (len(first) - 1)
        if count > 1 and first[own + 1] > first[own]:
            assert first[own] <= items[0] < first[own + 1], thread


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_bits_do_not_depend_on_nodes(spec, nodes, threads):
    """Nor on which of them have workers; matrices of fewer blocks than there are nodes, too."""
    for sizes in ((4, 128, 256), (3, 384, 640)):
        for batch in (Batch(1, 2), Batch(5, 3), Batch(40, 2)):
            inputs = batch.tensors(sizes)
            _native.pretend_nodes([])
            expected = packed(spec, sizes)(*inputs)
            for numbers, count in itertools.product(NODES, (1, 2, 3, 7)):
                _native.pretend_nodes(numbers)
                cpu.set_threads(count)
                assert torch.equal(packed(spec, sizes)(*inputs), expected), (sizes, batch, numbers, count)


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[6], Format("fp8_block", 128)], ids=name_of)
def test_bits_of_gradients_do_not_depend_on_nodes(spec, nodes, threads):
    sizes = (4, 128, 256)
    experts, lora = Experts.pack(*dense(sizes), **options(spec)), random_lora(sizes, 8, torch.float32)
    for tokens in (1, 40):
        x, ids, weights, grad = random_batch(sizes, 2, tokens)

        def found(x=x, ids=ids, weights=weights, grad=grad):
            return gradients(lambda x, w, adapter: experts(x, ids, w, lora=adapter), x, weights, lora, grad)

        _native.pretend_nodes([])
        expected = found()
        for numbers, count in itertools.product(NODES, (1, 3)):
            _native.pretend_nodes(numbers)
            cpu.set_threads(count)
            for name, value in found().items():
                assert torch.equal(value, expected[name]), (name, tokens, numbers, count)


def test_packing_does_not_depend_on_nodes(nodes):
    sizes = (3, 384, 640)
    expected = packed(FORMATS[6], sizes)
    _native.pretend_nodes([0, 2])
    experts = Experts.pack(*dense(sizes), **options(FORMATS[6]))
    assert all(torch.equal(experts.packed(e), expected.packed(e)) for e in range(sizes[0]))


def owners(count: int, hidden: int, intermediate: int, nodes: int) -> tuple[list[int], float]:
    """Of bf16 experts: the node of each huge page, and the share of the bytes that lie on the node that computes them,
    counted anew."""
    experts = Experts(count, hidden, intermediate, Format("bf16"))
    found = _native.page_owners(*experts._layer._layouts, count, experts.expert_nbytes, nodes)
    computed, start = [], 0
    for _ in range(count):
        for rows, cols in ((intermediate, hidden), (intermediate, hidden), (hidden, intermediate)):
            blocks, size = rows // 64, 64 * cols * 2
            computed += [next(n for n in range(nodes) if b < blocks * (n + 1) // nodes) for b in range(blocks)
                         for _ in range(size // 4096)]  # fmt: skip
            start += rows * cols * 2
    assert start == experts.nbytes and len(found) == -(-start // HUGE_PAGE)
    return found, sum(found[i * 4096 // HUGE_PAGE] == node for i, node in enumerate(computed)) / len(computed)


@pytest.mark.parametrize(
    ("count", "hidden", "intermediate", "nodes", "local"),
    [
        (8, 4096, 8192, 2, 1.0),  # a part of a matrix is 16 pages
        (8, 4096, 8192, 4, 1.0),
        (8, 4096, 8192, 3, 0.93),  # 10.7 pages
        (16, 2880, 2880, 2, 0.93),  # 4
        (16, 2880, 2880, 4, 0.86),  # 2
        (16, 2880, 2880, 8, 0.73),  # 1
        (16, 2048, 768, 2, 0.6),  # .75
        (64, 2048, 768, 8, 0.15),  # .19: little more than in turns
        (4, 64, 64, 4, 0.0),  # all in one page
    ],
)
def test_pages_of_nodes(count, hidden, intermediate, nodes, local):
    found, share = owners(count, hidden, intermediate, nodes)
    assert share >= local
    pages = Counter(found)
    part = -(-hidden * intermediate * 2 // nodes // HUGE_PAGE) + 1
    assert max(pages.values()) - min(pages[n] for n in range(nodes)) <= part + 4


def test_one_node_has_every_page():
    assert set(owners(4, 4096, 2048, 1)[0]) == {0}


def real_node() -> int:
    """The one whose memory this process gets."""
    (found,) = Experts.pack(*dense((4, 128, 256))).numa_bytes()
    assert found[1] is not None
    return found[1]


one_node = pytest.mark.skipif(_native.numa_nodes() > 1, reason="this machine has several nodes")
several_nodes = pytest.mark.skipif(_native.numa_nodes() == 1, reason="this machine has one node")


@one_node
def test_memory_of_one_node_is_taken_when_it_is_written():
    experts = Experts.empty(3, 2048, 2048)
    ((_, held_by),) = experts.numa_bytes()
    assert held_by is None
    experts.packed(1).fill_(0)
    found = experts.numa_bytes()
    node, matrices = real_node(), experts.nbytes // 3
    assert set(found) == {(node, None), (node, node)} and sum(found.values()) == experts.nbytes
    assert matrices <= found[node, node] <= matrices + 2 * HUGE_PAGE


@one_node
@pytest.mark.parametrize("numbers", NODES)
def test_memory_of_several_nodes_is_taken_at_once(numbers, nodes):
    node = real_node()
    _native.pretend_nodes(numbers)
    experts = Experts.empty(3, 2048, 2048)
    found = experts.numa_bytes()
    assert set(found) == {(number, node) for number in numbers}
    assert sum(found.values()) == experts.nbytes and len(set(found.values())) == 1
    assert not any(experts.packed(e).any() for e in range(3))


def test_mapped_files_are_read_where_they_lie(tmp_path, nodes):
    sizes = (4, 128, 256)
    inputs, expected = Batch(5, 3).tensors(sizes), packed(FORMATS[6], sizes)
    expected.save(tmp_path / "experts-00000.safetensors")
    _native.pretend_nodes([0, 2])
    experts = Experts.open(tmp_path / "experts-00000.safetensors", mmap=True)
    assert torch.equal(experts(*inputs), expected(*inputs))
    assert {computed_by for computed_by, _ in experts.numa_bytes()} == {0, 2}


def test_placing_needs_no_mapping_for_each_range_of_pages(nodes):
    """Linux gives a process 65530 mappings, and a large model has more ranges than that."""

    def mappings() -> int:
        with open("/proc/self/maps") as file:
            return len(file.readlines())

    _native.pretend_nodes([0, 2])
    kept = [Experts.empty(4, 2048, 4096)]  # and the stacks of threads
    before = mappings()
    kept.append(Experts.empty(4, 2048, 4096))
    owner = _native.page_owners(*kept[1]._layer._layouts, 4, kept[1].expert_nbytes, 2)
    assert sum(a != b for a, b in itertools.pairwise(owner)) > 10
    assert mappings() - before <= 3


@one_node
def test_shares_of_one_node_pretending(nodes):
    node = real_node()
    assert machine.numa_shares() == {}
    _native.pretend_nodes([node, 900])
    assert machine.numa_shares() == {node: 1.0, 900: 0.0}


@several_nodes
def test_memory_of_real_nodes_is_taken_where_it_is_computed():
    """All but the pages that are shared by parts of matrices."""
    shares = machine.numa_shares()
    assert len(shares) == _native.numa_nodes() and min(shares.values()) > 0.8
    experts = Experts.empty(4, 4096, 2048 * len(shares), format="bf16")  # a node's part of a matrix is eight huge pages
    found = experts.numa_bytes()
    assert set(found) == {(node, node) for node in shares} and len(set(found.values())) == 1
