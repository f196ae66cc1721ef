"""What the engine says of this machine, and what it says to wrong settings."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import forks
import pytest
from instruction_sets import ISAS

from coterie import cpu
from coterie.errors import ArgumentError, CoterieError, DeviceError

THREADS = "import coterie; print(coterie.cpu.threads())"
EVERY_ISA = ("amx", "avx512_bf16", "avx512_vnni", "avx512", "avx2_vnni", "avx2", "scalar")


def in_a_new_process(program: str, **environment: str) -> str:
    done = forks.run(program, environment=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def error_of(statement: str, **environment: str) -> str:
    program = f"""
try:
    import coterie
    {statement}
except Exception as error:
    print(type(error).__name__, error)
"""
    return in_a_new_process(program, **environment)


def test_info():
    info = cpu.info()
    assert info.isa in info.isas and set(info.isas) <= set(EVERY_ISA)
    assert info.isas[-1] == "scalar" and "amx_emulated" not in info.isas
    assert info.cores >= 1 and info.threads >= 1 and info.numa_nodes >= 1
    assert info.isa_reason and info.model and info.huge_pages


def test_use_isa(isa):
    assert cpu.current_isa() == isa == cpu.info().isa


def test_unknown_isa_is_refused_and_changes_nothing():
    before = cpu.current_isa()
    with pytest.raises(DeviceError, match=r"sse9 is not an instruction set; expected one of .*avx2.*scalar"):
        cpu.use_isa("sse9")
    assert cpu.current_isa() == before


@pytest.mark.parametrize("name", [isa for isa in EVERY_ISA if isa not in ISAS])
def test_an_isa_this_cpu_lacks(name):
    with pytest.raises(DeviceError, match="this CPU does not have it"):
        cpu.use_isa(name)
    assert error_of("coterie.cpu.info()", COTERIE_ISA=name).startswith(f"DeviceError COTERIE_ISA={name}: this CPU")


def test_isa_from_the_environment():
    program = "import coterie; print(coterie.cpu.info().isa, '|', coterie.cpu.info().isa_reason)"
    assert in_a_new_process(program, COTERIE_ISA="scalar") == "scalar | forced by COTERIE_ISA"
    assert in_a_new_process(program, COTERIE_ISA="").endswith("the fastest this CPU has")


@pytest.mark.parametrize(
    "statement",
    ["coterie.cpu.info()", "coterie.Experts.empty(1, 64, 64)", "coterie.cpu.use_isa('scalar')"],
)
def test_nonsense_in_the_environment(statement):
    found = error_of(statement, COTERIE_ISA="nonsense")
    assert found.startswith("DeviceError COTERIE_ISA=nonsense is not an instruction set; expected one of")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5", "²", "4096", " "])
def test_bad_threads_in_the_environment(value, monkeypatch):
    monkeypatch.setenv("COTERIE_THREADS", value)
    with pytest.raises(ArgumentError, match=rf"COTERIE_THREADS: .* found '{re.escape(value)}'"):
        cpu.read_environment()


def test_bad_threads_in_the_environment_stop_the_import():
    assert error_of("coterie.cpu.threads()", COTERIE_THREADS="two").startswith("ArgumentError COTERIE_THREADS")


def test_threads_from_the_environment():
    assert in_a_new_process(THREADS, COTERIE_THREADS="3") == "3"


@pytest.mark.parametrize(
    ("processes", "launcher_cpus", "asked", "expected"),
    [
        ("2", 8, "", 4),
        ("3", 8, "", 2),
        ("20", 8, "", 1),
        ("2", 16, "", 11),  # the launcher has bound this process to 8 of its 16 CPUs: they are its own
        ("2", 8, "7", 7),
        ("1", 8, "", 11),
        ("", 8, "", 11),
        ("many", 8, "", 11),
    ],
)
def test_processes_of_a_launcher_share_the_cpus(processes, launcher_cpus, asked, expected, monkeypatch, threads):
    cpu.set_threads(11)
    monkeypatch.setattr(cpu._native, "available_cpus", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(launcher_cpus if pid else 8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.setenv("COTERIE_THREADS", asked)
    cpu.read_environment()
    assert cpu.threads() == expected


def test_set_threads(threads):
    for count in (1, 5, 1024):
        cpu.set_threads(count)
        assert cpu.threads() == count == cpu.info().threads


@pytest.mark.parametrize("count", [0, -1, 1025, 2.0, "2", None, True])
def test_set_threads_refuses(count):
    before = cpu.threads()
    with pytest.raises(ArgumentError, match="threads: expected a whole number from 1 to 1024, found"):
        cpu.set_threads(count)
    assert cpu.threads() == before


def test_errors_have_one_base():
    assert issubclass(DeviceError, CoterieError) and issubclass(ArgumentError, (CoterieError, ValueError))


@pytest.mark.parametrize(
    ("first", "environment", "found"),
    [
        ("coterie", {}, "1000 False"),
        ("torch", {}, "None True"),
        ("torch", {"OMP_WAIT_POLICY": "PASSIVE"}, "None False"),
        ("coterie", {"GOMP_SPINCOUNT": "7"}, "7 False"),
        ("coterie", {"OMP_WAIT_POLICY": "active"}, "None False"),
    ],
)
def test_openmp_threads_soon_sleep(first, environment, found, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    program = f"import os, {first}, coterie; print(os.environ.get('GOMP_SPINCOUNT'), coterie.cpu.openmp_spins)"
    command = [sys.executable, *(["-S"] if sys.flags.no_site else []), "-c", program]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == found


def test_what_spins_is_said_once(monkeypatch, caplog):
    cpu.warn_of_spinning.cache_clear()
    monkeypatch.setattr(cpu, "openmp_spins", True)
    for _ in range(2):
        cpu.warn_of_spinning()
    assert [record.message.count("Import coterie first") for record in caplog.records] == [1]
