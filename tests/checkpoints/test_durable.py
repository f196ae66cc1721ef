"""What a writer asks of the system, in order: write, fsync, rename, fsync of the folder."""

import os
from pathlib import Path

import pytest
import torch

from coterie.checkpoints.folderwriter import new_folder
from coterie.checkpoints.tensorwriter import TensorWriter, copy_file, write_text


@pytest.fixture
def calls(monkeypatch):
    """fsync and rename as they happen: ("fsync", path), ("rename", from, to)."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(descriptor):
        seen.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}"), os.fstat(descriptor).st_size))
        fsync(descriptor)

    def recorded_replace(source, target):
        seen.append(("rename", str(source), str(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    return seen


def tensor_file(path):
    with TensorWriter(path, [("a", "U8", (100,))], {}) as writer:
        writer.write("a", torch.zeros(100, dtype=torch.uint8))


def text(path):
    write_text(path, "x" * 100)


def copied(path):
    source = path.parent.parent / "source"
    source.write_bytes(b"y" * 100)
    copy_file(source, path)


@pytest.mark.parametrize("write", [tensor_file, text, copied])
def test_a_file_is_synced_before_it_takes_its_name_and_its_folder_after(tmp_path, calls, write):
    target = tmp_path / "folder" / "x"
    target.parent.mkdir()
    write(target)
    (first, temporary, size), rename, (last, folder, _) = calls
    assert (first, rename, last) == ("fsync", ("rename", temporary, str(target)), "fsync")
    assert Path(temporary).parent == target.parent and temporary != str(target)
    assert size == target.stat().st_size >= 100  # all was written before the sync
    assert folder == str(target.parent)
    assert os.listdir(target.parent) == ["x"]
    umask = os.umask(0)
    os.umask(umask)
    assert target.stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_folder_is_synced_whole_before_it_takes_its_name(tmp_path, calls):
    with new_folder(tmp_path / "out") as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "file").write_text("x")
    kinds = [call[0] for call in calls]
    assert kinds == ["fsync"] * 3 + ["rename", "fsync"]
    assert {call[1] for call in calls[:3]} == {str(partial), str(partial / "sub"), str(partial / "sub" / "file")}
    assert calls[3] == ("rename", str(partial), str(tmp_path / "out"))
    assert calls[4][1] == str(tmp_path)


def test_what_another_run_writes_is_left_alone(tmp_path):
    for write in (tensor_file, text):
        with new_folder(tmp_path / "out") as mine:
            (mine / "mine").touch()
            with pytest.raises(RuntimeError), new_folder(tmp_path / "out") as other:
                assert other != mine
                raise RuntimeError
            write(mine / "x")
            left = mine / ".x.1-stale.tmp"
            left.touch()
            write(mine / "x")
            assert left.exists() and (mine / "mine").exists()
        for path in (tmp_path / "out").iterdir():
            path.unlink()
        (tmp_path / "out").rmdir()
    assert os.listdir(tmp_path) == []
