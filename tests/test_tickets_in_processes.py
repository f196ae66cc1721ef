"""Forwards in the background and what happens to a process: forks, signals, threads that wait, the end."""

import os
import signal

import forks
import pytest
from programs import program, run


def test_a_forked_child_cannot_wait_for_its_parents_tickets():
    """Neither for one in the queue nor for a finished one. It has what the parent waited for, and submits its own."""
    run("""
        from coterie import _native
        from coterie.errors import TicketError

        def lost(*tickets):
            for ticket in tickets:
                assert ticket.done
                try:
                    ticket.wait()
                except TicketError as error:
                    assert "submit the work here" in str(error)
                else:
                    return False
            return True

        def submits():
            return all(torch.equal(experts.submit(x, ids, weights).wait(), expected) for _ in range(3))

        waited, finished = experts.submit(x, ids, weights), experts.submit(x, ids, weights)
        waited.wait()
        while not finished.done:
            time.sleep(0.001)
        for _ in range(3):
            flag = torch.zeros(1, dtype=torch.uint8)
            hold, pending = _native.submit_hold(flag.data_ptr(), flag), experts.submit(x, ids, weights)
            child = os.fork()
            if not child:
                good = lost(finished, pending) and torch.equal(waited.wait(), expected) and submits()
                mine = experts.submit(x, ids, weights)
                grandchild = os.fork()
                if not grandchild:
                    os._exit(0 if lost(finished, pending, mine) and submits() else 1)
                good = good and os.waitpid(grandchild, 0)[1] == 0 and torch.equal(mine.wait(), expected)
                del finished, pending, hold
                os._exit(0 if good else 1)
            assert os.waitpid(child, 0)[1] == 0 and not pending.done
            flag.fill_(1)
            assert torch.equal(pending.wait(), expected)
    """)


def test_fork_while_tickets_are_computed():
    run("""
        for _ in range(20):
            tickets = [experts.submit(x, ids, weights) for _ in range(50)]
            child = os.fork()
            if not child:
                same = torch.equal(experts.submit(x, ids, weights).wait(), expected)
                os._exit(0 if same and torch.equal(experts(x, ids, weights), expected) else 1)
            assert os.waitpid(child, 0)[1] == 0
            assert all(torch.equal(ticket.wait(), expected) for ticket in tickets)
    """)


def test_a_forked_child_lets_go_of_its_parents_tickets():
    run("""
        import weakref
        from coterie import _native
        array = x.numpy().copy()
        memory, given = weakref.ref(array), torch.from_numpy(array)
        flag = torch.zeros(1, dtype=torch.uint8)
        _native.submit_hold(flag.data_ptr(), flag)
        experts.submit(given, ids, weights)
        del array, given
        child = os.fork()
        if not child:
            alive = memory() is not None
            experts.submit(x, ids, weights).wait()
            os._exit(0 if alive and memory() is None else 1)
        assert os.waitpid(child, 0)[1] == 0 and memory() is not None
        flag.fill_(1)
    """)


def test_other_threads_run_while_one_waits():
    run("""
        from coterie import _native
        flag = torch.zeros(1, dtype=torch.uint8)
        hold = _native.submit_hold(flag.data_ptr(), flag)
        threading.Timer(0.05, flag.fill_, [1]).start()
        hold.wait()
    """)


def test_ctrl_c_ends_the_waiting_alone():
    run("""
        import signal
        from coterie import _native
        flag = torch.zeros(1, dtype=torch.uint8)
        hold, ticket = _native.submit_hold(flag.data_ptr(), flag), experts.submit(x, ids, weights)
        signal.signal(signal.SIGALRM, signal.default_int_handler)
        for waiting in (ticket, hold):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.05)
                waiting.wait()
            except KeyboardInterrupt:
                pass
            else:
                raise AssertionError("not interrupted")
        flag.fill_(1)
        assert torch.equal(ticket.wait(), expected)
    """)


@pytest.mark.parametrize("drop", [True, False])
def test_exit_with_tickets_in_flight(drop):
    run(f"""
        many = torch.randn(4096, 96), torch.randint(0, 4, (4096, 2)), torch.rand(4096, 2)
        tickets = [experts.submit(many[0].clone(), *many[1:]) for _ in range(100)]
        if {drop}:
            del tickets, experts, many
        sys.exit(0)
    """)


def test_tickets_after_the_end():
    """What was begun is finished, what was not is lost, and nothing more is taken."""
    script = """
        from coterie import _native
        from coterie.errors import TicketError

        flag = torch.zeros(1, dtype=torch.uint8)
        hold = _native.submit_hold(flag.data_ptr(), flag)
        tickets = [experts.submit(x, ids, weights) for _ in range(3)]

        def finish():
            while not all(ticket.done for ticket in tickets):
                time.sleep(0.001)
            assert not hold.done
            flag.fill_(1)

        def after_the_end():
            assert hold.done
            for ticket in tickets:
                try:
                    ticket.wait()
                except TicketError as error:
                    print(error)
            try:
                experts.submit(x, ids, weights)
            except TicketError as error:
                print(error)
            assert torch.equal(experts(x, ids, weights), expected)
            print("end")

        threading.Thread(target=finish, daemon=True).start()
    """
    registered_before = "import atexit; atexit.register(lambda: after_the_end())"  # and so called last
    lost = "Python ended before this ticket's turn came"
    refused = "Python is ending, and nothing is computed in the background any more"
    assert run(script, registered_before).splitlines() == [lost] * 3 + [refused, "end"]


def test_exit_while_threads_wait():
    """Daemon threads, which may end as those that compute may: see tests/native/test_threads.py."""
    script = """
        from coterie.errors import TicketError
        def work():
            try:
                while True:
                    experts.submit(x, ids, weights).wait()
            except TicketError:
                pass
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.05)
        print("end", flush=True)
    """
    done = forks.run(program(script))
    assert done.stdout == "end\n" and done.returncode in (0, -signal.SIGABRT), done.stderr


def test_exit_of_a_forked_child():
    run("""
        tickets = [experts.submit(x, ids, weights) for _ in range(50)]
        for submits in (False, True):
            child = os.fork()
            if not child:
                if submits:
                    mine = [experts.submit(x, ids, weights) for _ in range(50)]
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
        assert all(torch.equal(ticket.wait(), expected) for ticket in tickets)
    """)


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="a sanitizer dies where memory is refused")
def test_where_the_system_gives_no_thread():
    """The work is done before submit returns; once there are threads, in the background."""
    run("""
        import resource
        limit = resource.getrlimit(resource.RLIMIT_AS)
        size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + (4 << 20), limit[1]))
        before = len(os.listdir("/proc/self/task"))
        for _ in range(3):
            ticket = experts.submit(x, ids, weights)
            assert ticket.done and torch.equal(ticket.wait(), expected)
        assert len(os.listdir("/proc/self/task")) == before
        resource.setrlimit(resource.RLIMIT_AS, limit)
        assert torch.equal(experts.submit(x, ids, weights).wait(), expected)
        assert len(os.listdir("/proc/self/task")) == before + 1
    """)
