"""A GGUF file opened as a model computes what Transformers computes on its dequantised weights."""

from __future__ import annotations

import json

import gguf
import pytest
import torch
from gguf_models import MIXED, PARTS, TOKENS, experts, write_gguf, write_qwen, write_qwen35
from peft import LoraConfig, get_peft_model
from tiny_models import make, prompt
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import coterie
from coterie import Experts
from coterie.checkpoints.gguf_file import GgufFile
from coterie.cli import app
from coterie.convert import convert_cpu
from coterie.convert.compare import compare
from coterie.convert.verify import verify
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.formats import resolve
from coterie.hf.converting import convert
from coterie.hf.gguf.config import open_tokenizer, read_config
from coterie.hf.modules import packed_modules

ROPE = {"rope_type": "default", "rope_theta": 500000.0}


def qwen3(**changes):
    return make("qwen3_moe", torch.float32, norm_topk_prob=True, rope_parameters=ROPE, rms_norm_eps=1e-5, **changes)


def difference(model, stock):
    ids = prompt(1)  # none of which is near a tie between experts
    with torch.no_grad():
        found, expected = model(ids).logits, stock(ids).logits
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("kind", ["BF16", "MXFP4", "Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.filterwarnings("ignore:some experts have codes")
def test_logits(tmp_path, float32_products, kind, files):
    stock = qwen3()
    file = write_qwen(tmp_path / "model.gguf", stock, experts=kind, files=files)
    asked = {"experts": "bf16"} if kind == "BF16" else {"activations": "bf16"}
    model = coterie.from_pretrained(file, dtype=torch.float32, dense=None, **asked)
    assert difference(model, stock) < 4e-3
    assert model.config.quantization_config.gguf is None


def test_tied_embeddings(tmp_path, float32_products):
    stock = qwen3(tie_word_embeddings=True)
    model = coterie.from_pretrained(
        write_qwen(tmp_path / "model.gguf", stock, experts="BF16"), dtype=torch.float32, experts="bf16", dense=None
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert difference(model, stock) < 4e-3


def test_shared_experts_and_biases(tmp_path, float32_products):
    stock = make("qwen2_moe", torch.float32, rope_parameters=ROPE, rms_norm_eps=1e-5, qkv_bias=True)
    file = write_qwen(tmp_path / "model.gguf", stock)
    model = coterie.from_pretrained(file, dtype=torch.float32, activations="bf16", dense=None)
    assert isinstance(model, type(stock)) and difference(model, stock) < 4e-3


def test_dtypes(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(), experts="MXFP4")
    model = coterie.from_pretrained(file)
    assert model.dtype == torch.bfloat16 and model.config.quantization_config.experts == "mxfp4"
    assert coterie.from_pretrained(file, dtype="float32").dtype == torch.float32
    assert coterie.from_pretrained(file, experts="int8").config.quantization_config.experts == "int8"
    with pytest.raises(ArgumentError, match="mmap=True needs a packed checkpoint"):
        coterie.from_pretrained(file, mmap=True)


def test_the_file_of_a_folder(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(), experts="MXFP4", files=2)
    model = coterie.from_pretrained(tmp_path, gguf_file=file.name)
    assert model.config.quantization_config.experts == "mxfp4"
    with pytest.raises(CheckpointError, match=r"has no 'other.gguf'"):
        coterie.from_pretrained(tmp_path, gguf_file="other.gguf")
    assert torch.equal(coterie.from_pretrained(tmp_path)(prompt()).logits, model(prompt()).logits)
    assert Experts.open(tmp_path, layer=1).format == "mxfp4"
    (tmp_path / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"2 GGUF models, .* a file, model-00001-of-00002.gguf, other.gguf$"):
        coterie.from_pretrained(tmp_path)


def test_an_adapter_trains_and_generates(tmp_path):
    model = coterie.from_pretrained(write_qwen(tmp_path / "model.gguf", qwen3(), experts="Q4_0"), dtype=torch.float32)
    assert model.config.quantization_config.experts == "q4_0"
    assert model.generate(prompt(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=targets, target_modules=[]))
    adapted(prompt(), labels=prompt()).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_saved_and_converted_it_computes_the_same(tmp_path):
    stock = qwen3()
    file = write_qwen(tmp_path / "model.gguf", stock, experts="MXFP4", files=2)
    model = coterie.from_pretrained(file)
    model.save_pretrained(tmp_path / "saved")
    ran = CliRunner().invoke(app, ["convert", "cpu", "-i", str(file), "-o", str(tmp_path / "converted")])
    assert ran.exit_code == 0, ran.output
    assert "Codes and scales of the experts are the checkpoint's own." in " ".join(ran.output.split())
    for folder in ("saved", "converted"):
        again = coterie.from_pretrained(tmp_path / folder)
        assert torch.equal(again(prompt()).logits, model(prompt()).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "converted").convert_tokens_to_ids("ab") == TOKENS.index("ab")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


# Q4_K_M: in some layers down takes more bits.
Q4_K_M = {"gate": "Q4_K", "up": "Q4_K", "down": ["Q6_K", "Q4_K"]}


def test_mixed_types_keep_their_bits(tmp_path, float32_products, recwarn):
    stock = qwen3(hidden_size=256, moe_intermediate_size=256)
    file = write_qwen(tmp_path / "model.gguf", stock, experts=Q4_K_M)
    model = coterie.from_pretrained(file, dtype=torch.float32, activations="bf16", dense=None)
    assert difference(model, stock) < 4e-3
    packed = [module for _, module in packed_modules(model)]
    assert [module.experts.format for module in packed] == ["q4_k/q6_k", "q4_k"]
    for layer, module in enumerate(packed):
        theirs = stock.model.layers[layer].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(module.dense(name, torch.float32), theirs.get_parameter(name))
    described = "q4_k in groups of 256 with down in q6_k in groups of 256 (layer 0); q4_k in groups of 256 (layer 1)"
    assert f"experts packed as {described}: " in repr(model)
    assert not [w for w in recwarn if "packed anew" in str(w.message)]
    report = convert(file, tmp_path / "converted")
    assert report.kept and report.formats.described == described
    assert {name: error.worst for name, error in report.errors.items()} == {"gate": 0, "up": 0, "down": 0}


def test_mixed_types_saved_and_converted(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(hidden_size=256, moe_intermediate_size=256), experts=Q4_K_M)
    model = coterie.from_pretrained(file)
    model.save_pretrained(tmp_path / "saved")
    convert(file, tmp_path / "converted")
    for folder in ("saved", "converted"):
        stored = json.loads((tmp_path / folder / "config.json").read_text())["quantization_config"]
        q4, q6 = ({"format": name, "group_size": 256, "zero_point": False} for name in ("q4_k", "q6_k"))
        formats = {"0": {"gate_up": q4, "down": q6}, "1": {"gate_up": q4, "down": q4}}
        said = {"quant_method": "coterie", "version": "2.0", "dense": "own"}
        assert stored == {**said, "experts": "mixed", "formats": formats}
        for mmap in (False, True):
            again = coterie.from_pretrained(tmp_path / folder, mmap=mmap)
            assert torch.equal(again(prompt()).logits, model(prompt()).logits)
    for check in verify(tmp_path / "saved", file):
        assert check.output_error < 0.01 and all(error.worst == 0 for error in check.errors.values())
    compared = compare(tmp_path / "saved", tmp_path / "converted", tolerance=0.01)  # converted norms are not in bf16
    assert compared.same and all(e.largest == 0 for e in compared.errors if "ffn_exps" in e.name)


def test_mixed_types_by_the_commands(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(hidden_size=256, moe_intermediate_size=256), experts=Q4_K_M)
    ran = CliRunner().invoke(app, ["convert", "cpu", "-i", str(file), "-o", str(tmp_path / "out")])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 0 and "experts in q4_k/q6_k" in said
    assert "Codes and scales of the experts are the checkpoint's own." in said
    ran = CliRunner().invoke(app, ["plan", str(tmp_path / "out"), "--bandwidth", "10GB", "--vram", "8GB"])
    said = " ".join(ran.output.split())
    assert ran.exit_code == 0, ran.output
    assert "experts in q4_k in groups of 256 with down in q6_k in groups of 256 (layer 0); q4_k in groups" in said
    assert 'q4_k/q6_k: device="cuda", gpu_experts="all"' in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda formats: formats.update({"1": formats["0"]}), "packed as q4_k .*, config.json says q4_k .* with down"),
        (lambda formats: formats.pop("1"), "config.json: formats say nothing of layer 1, only of 0"),
        (lambda formats: formats.update({"1, x": formats["1"]}), 'numbers of layers such as "0-3, 5", found'),
        (lambda formats: formats["0"].pop("down"), "formats of layers 0: expected an object of gate_up and down"),
        (lambda formats: formats.clear(), "formats: expected an object"),
    ],
    ids=["another", "missing", "no numbers", "no down", "none"],
)
def test_a_config_that_says_other_formats(tmp_path, change, message):
    file = write_qwen(tmp_path / "model.gguf", qwen3(hidden_size=256, moe_intermediate_size=256), experts=Q4_K_M)
    coterie.from_pretrained(file).save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    change(config["quantization_config"]["formats"])
    (tmp_path / "saved" / "config.json").write_text(json.dumps(config))
    with pytest.raises((ArgumentError, CheckpointError), match=message):
        coterie.from_pretrained(tmp_path / "saved")


def test_a_mixed_model_trains(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(hidden_size=256, moe_intermediate_size=256), experts=Q4_K_M)
    model = coterie.from_pretrained(file, dtype=torch.float32)
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapted = get_peft_model(model, LoraConfig(r=2, target_parameters=targets, target_modules=[]))
    adapted(prompt(), labels=prompt()).loss.backward()
    grads = [p.grad for name, p in adapted.named_parameters() if "lora_B" in name]
    assert len(grads) == 4 and all(grad is not None and grad.abs().sum() > 0 for grad in grads)


def test_mixed_types_in_one_format(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(hidden_size=256, moe_intermediate_size=256), experts=Q4_K_M)
    assert coterie.from_pretrained(file, experts="q6_k").config.quantization_config.spec == resolve("q6_k")
    with pytest.raises(ArgumentError, match="group_size of q4_k: expected 256, found 64"):
        coterie.from_pretrained(file, group_size=64)
    coterie.from_pretrained(file).save_pretrained(tmp_path / "saved")
    with pytest.raises(ArgumentError, match=r"experts='int4', but .* is already packed with experts='mixed'"):
        coterie.from_pretrained(tmp_path / "saved", experts="int4")


def test_converting_says_what_is_packed_anew(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(), experts=MIXED)
    ran = CliRunner().invoke(app, ["convert", "cpu", "-i", str(file), "-o", str(tmp_path / "out")])
    said = " ".join(ran.output.split())
    assert "experts in q8_0" in said
    assert "16 of 48 matrices have codes that no format holds (Q4_1)" in said


def test_converting_without_the_rest(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(), experts="MXFP4")
    with pytest.raises(CheckpointError, match="coterie convert cpu"):
        convert_cpu(file, tmp_path / "out")
    convert_cpu(file, tmp_path / "out", layers=[1])
    assert Experts.open(tmp_path / "out", layer=1).format == "mxfp4"


def test_qwen3_5_is_what_transformers_makes_of_it(tmp_path, float32_products):
    """Names, offsets and orders of llama.cpp that Transformers undoes by rules: its own loader is the truth."""
    pytest.importorskip("transformers.integrations.gguf.gguf_conversion_mapping")
    file = write_qwen35(tmp_path / "model.gguf", make("qwen3_5_moe_text", torch.float32, head_dim=32))
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=file.name, dtype=torch.float32, experts_implementation="eager"
    )
    model = coterie.from_pretrained(file, dtype=torch.float32, experts="bf16")
    for name, weight in stock.named_parameters():
        if "experts." not in name:
            assert torch.equal(weight, model.get_parameter(name)), name
    assert difference(model, stock) < 4e-3


def test_architectures_that_transformers_does_not_open(tmp_path):
    tensors, _ = experts(dict.fromkeys(PARTS, "MXFP4"))
    file = write_gguf(tmp_path / "model.gguf", tensors, {"block_count": 1}, arch="bailingmoe2")
    with pytest.raises(UnsupportedModelError, match="does not open GGUF architecture 'bailingmoe2'"):
        coterie.from_pretrained(file)


def test_weights_that_are_missing_or_unknown(tmp_path):
    stock = qwen3()
    changes = {
        "blk.1.attn_k.weight": (None, "has no tensor for model.layers.1.self_attn.k_proj.weight"),
        "blk.1.attn_k.lora": ("F32", "'blk.1.attn_k.lora': Transformers does not know what it is"),
        "blk.1.attn_k.scale": ("F32", "'blk.1.attn_k.scale': Transformers does not multiply by it"),
    }
    for name, (kind, message) in changes.items():
        file = write_qwen(tmp_path / "model.gguf", stock, change=(name, kind))
        with pytest.raises(CheckpointError, match=message):
            coterie.from_pretrained(file)


def test_scaled_positions_are_refused(tmp_path):
    file = write_qwen(tmp_path / "model.gguf", qwen3(), metadata={"rope.scaling.type": "yarn"})
    with pytest.raises(UnsupportedModelError, match="positions are scaled"):
        coterie.from_pretrained(file)
    given = ROPE | {"rope_type": "linear", "factor": 2.0}
    assert coterie.from_pretrained(file, rope_parameters=given).config.rope_parameters["factor"] == 2.0


def test_a_model_without_experts(tmp_path):
    tensors, _ = experts(dict.fromkeys(PARTS, "MXFP4"))
    file = write_gguf(tmp_path / "model.gguf", {"blk.0.attn_q.weight": tensors["blk.0.ffn_up_exps.weight"]})
    with pytest.raises(CheckpointError, match="no experts found"):
        coterie.from_pretrained(file)


def test_transformers_makes_the_same_config(tmp_path):
    """What is set beside Transformers' own reading agrees with the model that was written."""
    stock = qwen3()
    model = coterie.from_pretrained(write_qwen(tmp_path / "model.gguf", stock, experts="MXFP4"))
    kept = ("hidden_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok", "head_dim", "norm_topk_prob")
    assert {name: getattr(model.config, name) for name in kept} == {name: getattr(stock.config, name) for name in kept}
    assert isinstance(model, type(stock))


def test_transformers_does_not_read_the_vocabulary_for_a_config(tmp_path, monkeypatch):
    """It takes a second for every fifteen thousand tokens."""
    tokens = TOKENS + [f"word{n}" for n in range(2000 - len(TOKENS))]
    metadata = {"vocab_size": None, "tokenizer.ggml.tokens": tokens}
    file = write_qwen(tmp_path / "model.gguf", qwen3(vocab_size=2000), metadata=metadata)
    expected, read = AutoConfig.from_pretrained(tmp_path, gguf_file=file.name), []
    original = gguf.GGUFReader.__init__

    def counted(self, path, *rest):
        original(self, path, *rest)
        read.append(len(self.fields["tokenizer.ggml.tokens"].data))

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    config, _ = read_config(GgufFile(file))
    tokenizer = open_tokenizer(GgufFile(file))
    assert set(read) == {1}
    both = (config.to_dict(), expected.to_dict())
    assert {name for name, value in both[0].items() if value != both[1][name]} == {"dtype", "moe_intermediate_size"}
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)
    assert type(tokenizer) is type(theirs) and tokenizer.get_vocab() == theirs.get_vocab()
    assert config.vocab_size == 2000
