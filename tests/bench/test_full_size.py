"""benchmarks/full_size.py, tiny: its checkpoint is what Transformers reads, and every piece of work is measured."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie.bench.checkpoint import remove_random_checkpoint, write_random_checkpoint
from coterie.bench.full_size import FullSize, Work
from coterie.checkpoints import tensorwriter
from coterie.errors import ArgumentError, CheckpointError

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_size.py"
SHARD = 100_000  # bytes
WORK = Work(prompt=12, decoded=3, sequences=2, trained=8)


@pytest.fixture
def config():
    return Qwen3MoeConfig(
        vocab_size=256,
        num_hidden_layers=2,
        hidden_size=64,
        moe_intermediate_size=32,
        num_experts=8,
        num_experts_per_tok=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=False,
    )


def files(folder):
    return {path.name: (path.stat().st_ino, path.stat().st_size) for path in folder.iterdir()}


def test_transformers_reads_every_weight(config, tmp_path):
    nbytes = write_random_checkpoint(tmp_path, config, SHARD)
    model, found = Qwen3MoeForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found
    assert model.dtype == torch.bfloat16 and 0 < nbytes - model.num_parameters() * 2 < SHARD / 4  # headers
    shards = [size for name, (_, size) in files(tmp_path).items() if name.endswith(".safetensors")]
    assert len(shards) > 3 and sum(shards) == nbytes and max(shards) < 1.1 * SHARD
    experts = model.model.layers[1].mlp.experts
    assert experts.gate_up_proj.float().std().item() == pytest.approx(config.initializer_range, rel=0.02)
    assert experts.gate_up_proj.flatten(1).unique(dim=0).shape[0] == config.num_experts
    assert model.model.norm.weight.eq(1).all()


def test_what_is_there_whole_is_kept(config, tmp_path):
    write_random_checkpoint(tmp_path, config, SHARD)
    before = files(tmp_path)
    write_random_checkpoint(tmp_path, config, SHARD)
    assert files(tmp_path) == before
    lost = tmp_path / sorted(before)[2]
    bytes_of = lost.read_bytes()
    lost.write_bytes(bytes_of[:-1])
    (tmp_path / "model.safetensors.index.json").unlink()
    write_random_checkpoint(tmp_path, config, SHARD)
    after = files(tmp_path)
    assert lost.read_bytes() == bytes_of and after.keys() == before.keys()
    assert sum(after[name] == before[name] for name in before if name.startswith("model-")) == len(before) - 3
    config.num_experts = 4
    with pytest.raises(ArgumentError, match="holds another model"):
        write_random_checkpoint(tmp_path, config, SHARD)


def test_a_full_disk_is_noticed_first(config, tmp_path, monkeypatch):
    monkeypatch.setattr(tensorwriter.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(CheckpointError, match=r"it takes 0\.\d MB beside what is there, 0\.0 MB are free"):
        write_random_checkpoint(tmp_path, config, SHARD)
    assert not files(tmp_path)


def test_what_was_written_is_removed(config, tmp_path):
    folder = tmp_path / "model"
    write_random_checkpoint(folder, config, SHARD)
    (folder / "other").touch()
    remove_random_checkpoint(folder, config, SHARD)
    assert list(files(folder)) == ["other"]
    (folder / "other").unlink()
    remove_random_checkpoint(folder, config, SHARD)
    assert not folder.exists()


def test_every_piece_of_work(config, tmp_path):
    write_random_checkpoint(tmp_path, config)
    model = FullSize(tmp_path, "int4", "int4", WORK)
    found = {name: getattr(model, name)() for name in ("load", "prefill", "decode", "together", "train")}
    assert {name: figures.tokens for name, figures in found.items()} == {
        "load": 0, "prefill": 12, "decode": 3, "together": 6, "train": 8
    }  # fmt: skip
    assert all(figures.seconds > 0 and figures.peak > 50 << 20 for figures in found.values())
    assert [name for name, figures in found.items() if figures.ratio] == ["together"]
    assert "linear layers as int4" in repr(model.model)


def test_the_script(tmp_path, monkeypatch, capsys):
    """What goes wrong in a process is written down, and the others go on."""
    output = tmp_path / "full_size.json"
    argv = [SCRIPT, tmp_path / "model", "--tiny", "--only", "load,decode", "--no-keep", "--output", output]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    answers = {"load": FullSize, "decode": None}

    class InThisProcess:
        def __init__(self, make):
            self.make = make

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def call(self, name):
            if answers[name] is None:
                raise CheckpointError("gone")
            return getattr(self.make(), name)()

    monkeypatch.setattr("coterie.bench.process.Remote", InThisProcess)
    runpy.run_path(str(SCRIPT), run_name="__main__")
    found = json.loads(output.read_text())
    assert found["figures"]["load"]["seconds"] > 0 and found["figures"]["decode"] == {"error": "gone"}
    assert found["cpu"]["model"] and found["versions"]["torch"] and found["config"]["num_hidden_layers"] == 2
    out = capsys.readouterr()
    assert "load and pack" in out.out and "torch" in out.out and "decode: gone" in out.err
    assert not (tmp_path / "model").exists()
