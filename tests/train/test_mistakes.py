"""Mistakes in a fine-tuning file, on the command line: one line that says what to do, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import save_file

from coterie import cli, tiny


@pytest.fixture
def sft(monkeypatch, capsys):
    """sft(config file) -> (exit code, stdout, stderr)."""

    def run(config) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["coterie", "sft", str(config)])
        monkeypatch.setenv("COLUMNS", "1000")
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": 8}, "unknown key 'lora_rank'; did you mean lora_r or "),
        ({"lora_r": "many"}, "lora_r: expected a whole number, found 'many'"),
        ({"lora_r": 0}, "lora_r: expected at least 1, found 0"),
        ({"lora_dropout": 0.1}, "lora_dropout: expected 0"),
        ({"lora_use_dora": True}, "lora_use_dora cannot be used: experts are adapted by LoRA"),
        (
            {"lora_target_parameters": ["experts.gate_proj"], "lora_target_modules": []},
            "experts.gate_proj matches no parameter of Qwen3MoeForCausalLM; did you mean experts.gate_up_proj",
        ),
        ({"sequence_len": 8}, "datasets: nothing is left to learn: "),
        ({"datasets": [{"path": "nothing.jsonl"}]}, "nothing.jsonl is not there"),
        ({"resume_from_checkpoint": "nowhere"}, "nowhere is not a folder"),
        ({"lora_model_dir": "nowhere"}, "nowhere has no adapter_config.json"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_nothing_is_written(changes, message, write, sft, tmp_path):
    code, out, err = sft(write(**changes))
    assert (code, out) == (2, "")
    assert err.count("coterie: ") == 1 and message in err and "Traceback" not in err
    assert not (tmp_path / "output").exists()


FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors")


@pytest.mark.parametrize("broken", FILES)
@pytest.mark.parametrize("cut", [0, 10])
def test_resuming_from_a_broken_checkpoint(broken, cut, write, sft, tmp_path):
    checkpoint = tmp_path / "output" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    for name in FILES[1:4]:
        torch.save({"state": torch.zeros(100)}, checkpoint / name)
    save_file({"a": torch.zeros(100)}, checkpoint / FILES[4])
    shutil.copytree(checkpoint, tmp_path / "before")
    for folder in (checkpoint, tmp_path / "before"):
        (folder / broken).write_bytes((folder / broken).read_bytes()[:cut])
    code, out, err = sft(write(auto_resume_from_checkpoints=True, base_model=str(tiny.PATH)))
    assert (code, out) == (2, "")
    assert f"{broken} is damaged" in err and "resume an earlier" in err and "Traceback" not in err
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["checkpoint-2"]
    for file in (tmp_path / "before").iterdir():
        assert (checkpoint / file.name).read_bytes() == file.read_bytes()
