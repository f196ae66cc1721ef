"""Programs in processes of their own that begin where torch is imported already, which takes longest of all.

They are forks of one process, which has imported what coterie and Transformers import, and neither of the two. Else
they are as `python -c`: a clean `__main__`, their own environment and session, and Python's own end. What measures how
much memory a process has, or is about what Python does when it starts, runs `python -c` itself.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping

SECONDS = 300  # more than any program here takes on a busy machine

SERVER = """
import gc, json, os, signal, socket, sys, types
import torch, torch._dynamo, torch.distributed.fsdp, torch.export, torch.utils.checkpoint
import accelerate.utils, huggingface_hub, jinja2, safetensors.torch, tokenizers
assert not sys.modules.keys() & {"coterie", "transformers", "peft"} and len(os.listdir("/proc/self/task")) == 1

def requested(control):
    # What the program is to be, in a process that waits for it.
    while True:
        request, fds, _, _ = socket.recv_fds(control, 1 << 20, 4)
        if not request:
            os._exit(0)
        if not os.fork():
            return json.loads(request), fds
        for fd in fds:
            os.close(fd)
        try:
            while os.waitpid(-1, os.WNOHANG) != (0, 0):
                pass
        except ChildProcessError:
            pass

def begin():
    gc.freeze()
    control = socket.socket(fileno=int(sys.argv[1]))
    given, (status, *streams) = requested(control)
    control.close()
    child = os.fork()
    if child:
        for fd in streams:
            os.close(fd)
        os.write(status, b"%d\\n" % child)
        os.write(status, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        os._exit(0)
    os.close(status)
    os.setsid()
    for number, fd in enumerate(streams):
        os.dup2(fd, number)
        os.close(fd)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout.reconfigure(line_buffering=os.isatty(1))
    os.environ.clear()
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    sys.argv = ["-c", *given["arguments"]]
    return given["code"]

code = begin()
sys.modules["__main__"] = main = types.ModuleType("__main__")
exec(compile(code, "<string>", "exec"), main.__dict__)
"""


@functools.cache
def _server() -> socket.socket:
    """A connection to the process that forks; it ends with this one."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    site = ["-S"] if sys.flags.no_site else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with there:
        subprocess.Popen(
            [sys.executable, *site, "-c", SERVER, str(there.fileno())],
            pass_fds=[there.fileno()],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
    return here


class Program:
    """A running program; files are those of its standard streams."""

    def __init__(
        self,
        code: str,
        *arguments: object,
        stdin: int,
        stdout: int,
        stderr: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        request = {
            "code": code,
            "arguments": [str(argument) for argument in arguments],
            "environment": dict(os.environ if environment is None else environment),
            "folder": os.getcwd(),
        }
        self._status, status = os.pipe()
        socket.send_fds(_server(), [json.dumps(request).encode()], [status, stdin, stdout, stderr])
        os.close(status)
        self._said = b""
        self.returncode: int | None = None
        self.pid = self._line(SECONDS)

    def _line(self, seconds: float) -> int:
        """The next number that the one who waits for the program says."""
        end = time.monotonic() + seconds
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._status], [], [], max(0, end - time.monotonic()))
            if not ready:
                raise subprocess.TimeoutExpired("program", seconds)
            piece = os.read(self._status, 64)
            assert piece, "the process that forks programs has ended"
            self._said += piece
        line, _, self._said = self._said.partition(b"\n")
        return int(line)

    def wait(self, seconds: float = SECONDS) -> int:
        """Its exit code; negative: the signal that ended it."""
        if self.returncode is None:
            self.returncode = self._line(seconds)
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    code: str, *arguments: object, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As subprocess.run of `python -c code arguments`, output captured."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, open(os.devnull) as nothing:
        streams = {"stdin": nothing.fileno(), "stdout": out.fileno(), "stderr": err.fileno()}
        program = Program(code, *arguments, environment=environment, **streams)
        try:
            program.wait()
        finally:
            program.kill()
        for file in (out, err):
            file.seek(0)
        return subprocess.CompletedProcess(["-c", *map(str, arguments)], program.returncode, out.read(), err.read())
