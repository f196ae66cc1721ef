"""gpt-oss as GGUF: the same model as the checkpoint in safetensors that it was made of."""

from __future__ import annotations

import pytest
import torch
from gguf_models import TOKENS
from gpt_oss_checkpoints import write_as_gguf, write_mxfp4
from packed_models import assert_same_bytes
from peft import LoraConfig, get_peft_model
from tiny_models import ROPE, prompt
from transformers import AutoTokenizer

import coterie
from coterie import Experts, plan
from coterie.checkpoints import open_reader
from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.converting import convert
from coterie.hf.modules import packed_modules

YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LENGTH = 40  # more than the window, and than the positions before they are scaled


def logits(model):
    with torch.no_grad():
        return model(prompt(2, LENGTH)).logits


@pytest.mark.parametrize("rope", [YARN, ROPE], ids=["yarn", "plain"])
@pytest.mark.parametrize("fused", [False, True])
def test_same_logits(tmp_path, rope, fused):
    folder = write_mxfp4(tmp_path / "in", rope_parameters=rope)
    expected = coterie.from_pretrained(folder)
    model = coterie.from_pretrained(write_as_gguf(tmp_path / "model.gguf", folder, fused))
    assert type(model) is type(expected) and model.config.quantization_config.experts == "mxfp4"
    assert_same_bytes(model, expected)
    for (name, found), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(found, theirs), name
    assert torch.equal(logits(model), logits(expected))
    ours, theirs = (each.config.to_dict() for each in (model, expected))
    apart = {key: (ours.get(key), theirs.get(key)) for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert apart.keys() <= {"_name_or_path", "architectures", "bos_token_id", "eos_token_id", "pad_token_id"}


def test_codes_are_what_the_gguf_package_reads(tmp_path):
    folder = write_mxfp4(tmp_path / "in")
    file = GgufFile(write_as_gguf(tmp_path / "model.gguf", folder))
    gate, up, down = Experts.open(folder, layer=1).dequantize()
    for part, expected in (("gate", gate), ("up", up), ("down", down)):
        found = torch.from_numpy(file.dequantize(f"blk.1.ffn_{part}_exps.weight").copy())
        assert torch.equal(found, expected)


def test_converted_saved_and_planned(tmp_path):
    file = write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "in", rope_parameters=YARN))
    model = coterie.from_pretrained(file)
    report = convert(file, tmp_path / "converted")
    assert report.kept
    model.save_pretrained(tmp_path / "saved")
    for name in ("converted", "saved"):
        again = coterie.from_pretrained(tmp_path / name)
        assert_same_bytes(again, model)
        assert torch.equal(logits(again), logits(model))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "converted")
    assert tokenizer.convert_tokens_to_ids("ab") == TOKENS.index("ab") and tokenizer.eos_token == "</s>"
    source = plan.open_source(str(file))
    assert source.problem is None and source.own == model.config.quantization_config.packing
    nbytes = sum(module.experts.nbytes for _, module in packed_modules(model)) + 2 * 8 * 4 * (2 * 192 + 128)  # biases
    assert plan.inspect(source.config).experts_nbytes(source.own) == nbytes


def test_trains_and_generates(tmp_path):
    model = coterie.from_pretrained(write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "in")))
    assert model.generate(prompt(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=targets, target_modules=["q_proj"]))
    adapted(prompt(), labels=prompt()).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize(
    ("metadata", "error", "message"),
    [
        ({"attention__sliding_window": None}, CheckpointError, r"has no gpt-oss\.attention\.sliding_window"),
        ({"rope__scaling__factor": None}, CheckpointError, r"no valid gpt_oss config: .*factor"),
        ({"rope__scaling__type": "longrope"}, UnsupportedModelError, r"positions that are scaled \(longrope\)"),
        ({"rope__scaling__attn_factor": 2.0}, UnsupportedModelError, r"does not read 'rope\.scaling\.attn_factor'"),
    ],
)
def test_what_is_refused(tmp_path, metadata, error, message):
    file = write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "in", rope_parameters=YARN), **metadata)
    with pytest.raises(error, match=message):
        coterie.from_pretrained(file)


def test_betas_are_read(tmp_path):
    betas = {"rope__scaling__yarn_beta_fast": 8.0, "rope__scaling__yarn_beta_slow": 2.0}
    file = write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "in", rope_parameters=YARN), **betas)
    found = coterie.from_pretrained(file).config.rope_parameters
    assert found == YARN | {"beta_fast": 8.0, "beta_slow": 2.0}


def test_biases_of_one_projection(tmp_path):
    file = write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "in"))
    data = file.read_bytes()
    for name in ("gate", "up"):
        data = data.replace(f"blk.1.ffn_{name}_exps.bias".encode(), f"blk.1.ffn_{name}_expx.bias".encode())
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"biases of down alone, expected of gate, up, down"):
        open_reader(file).layer(1)
