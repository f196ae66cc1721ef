"""How much memory a piece of work takes."""

from __future__ import annotations

import ctypes
import gc
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
