"""What `coterie convert` says of quantised checkpoints, and when it is stopped with Ctrl-C."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
from made_checkpoints import write_checkpoint
from quantised_checkpoints import GPTQ, gptq, quantised, quantised_as

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


def test_says_what_becomes_of_codes(tmp_path, coterie):
    tensors, config, _ = quantised("fp8 by blocks")
    folder = write_checkpoint(tmp_path / "in", tensors, config)
    kept = coterie("convert", "cpu", "-i", str(folder), "-o", str(tmp_path / "kept"))
    assert kept.code == 0 and "Codes and scales of the experts are the checkpoint's own." in kept.out
    anew = coterie("convert", "cpu", "-i", str(folder), "-o", str(tmp_path / "anew"), "--quant-method", "int4")
    said = " ".join(anew.out.split())
    assert anew.code == 0 and "quantised already (fp8_block), and these errors come on top" in said
    assert "checkpoint's own" not in said and "makes a better int4" in said


def test_says_what_a_format_cannot_hold(tmp_path, coterie):
    """f16 scales, and columns whose groups are no neighbours."""
    for name, scattered in (("in order", False), ("in act-order", True)):
        tensors, config, _ = quantised_as(partial(gptq, scattered=scattered), GPTQ)
        folder = write_checkpoint(tmp_path / name, tensors, config)
        ran = coterie("convert", "cpu", "-i", str(folder), "-o", str(tmp_path / f"{name} out"))
        said = " ".join(ran.out.split())
        assert ran.code == 0
        assert ("Codes of the experts are the checkpoint's own, their scales rounded to bf16." in said) != scattered
        assert ("18 of 18 matrices have codes that no format holds" in said) == scattered
