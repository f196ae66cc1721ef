"""The folder of a run: no run replaces another's work, or mixes with it, unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from coterie import tiny
from coterie.errors import ArgumentError
from coterie.train import checks, run
from coterie.train.checks import check_all
from coterie.train.output import clear, left_behind, plan_output

RUN = ("adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "loss.png", "training_args.bin")


@pytest.fixture
def output(tmp_path) -> Path:
    """A finished run with two checkpoints, and a file of the user's."""
    folder = tmp_path / "output"
    for step in (2, 10):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in (*RUN, "notes.txt"):
        (folder / name).touch()
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_finished_run_is_not_replaced(output, configure, monkeypatch):
    """Refused before anything is loaded, and nothing is touched."""
    monkeypatch.setattr(checks, "check_model", None)
    before = names(output)
    for start in (check_all, lambda *given: run.train(*given, Console(quiet=True))):
        with pytest.raises(ArgumentError, match=r"run \(.*\): --resume to go on from checkpoint-10, --over"):
            start(configure(), Path())
    assert names(output) == before


def test_overwrite_takes_away_the_run_alone(output, configure):
    config = configure(auto_resume_from_checkpoints=True)
    assert plan_output(config, str(tiny.PATH), overwrite=True) is None
    clear(output)
    assert names(output) == ["notes.txt"]


def test_other_files_are_no_run(tmp_path, configure):
    (tmp_path / "output").mkdir()
    for name in ("notes.txt", "config.json", "model.safetensors", "loss.png", "README.md"):
        (tmp_path / "output" / name).touch()
    assert left_behind(tmp_path / "output") == []
    assert plan_output(configure(), str(tiny.PATH), overwrite=True) is None


def test_a_model_in_the_folder_is_a_runs_only_if_it_was_saved_by_one(output):
    packed = {"experts-00000.safetensors", "linears-00000.safetensors", "coterie.safetensors.index.json"}
    model = {"config.json", "model-00001-of-00001.safetensors", *packed}
    for name in model:
        (output / name).touch()
    assert not model & {path.name for path in left_behind(output)}
    (output / "adapter_config.json").unlink()
    assert model <= {path.name for path in left_behind(output)}


def test_going_on_from_an_earlier_checkpoint(output, configure, monkeypatch):
    """What came after it would mix with what is to come."""
    monkeypatch.setattr("coterie.train.output.find_checkpoint", lambda config: Path(config.resume_from_checkpoint))
    early, last = (configure(resume_from_checkpoint=str(output / f"checkpoint-{step}")) for step in (2, 10))
    assert plan_output(last, str(tiny.PATH)) == output / "checkpoint-10"
    with pytest.raises(ArgumentError, match=r"checkpoint-2 is not the last .*--overwrite .*: checkpoint-10"):
        plan_output(early, str(tiny.PATH))
    assert plan_output(early, str(tiny.PATH), overwrite=True) == output / "checkpoint-2"
    clear(output, output / "checkpoint-2")
    assert names(output) == sorted(["checkpoint-2", "notes.txt", *RUN])


def test_a_checkpoint_of_elsewhere_does_not_mix_with_a_run(output, configure, monkeypatch, tmp_path):
    monkeypatch.setattr("coterie.train.output.find_checkpoint", lambda config: tmp_path / "other" / "checkpoint-2")
    with pytest.raises(ArgumentError, match="holds an earlier run"):
        plan_output(configure(resume_from_checkpoint="x"), str(tiny.PATH))


@pytest.mark.parametrize("key", ["base_model", "lora_model_dir"])
def test_what_is_trained_from_is_no_output(key, output, configure):
    config = configure(**{key: str(output)})
    base = str(output) if key == "base_model" else str(tiny.PATH)
    with pytest.raises(ArgumentError, match=f"is {key}, and its files would be replaced"):
        plan_output(config, base, overwrite=True)
