"""What plan says of GGUF files, whose tensors it looks at, against what opening them takes."""

from __future__ import annotations

import gguf_models
import pytest
import torch
from gguf_models import MIXED, write_gguf, write_qwen
from hf.tiny_models import make
from typer.testing import CliRunner

import coterie
from coterie import plan
from coterie.checkpoints.gguf_file import GgufFile
from coterie.cli import app
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.empty import empty_model
from coterie.hf.gguf.config import read_config
from coterie.hf.modules import packed_modules

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
Q4_K_M = {"gate": "Q4_K", "up": "Q4_K", "down": ["Q6_K", "Q4_K"]}


def write(folder, experts=Q4_K_M, **options):
    model = make("qwen3_moe", torch.float32, hidden_size=256, moe_intermediate_size=256, rope_parameters=ROPE)
    return write_qwen(folder / "model.gguf", model, experts=experts, **options)


def run(*arguments):
    ran = CliRunner().invoke(app, ["plan", *map(str, arguments), "--bandwidth", "10GB"])
    return ran.exit_code, " ".join(ran.output.split())


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("as_folder", [False, True])
def test_a_file_is_planned_as_it_is_opened(tmp_path, files, as_folder):
    file = write(tmp_path, files=files)
    model = coterie.from_pretrained(file)
    source = plan.open_source(str(tmp_path if as_folder else file))
    anatomy = plan.inspect(source.config)
    assert source.problem is None and source.own == model.config.quantization_config.packing
    assert source.formats()[0] == source.own and source.formats("q4_k/q6_k") == [source.own]
    packed = [module.experts.nbytes for _, module in packed_modules(model)]
    assert packed[0] > packed[1] and anatomy.experts_nbytes(source.own) == sum(packed)
    whole = empty_model(read_config(GgufFile(file))[0])
    assert anatomy.parameters == sum(parameter.numel() for parameter in whole.parameters())
    stored = sum(shard.stat().st_size for shard in tmp_path.glob("*.gguf"))
    assert 0.9 * stored < sum(source.stored.values()) < stored and source.stored["Q4_K"] > source.stored["Q6_K"]


def test_what_is_printed(tmp_path):
    code, said = run(write(tmp_path, MIXED), "--vram", "8GB", "--train")
    assert code == 0, said
    assert said.startswith("Opened by this version: quantised as GGUF; its experts keep their codes (but those of Q4_1")
    assert "packed anew) in q8_0 in groups of 32, " in said and "the rest is dequantised." in said
    assert "of Q8_0." in said and "q8_0, as it is" in said and said.count("│ q8_0 │") == 3
    assert said.count("│ int4 │") == 4
    code, said = run(tmp_path, "--experts", "int4")
    assert code == 0 and "as it is" not in said


def test_plain_experts_are_packed(tmp_path):
    source = plan.open_source(str(write(tmp_path, "BF16")))
    assert source.quantised is None and source.own is None and source.stored["BF16"] > 0
    assert "its experts are packed while it loads" in run(tmp_path, "--experts", "int4")[1]


def test_conversion_reads_the_file(tmp_path):
    source = plan.open_source(str(write(tmp_path)))
    anatomy, stored = plan.inspect(source.config), sum(source.stored.values())
    rate = plan.keeping_rate(source.experts, source.own)
    found = plan.conversion(anatomy, source.own, rate, disk=1e6, stored=stored)
    assert rate > 0 and found.read == stored
    assert found.written == anatomy.experts_nbytes(source.own) + anatomy.rest_nbytes
    assert found.seconds == pytest.approx((found.read + found.written) / 1e6 + 2 * anatomy.expert_parameters / rate)


def test_files_that_are_not_planned(tmp_path):
    tensors, _ = gguf_models.experts(dict.fromkeys(gguf_models.PARTS, "Q8_0"))
    dense = {"blk.0.ffn_up.weight": tensors["blk.0.ffn_up_exps.weight"]}
    file = write_gguf(tmp_path / "dense.gguf", dense, {"block_count": 1})
    with pytest.raises(CheckpointError, match=r"dense.gguf: no experts found; the names tried: blk.\{L\}.ffn_"):
        plan.open_source(str(file))
    write_gguf(tmp_path / "other.gguf", tensors, {"block_count": 1}, arch="bailingmoe2")
    with pytest.raises(UnsupportedModelError, match="does not open GGUF architecture 'bailingmoe2'"):
        plan.open_source(str(tmp_path / "other.gguf"))
    with pytest.raises(CheckpointError, match="holds 2 GGUF models"):
        plan.open_source(str(tmp_path))
    (tmp_path / "other.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(CheckpointError, match=r"other\.gguf is not a whole GGUF file"):
        plan.open_source(str(tmp_path / "other.gguf"))
    write(tmp_path, files=2).with_name("model-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"missing: model-00002-of-00002\.gguf"):
        plan.open_source(str(tmp_path / "model-00001-of-00002.gguf"))
