"""Folders appear whole or not at all, and what a killed run left goes with the next."""

import errno
import os
import signal

import forks
import pytest

from coterie.checkpoints.folderwriter import new_folder, replaced_folder
from coterie.checkpoints.packed import UNFINISHED
from coterie.errors import ArgumentError, CheckpointError


def test_a_new_folder_is_there_when_it_is_whole(tmp_path):
    refused = pytest.raises(CheckpointError, match=r"cannot write .*out: .*no space")
    with refused, new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        raise OSError(errno.ENOSPC, "no space")
    assert not list(tmp_path.iterdir())
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (tmp_path / "out" / "file").exists()


def test_a_folder_that_is_in_use_is_not_new(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").touch()
    with pytest.raises(ArgumentError, match="is not empty"), new_folder(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == ["file"]


def save(folder, fails=False):
    with replaced_folder(folder, 0) as new:
        (new / "config.json").write_text("new")
        if fails:
            raise RuntimeError


def test_what_a_killed_run_left_is_removed(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from coterie.checkpoints.folderwriter import new_folder, replaced_folder
blocks = [replaced_folder(Path({str(tmp_path / "out")!r}), 0), new_folder(Path({str(tmp_path / "out2")!r}))]
for block in blocks:
    new = block.__enter__()
    (new / "model.safetensors").write_text("half of it")
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert forks.run(script).returncode == -signal.SIGKILL
    (left,) = (tmp_path / "out").iterdir()
    (partial,) = (path for path in tmp_path.iterdir() if path.name.endswith(".partial"))
    with replaced_folder(tmp_path / "out", 0) as new:
        assert not left.exists()
        (new / "config.json").touch()
    with new_folder(tmp_path / "out2"):
        assert not partial.exists()
    assert sorted(os.listdir(tmp_path)) == ["out", "out2"] and os.listdir(tmp_path / "out") == ["config.json"]


def test_what_another_run_is_writing_stays(tmp_path):
    (tmp_path / "coterie-saving-notes").mkdir()  # not a run's
    with replaced_folder(tmp_path, 0) as other:
        (other / "other").write_text("other")
        save(tmp_path)
        assert os.listdir(other) == ["other"]
    assert sorted(os.listdir(tmp_path)) == ["config.json", "coterie-saving-notes", "other"]


@pytest.mark.parametrize("began", [False, True], ids=["before the renames", "within them"])
def test_whole_files_stay_until_others_are_in_their_place(tmp_path, began):
    left = tmp_path / "coterie-saving-1-00000000"
    left.mkdir()
    (left / "config.json").write_text("whole")
    ((tmp_path if began else left) / UNFINISHED).write_text("{}")
    with pytest.raises(RuntimeError):
        save(tmp_path, fails=True)
    assert (left / "config.json").read_text() == "whole" and (tmp_path / UNFINISHED).exists() == began
    save(tmp_path)
    assert os.listdir(tmp_path) == ["config.json"]


def test_without_locks_nothing_is_removed(tmp_path, monkeypatch):
    left = tmp_path / "coterie-saving-1-00000000"
    left.mkdir()

    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("fcntl.flock", refuse)
    save(tmp_path)
    assert left.exists() and (tmp_path / "config.json").exists()
