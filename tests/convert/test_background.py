"""One call at a time beside the caller's own work, and none left behind."""

import threading

import pytest

from coterie.convert.background import Background


def test_calls_are_in_order_and_overlap_the_caller():
    done, start = [], threading.Event()

    def first():
        assert start.wait(60)
        done.append(1)

    with Background() as background:
        background.run(first)
        assert done == []
        start.set()
        background.run(done.append, 2)
        assert done[:1] == [1]
        background.run(done.append, 3)
    assert done == [1, 2, 3]


@pytest.mark.parametrize("more", [False, True], ids=["at the end", "at the next call"])
def test_an_error_reaches_the_caller(more):
    after = []
    with pytest.raises(OSError, match="full"), Background() as background:
        background.run(fail)
        if more:
            background.run(after.append, 1)
            raise AssertionError("not reached")
    assert after == []


def fail():
    raise OSError("full")


def test_the_callers_error_waits_for_the_call():
    done, left = [], threading.Event()

    def slow():
        left.wait(0.2)
        done.append(1)

    with pytest.raises(KeyboardInterrupt), Background() as background:
        background.run(slow)
        raise KeyboardInterrupt
    assert done == [1]
