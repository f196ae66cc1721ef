"""The thread pool: the same bits however many threads, and no hang under fork, several Python threads, or exit."""

from __future__ import annotations

import os
import signal

import forks
import pytest
import torch
from engine_cases import FORMATS, Batch, name_of, packed
from programs import program, run
from python_threads import compute_at_once

from coterie import _native, cpu

SIZES = (4, 128, 256)


@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_bits_depend_on_neither_threads_nor_repeats(isa, spec, threads):
    for batch in (Batch(1, 2), Batch(5, 3), Batch(40, 2)):
        inputs = batch.tensors(SIZES)
        cpu.set_threads(1)
        expected = packed(spec, SIZES)(*inputs)
        for count in (1, 2, 3, 7):
            cpu.set_threads(count)
            for _ in range(2):
                assert torch.equal(packed(spec, SIZES)(*inputs), expected), (batch, count)


@pytest.mark.parametrize("spec", [FORMATS[0], FORMATS[6]], ids=name_of)
def test_python_threads_take_turns(spec, threads):
    """Among them one that keeps changing the number of threads."""
    batches = [Batch(tokens, 2).tensors(SIZES) for tokens in (1, 3, 17, 40)]
    expected = [packed(spec, SIZES)(*inputs) for inputs in batches]
    wrong = []

    def compute(number: int) -> None:
        for _ in range(30):
            if not torch.equal(packed(spec, SIZES)(*batches[number]), expected[number]):
                wrong.append(number)

    compute_at_once(compute, len(batches))
    assert not wrong


def test_a_forked_child_computes():
    run("""
        for _ in range(3):
            child = os.fork()
            if not child:
                same = torch.equal(experts(x, ids, weights), expected)
                os._exit(0 if same and coterie.cpu.threads() == 3 else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert torch.equal(experts(x, ids, weights), expected)
    """)


def test_fork_while_another_thread_computes():
    run("""
        done = False
        def work():
            while not done:
                experts(x, ids, weights)
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(10):
            child = os.fork()
            if not child:
                os._exit(0 if torch.equal(experts(x, ids, weights), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
        done = True
        thread.join()
    """)


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""),
    reason="a lock of the sanitizer's allocator that another thread holds at a fork stays held in the child",
)
def test_fork_while_the_pool_is_resized():
    """Another thread computes and a third one changes the number of threads, here and in the children."""
    run("""
        done = False
        def work():
            while not done:
                assert torch.equal(experts(x, ids, weights), expected)
        def resize():
            while not done:
                for count in (1, 5, 2):
                    coterie.cpu.set_threads(count)
                    time.sleep(0.0003)
        threads = [threading.Thread(target=work), threading.Thread(target=resize)]
        for thread in threads:
            thread.start()
        for _ in range(30):
            child = os.fork()
            if not child:
                same = True
                for count in (2, 1, 4):
                    coterie.cpu.set_threads(count)
                    same = same and torch.equal(experts(x, ids, weights), expected)
                os._exit(0 if same else 1)
            assert os.waitpid(child, 0)[1] == 0
        done = True
        for thread in threads:
            thread.join()
    """)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer dies where memory is refused")
def test_fewer_threads_than_wanted():
    """Where the system refuses a thread, the others do the work."""
    run("""
        import resource
        for count in (64, 1):
            coterie.cpu.set_threads(count)
            experts(x, ids, weights)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (256 << 20), resource.RLIM_INFINITY))
        coterie.cpu.set_threads(64)
        for _ in range(3):
            assert torch.equal(experts(x, ids, weights), expected)
        assert 2 < len(os.listdir("/proc/self/task")) < 60
    """)


def test_grandchildren_compute():
    run("""
        child = os.fork()
        if not child:
            experts(x, ids, weights)
            grandchild = os.fork()
            if not grandchild:
                os._exit(0 if torch.equal(experts(x, ids, weights), expected) else 1)
            os._exit(os.waitpid(grandchild, 0)[1])
        assert os.waitpid(child, 0)[1] == 0
    """)


def test_exit_while_workers_sleep():
    assert run("time.sleep(0.05); print('end')") == "end\n"


def test_exit_waits_for_threads_that_compute():
    run("""
        def work():
            for _ in range(300):
                assert torch.equal(experts(x, ids, weights), expected)
        for _ in range(2):
            threading.Thread(target=work).start()
        sys.exit(0)
    """)


def test_exit_does_not_wait_for_daemon_threads():
    """Before Python 3.14 such a thread ends within C++, of which a thread that runs torch alone dies too: no hang."""
    script = """
        def work():
            while True:
                experts(x, ids, weights)
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
        print("end", flush=True)
    """
    done = forks.run(program(script))
    assert done.stdout == "end\n" and done.returncode in (0, -signal.SIGABRT), done.stderr


def test_exit_of_a_forked_child_that_never_computed():
    run("""
        child = os.fork()
        if not child:
            sys.exit(0)
        assert os.waitpid(child, 0)[1] == 0
    """)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize(("no_memory", "error"), [(True, MemoryError), (False, RuntimeError)])
def test_what_a_worker_throws_reaches_the_caller(count, no_memory, error, threads):
    """Thrown by the caller's own thread (0) or by another one, again and again; the pool computes on."""
    spec, inputs = FORMATS[6], Batch(40, 2).tensors(SIZES)
    expected = packed(spec, SIZES)(*inputs)
    cpu.set_threads(count)
    for thread in range(count):
        for _ in range(3):
            with pytest.raises(error, match=None if no_memory else "thrown by a worker"):
                _native.throw_in_worker(thread, no_memory)
            assert torch.equal(packed(spec, SIZES)(*inputs), expected)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer dies where memory is refused")
def test_memory_that_is_refused_during_a_layer():
    """An error of the call that wanted it; once there is memory, the next one computes."""
    run("""
        import resource
        many = torch.randn(4096, 96), torch.randint(0, 4, (4096, 4)), torch.rand(4096, 4)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 20), resource.RLIM_INFINITY))
        for _ in range(2):
            try:
                experts(*many)
            except (MemoryError, RuntimeError):
                pass
            else:
                raise AssertionError("there was memory")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        assert torch.equal(experts(x, ids, weights), expected)
        assert experts(*many).isfinite().all()
    """)
