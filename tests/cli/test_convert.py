"""Stopping `coterie convert` with Ctrl-C."""

import os
import signal
import subprocess
import sys

import pytest

from coterie import tiny

# Stops itself as Ctrl-C would, in the middle of the second layer.
SCRIPT = """
import os, signal, sys
from coterie import cli
from coterie.cli.convert import ConversionProgress
shown = ConversionProgress.__call__
def interrupted(self, layer, layers, expert, *rest):
    shown(self, layer, layers, expert, *rest)
    if (layer, expert) == (2, 3):
        os.kill(os.getpid(), signal.SIGINT)
ConversionProgress.__call__ = interrupted
sys.argv = ["coterie", "convert", "cpu", "-i", sys.argv[1], "-o", sys.argv[2]]
cli.main()
"""


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_ctrl_c_says_what_is_kept(tmp_path, existing):
    out = tmp_path / "out"
    if existing:
        out.mkdir()
    command = [sys.executable, "-c", SCRIPT, str(tiny.PATH), str(out)]
    default = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    ran = subprocess.run(command, capture_output=True, text=True, preexec_fn=default)
    assert ran.returncode == 130
    progress, stopped = ran.stderr.splitlines()
    assert progress.startswith("layer 1/4: ") and progress.endswith("s left")
    assert stopped == f"coterie: stopped; nothing is kept: what was written to {out} has been removed"
    assert out.exists() == existing and not (existing and os.listdir(out))
