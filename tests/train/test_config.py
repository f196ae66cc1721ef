"""What a fine-tuning file may say, and what is said about one that is wrong."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from coterie.errors import ArgumentError, CheckpointError
from coterie.train.checks import check_all
from coterie.train.config import read_config
from coterie.train.example import DATA, write_example

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_valid(path):
    checked = check_all(read_config(path), path.parent)
    assert len(checked.train) > 0 and not any("left out" in line or " cut " in line for line in checked.findings)


def test_written_example_is_valid(tmp_path):
    write_example(tmp_path / "mine.yaml")
    config = read_config(tmp_path / "mine.yaml")
    assert (config.experts, config.max_steps, config.output_dir) == ("int4", 30, "mine-output")
    checked = check_all(config, tmp_path)
    assert (len(checked.train), len(checked.test)) == (248, 24)
    with pytest.raises(ArgumentError, match="is there already"):
        write_example(tmp_path / "mine.yaml")


def test_every_key_of_the_example_can_be_uncommented(tmp_path):
    write_example(tmp_path / "mine.yaml")
    text = (tmp_path / "mine.yaml").read_text()
    keys = read_config(tmp_path / "mine.yaml").__dataclass_fields__
    for name in keys:
        assert f"\n{name}:" in text or f"\n# {name}:" in text


def test_example_on_a_full_disk(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*new\.yaml: File too large"):
            write_example(tmp_path / "new.yaml")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_output_that_cannot_be_written(configure, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        with pytest.raises(CheckpointError, match=r"output_dir: .* cannot be made: .*file is a file"):
            check_all(configure(output_dir=str(folder)), tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(CheckpointError, match=r"output_dir: .* cannot be written: .* is read-only"):
        check_all(configure(output_dir=str(tmp_path / "new" / "folder")), tmp_path)


def test_numbers_may_be_written_as_people_do(configure):
    config = configure(learning_rate="2e-4", num_epochs=3, val_set_size="1e-1")
    assert (config.learning_rate, config.num_epochs, config.val_set_size) == (2e-4, 3.0, 0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, r"unknown key 'lora_rank'; did you mean lora_r or lora_\w+ or \w+\?$"),
        ({"zebra": 1}, "unknown key 'zebra'; `coterie sft --init FILE` writes all there are"),
        ({"datasets": [{"pth": "x"}]}, r"datasets\[0\]: unknown key 'pth'; did you mean path"),
        ({"lora_r": "many"}, "lora_r: expected a whole number, found 'many'"),
        ({"lora_r": 2.5}, "lora_r: expected a whole number, found 2.5"),
        ({"learning_rate": "fast"}, "learning_rate: expected a number, found 'fast'"),
        ({"sample_packing": "yes please"}, "sample_packing: expected true or false, found 'yes please'"),
        ({"lora_target_modules": "q_proj"}, "lora_target_modules: expected a list or all-linear, found 'q_proj'"),
        ({"datasets": "train.jsonl"}, "datasets: expected a list, each a mapping of keys"),
        ({"base_model": None}, "base_model is missing"),
        ({"output_dir": None}, "output_dir is missing"),
        ({"datasets": [{}]}, r"datasets\[0\]: path is missing"),
        ({"lora_r": 0}, "lora_r: expected at least 1, found 0"),
        ({"learning_rate": 0}, "learning_rate: expected more than 0"),
        ({"adapter": "dora"}, "adapter: expected lora or qlora, found 'dora'"),
        ({"adapter": "qlora"}, "qlora is LoRA on int4 experts, found experts: int8"),
        ({"adapter": None}, "nothing to train"),
        (
            {"adapter": None, "unfrozen_parameters": ["norm"], "lora_model_dir": "x"},
            "lora_model_dir is an adapter to go on training: add adapter: lora",
        ),
        ({"rl": "ppo"}, "rl: expected dpo"),
        ({"rl": "dpo", "reward_model": True}, "exclude each other"),
        ({"rl": "dpo", "sample_packing": True}, "supervised fine-tuning only"),
        ({"reward_model": True, "num_labels": 3}, "num_labels: expected 1"),
        ({"lora_dropout": 0.1}, "lora_dropout: expected 0"),
        ({"gradient_checkpointing": "some"}, "expected true, false or retain_experts, found 'some'"),
        ({"device": "cuda:1"}, "device: expected cpu or cuda, found 'cuda:1'"),
        ({"gpu_experts": 4}, "gpu_experts: experts are on the GPU that the rest of the model is on: add device: cuda"),
        ({"gpu_experts": True, "device": "cuda"}, "gpu_experts: expected text or a whole number or a number"),
        ({"gpu_experts": "auto", "device": "cuda"}, "gpu_experts: expected all, stream, a number .*, found 'auto'"),
    ],
)
def test_wrong_files(changes, message, configure):
    with pytest.raises(ArgumentError, match=message):
        configure(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("- a", "expected `key: value` lines, found list"), ("", "found NoneType")],
)
def test_not_a_mapping(text, message, tmp_path):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(ArgumentError, match=message):
        read_config(tmp_path / "x.yaml")


def test_no_such_file(tmp_path):
    with pytest.raises(ArgumentError, match=r"cannot read .*x.yaml: No such file"):
        read_config(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"datasets": [{"path": "nothing.jsonl"}]}, ArgumentError, "nothing.jsonl is not there"),
        ({"datasets": [{"path": str(DATA / "preferences.jsonl")}]}, ArgumentError, "expected columns messages"),
        ({"datasets": [{"path": str(DATA / "train.jsonl"), "type": "alpaca"}]}, ArgumentError, "needs the columns"),
        ({"datasets": [{"path": str(DATA / "train.jsonl"), "type": "preference"}]}, ArgumentError, "type: expected"),
        ({"datasets": [{"path": str(DATA / "README.md")}]}, ArgumentError, "expected a file ending in .jsonl"),
        ({"rl": "dpo"}, ArgumentError, r"expected columns chosen, rejected \(preference\)"),
        ({"val_set_size": 500}, ArgumentError, "less than the 248 rows"),
        ({"base_model": "./nowhere"}, ArgumentError, "nowhere is not there"),
        ({"base_model": str(DATA)}, CheckpointError, "has no config.json"),
        ({"resume_from_checkpoint": "nowhere"}, CheckpointError, "nowhere is not a folder"),
    ],
)
def test_what_a_file_names_is_checked(changes, error, message, configure, tmp_path):
    with pytest.raises(error, match=message):
        check_all(configure(**changes), tmp_path)
    assert not (tmp_path / "output").exists()
