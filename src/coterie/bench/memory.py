"""How much memory a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from pathlib import Path

from coterie import _native
from coterie.errors import DeviceError

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def resident() -> int:
    """Bytes of this process that are in RAM."""
    return status("VmRSS")


def peak_rise(work: Callable[[], object]) -> int:
    """Bytes by which the memory of this process rises, at its highest, above what it is before `work()`.

    What can be given back to the system is given back first, coterie's workspace too, so that it counts as the work's.
    Raises DeviceError where Linux's /proc/self/clear_refs cannot be written.
    """
    release()
    restart_peak()
    before = resident()
    work()
    return status("VmHWM") - before


def release() -> None:
    """Gives memory back: cycles of garbage, coterie's workspace, pages of freed memory that the allocator kept."""
    gc.collect()
    _native.release_workspace()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc
        libc.malloc_trim(0)


def restart_peak() -> None:
    """From now on VmHWM counts anew. Raises DeviceError where Linux's /proc/self/clear_refs cannot be written."""
    try:
        CLEAR.write_text("5")
    except OSError as error:
        raise DeviceError(f"the peak of memory cannot be measured here: writing {CLEAR} failed ({error})") from None


def status(key: str) -> int:
    """Bytes that /proc/self/status says, of VmHWM say."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key + ":"))


class AnonymousPeak:
    """The most memory of its own that this process has in a `with` block: no pages of files, which cost nobody RAM.

    Linux keeps no such peak: a thread looks every 20 ms, which is for work of seconds.
    """

    def __init__(self) -> None:
        self.nbytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> AnonymousPeak:
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._ended.wait(0.02):
            self._look()

    def _look(self) -> None:
        self.nbytes = max(self.nbytes, status("RssAnon"))
