"""The engine's threads in a worker of vLLM, which OpenMP binds to a CPU; without vLLM."""

from __future__ import annotations

import os

import forks
import pytest

from coterie.vllm import threads

WORKER = """
import os
first, second = sorted(os.sched_getaffinity(0))[:2]
os.environ["OMP_PLACES"] = "{%d,%d}" % (first, second)
before = set(os.listdir("/proc/self/task"))
os.sched_setaffinity(0, {first})  # as OpenMP does
import coterie
from coterie.vllm.threads import start_threads
start_threads()
started = set(os.listdir("/proc/self/task")) - before
assert os.sched_getaffinity(0) == {first}
assert coterie.cpu.threads() == 2
assert [os.sched_getaffinity(int(thread)) for thread in started] == [{first, second}], started
print("well")
"""


@pytest.mark.parametrize(
    ("variable", "text", "cpus"),
    [
        ("KMP_AFFINITY", "granularity=fine,explicit,proclist=[0,1]", {0, 1}),
        ("GOMP_CPU_AFFINITY", "2 3 5", {2, 3, 5}),
        ("OMP_PLACES", "{4,5}", {4, 5}),
        ("OMP_PLACES", "cores", set()),
        ("OMP_PLACES", "", set()),
    ],
)
def test_a_workers_cpus_are_those_vllm_bound_it_to(monkeypatch, variable, text, cpus):
    for name in threads.BINDINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, text)
    assert threads.worker_cpus() == cpus


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_threads_run_on_all_of_a_workers_cpus_though_its_own_is_bound():
    done = forks.run(WORKER, environment=os.environ | {"OMP_NUM_THREADS": "1", "COTERIE_THREADS": ""})
    assert done.stdout == "well\n", done.stderr
