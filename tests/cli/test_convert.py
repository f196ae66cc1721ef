"""What `coterie convert` says of quantised checkpoints, and when it is stopped with Ctrl-C."""

import errno
import io
import json
import os
from functools import partial

import forks
import pytest
import torch
from made_checkpoints import CONFIG, two_layers, write_checkpoint
from quantised_checkpoints import GPTQ, gptq, quantised, quantised_as
from rich.console import Console

from coterie import tiny
from coterie.checkpoints.folder import PACKED_INDEX
from coterie.checkpoints.packed import UNFINISHED
from coterie.cli import progress as shown_progress

# Stops itself as Ctrl-C would, in the middle of a layer.
SCRIPT = """
import os, signal, sys
from coterie import cli
from coterie.cli.progress import ConversionProgress
shown = ConversionProgress.__call__
def interrupted(self, layer, layers, expert, *rest):
    shown(self, layer, layers, expert, *rest)
    if (layer, expert) == (int(stop), 3):
        os.kill(os.getpid(), signal.SIGINT)
ConversionProgress.__call__ = interrupted
source, output, stop, *more = sys.argv[1:]
sys.argv = ["coterie", "convert", "cpu", "-i", source, "-o", output, *more]
cli.main()
"""


def stopped_in(layer, out, *more):
    """A conversion that is stopped in a layer, counted from 1."""
    return forks.run(SCRIPT, tiny.PATH, out, layer, *more)


@pytest.mark.parametrize("layer", [1, 2])
def test_ctrl_c_says_what_is_kept(tmp_path, coterie, layer):
    out = tmp_path / "out"
    ran = stopped_in(layer, out)
    assert ran.returncode == 130
    *progress, stopped = ran.stderr.splitlines()
    assert len(progress) == layer - 1
    assert all(line.startswith("layer 1/4: 1.57 MB of 6.29 MB, ") and line.endswith("s left") for line in progress)
    if layer == 1:
        assert stopped == f"coterie: stopped; nothing is kept: what was written to {out} has been removed"
        assert not out.exists()
        return
    said = f"1 finished layer is kept in {out}: go on by the same command with --resume"
    assert stopped == f"coterie: stopped; {said}"
    resumed = coterie("convert", "cpu", "-i", tiny.PATH, "-o", out, "--resume")
    assert resumed.code == 0 and "4 layers, 1 of them before" in resumed.out
    assert [line.partition(":")[0] for line in resumed.err.splitlines()] == ["layer 2/4", "layer 3/4", "layer 4/4"]
    assert PACKED_INDEX in os.listdir(out) and UNFINISHED not in os.listdir(out)


def test_ctrl_c_in_the_first_layer_of_a_resumed_conversion(tmp_path):
    out = tmp_path / "out"
    stopped_in(2, out)
    ran = stopped_in(1, out, "--resume-layer", "0")
    assert ran.returncode == 130 and f"stopped; no finished layer is kept in {out}: go on" in ran.stderr
    assert (out / UNFINISHED).exists()


def test_a_disk_that_fills_up_keeps_finished_layers(tmp_path, coterie, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("coterie.checkpoints.tensorwriter.shutil.copyfileobj", full)
    out = tmp_path / "out"
    ran = coterie("convert", "cpu", "-i", tiny.PATH, "-o", out)
    assert ran.code == 2 and "No space left on device" in ran.err and "4 finished layers are kept" in ran.err
    assert ran.err.splitlines()[-1].startswith("coterie: cannot write ")
    monkeypatch.undo()
    assert coterie("convert", "cpu", "-i", tiny.PATH, "-o", out, "--resume").code == 0


def test_bars_on_a_terminal(monkeypatch):
    screen = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(shown_progress, "errors", screen)
    with shown_progress.ConversionProgress() as progress:
        progress(2, 3, 4, 5, 10**9, 4 * 10**9)
    text = screen.file.getvalue()
    assert "layer 2/3" in text and "expert 4/5" in text and "1 GB of 4 GB" in text and "s left" in text


def test_threadpool_count_and_gpu_change_nothing(tmp_path, coterie):
    command = ("convert", "cpu", "-i", tiny.PATH, "-o", tmp_path / "out", "--layers", "0", "--threadpool-count", "2")
    ran = coterie(*command, "--cpuinfer-threads", "1", "--gpu")
    assert ran.code == 0 and "one layout serves any number of NUMA nodes" in ran.err and "it is the CPU" in ran.err
    assert coterie(*command[:-1], "0").code == 2


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


SHARD = "model-00001-of-00002.safetensors"


def without_config(folder):
    (folder / "config.json").unlink()


def without_experts(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    write_checkpoint(folder, {"lm_head.weight": torch.zeros(2, 2)})


def without_a_shard(folder):
    (folder / SHARD).unlink()


def truncated(folder):
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 1)


def configured(**changed):
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | changed))


BAD = {
    "not a model folder": (without_config, "is not a model folder: it has no config.json"),
    "no experts": (without_experts, "no experts found; the names tried: *.layers.{L}."),
    "a missing shard": (without_a_shard, "1 of the 2 shards named in"),
    "a truncated shard": (truncated, f"{SHARD} is truncated in tensor"),
    "an unknown activation": (configured(hidden_act="novel"), "experts with activation 'novel' are not supported"),
    "another number of experts": (configured(num_experts=9), "3 experts, config.json says 9"),
    "an unknown method": (configured(quantization_config={"quant_method": "novel"}), "is quantised by novel"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("command", ["cpu", "merge", "verify"])
def test_a_bad_source_is_one_line_and_leaves_nothing(tmp_path, coterie, case, command):
    change, message = BAD[case]
    source, _ = two_layers(tmp_path / "in", shards=2)
    packed, out = tmp_path / "packed", tmp_path / "out"
    assert coterie("convert", "cpu", "-i", source, "-o", packed).code == 0
    change(source)
    arguments = {
        "cpu": ("-i", source, "-o", out),
        "merge": ("-i", packed, "-o", out, "--original-path", source),
        "verify": (packed, source),
    }
    ran = coterie("convert", command, *arguments[command])
    assert ran.code == 2 and message in ran.err
    assert ran.err.startswith("coterie: ") and ran.err.count("\n") == 1 and ran.out == ""
    assert not out.exists()


def test_columns_that_groups_do_not_divide(tmp_path, coterie):
    source, _ = two_layers(tmp_path / "in")
    ran = coterie("convert", "cpu", "-i", source, "-o", tmp_path / "out", "--group-size", "64")
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "down: 32 columns are not a multiple of group_size=64; use group_size=0" in ran.err
    assert not (tmp_path / "out").exists()
