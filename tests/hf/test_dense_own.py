"""Linear layers that keep the codes which their checkpoint has: of GGUF, and of others' quantised checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from gguf_models import write_qwen
from packed_models import logits
from peft import LoraConfig, get_peft_model
from quantised_checkpoints import METHODS
from test_quantised_loading import write
from test_step import EXPERTS, assert_same, by_own_code, decode, taken
from tiny_models import make, prompt

import coterie
from coterie import plan
from coterie.adapters.merge import merge_adapter
from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import ArgumentError
from coterie.hf.converting import convert, verify_linears
from coterie.hf.dense import PackedLinear, packed_linears
from coterie.hf.modules import HIDDEN, packed_modules

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
V, HEAD = "model.layers.0.self_attn.v_proj", "lm_head"
Q4_K_M = {"": "Q4_K", V: "Q6_K", HEAD: "Q6_K"}


def stock(**changes):
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "head_dim": 64}
    return make("qwen3_moe", torch.float32, norm_topk_prob=True, rope_parameters=ROPE, **sizes, **changes)


@pytest.fixture
def file(tmp_path):
    """(a GGUF file, the model that it stands for)"""
    model = stock()
    return write_qwen(tmp_path / "model.gguf", model, experts="Q4_K", rest=Q4_K_M), model


def formats(model):
    return {name: linear.spec.name for name, linear in packed_linears(model)}


def compute_in_floats(model):
    for _, linear in packed_linears(model):
        linear.activations = "bf16"


def test_gguf(file, float32_products):
    path, theirs = file
    model = coterie.from_pretrained(path, dtype=torch.float32, dense="own", activations="bf16")
    found = formats(model)
    assert len(found) == 9 and found.pop(V) == found.pop(HEAD) == "q6_k" and set(found.values()) == {"q4_k"}
    for name, linear in packed_linears(model):
        assert torch.equal(linear.dequantize(), theirs.get_submodule(name).weight)
    compute_in_floats(model)
    with torch.no_grad():
        found, expected = model(prompt(1)).logits, theirs(prompt(1)).logits
    assert (found - expected).norm() < 4e-3 * expected.norm()
    assert "9 linear layers as q4_k in groups of 256 and q6_k in groups of 256" in repr(model)


def test_a_head_that_is_the_embedding(tmp_path):
    theirs = stock(tie_word_embeddings=True)
    model = coterie.from_pretrained(
        write_qwen(tmp_path / "model.gguf", theirs, experts="Q4_K", rest="Q4_K"), dense="own"
    )
    head = dict(packed_linears(model))[HEAD]
    assert head.spec.name == "q4_k" and torch.equal(head.dequantize(), theirs.model.embed_tokens.weight)


def test_a_format_that_is_named_keeps_the_codes_in_it(file):
    path, theirs = file
    linears = dict(packed_linears(coterie.from_pretrained(path, dense="q6_k")))
    for name in (V, HEAD):
        assert torch.equal(linears[name].dequantize(), theirs.get_submodule(name).weight)
    assert {linear.spec.name for linear in linears.values()} == {"q6_k"}


def test_layers_left_out(file):
    model = coterie.from_pretrained(file[0], dense="own", dense_skip=["o_proj", HEAD])
    assert len(formats(model)) == 6 and not isinstance(model.lm_head, PackedLinear)


@pytest.mark.parametrize("dense", ["own", "q6_k", None])
def test_weights_that_keep_their_codes_are_not_dequantised(dense, file, monkeypatch):
    read, dequantize = [], GgufFile.dequantize
    monkeypatch.setattr(GgufFile, "dequantize", lambda *what: (read.append(what[1]), dequantize(*what))[1])
    model = coterie.from_pretrained(file[0], dense=dense)
    assert {"blk.0.attn_v.weight", "output.weight"}.isdisjoint(read) == bool(dense)
    assert ("blk.0.attn_q.weight" in read) == (dense != "own") and "token_embd.weight" in read
    assert not any(HIDDEN in module.__dict__ for module in model.modules() if isinstance(module, PackedLinear))


def test_saved_and_planned(file, tmp_path):
    model = coterie.from_pretrained(file[0], dense="own")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["quantization_config"]["dense"] == "own"
    assert len(list((tmp_path / "saved").glob("linears-*.safetensors"))) == 2
    for mmap in (False, True):
        again = coterie.from_pretrained(tmp_path / "saved", mmap=mmap)
        assert formats(again) == formats(model) and torch.equal(logits(again), logits(model))
    with pytest.raises(ArgumentError, match="already packed with dense='own'"):
        coterie.from_pretrained(tmp_path / "saved", dense="int8")
    source = plan.open_source(str(tmp_path / "saved"))
    planned = plan.dense(plan.inspect(source.config), source.dense_format())
    assert planned.nbytes == sum(linear.nbytes for _, linear in packed_linears(model)) and planned.count == 9
    assert planned.described == "q4_k in groups of 256 and q6_k in groups of 256"
    with pytest.raises(ArgumentError, match="packed as own, and do not become int8"):
        source.dense_format("int8")


def test_a_token_takes_a_layer_of_several_formats_at_once(file, float32_products):
    model = coterie.from_pretrained(file[0], dense="own", dtype=torch.float32)
    found = decode(model)
    assert taken(model) == [EXPERTS, EXPERTS]
    with by_own_code(model):
        assert_same(found, decode(model))


def test_an_adapter_trains_and_merges(file, tmp_path):
    model = coterie.from_pretrained(file[0], dense="own")
    model.save_pretrained(tmp_path / "base")
    base = coterie.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    adapted(prompt(), labels=prompt()).loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(tmp_path / "base"), experts="int8")
    merged = coterie.from_pretrained(tmp_path / "merged")
    assert formats(merged) == formats(model)
    deltas = {
        name: module.get_delta_weight("default") for name, module in adapted.named_modules() if name.endswith("v_proj")
    }
    after = dict(packed_linears(merged))
    for name, linear in packed_linears(model):
        expected = linear.dequantize() + deltas.get(f"base_model.model.{name}", 0)
        assert (after[name].dequantize() - expected).norm() < 0.06 * expected.norm(), name


@pytest.mark.parametrize("method", ["fp8 by blocks", "compressed-tensors int8 by rows", "AWQ", "ModelOpt nvfp4"])
def test_checkpoints_that_others_quantised(method, tmp_path):
    quantise, config, spec = METHODS[method]
    folder = write(tmp_path / "in", "qwen3_moe", quantise, config)
    model, plain = (coterie.from_pretrained(folder, dense=dense) for dense in ("own", None))
    assert len(formats(model)) == 8 and set(formats(model).values()) == {spec.name}
    assert not isinstance(model.lm_head, PackedLinear)  # it is not quantised
    for name, linear in packed_linears(model):
        expected = plain.get_submodule(name).weight
        assert (linear.dequantize() - expected).norm() < 4e-3 * expected.float().norm()
    model.save_pretrained(tmp_path / "saved")
    again = coterie.from_pretrained(tmp_path / "saved")
    assert formats(again) == formats(model) and torch.equal(logits(again), logits(model))
    convert(folder, tmp_path / "converted", dense="own")
    again = coterie.from_pretrained(tmp_path / "converted")
    assert formats(again) == formats(model) and torch.equal(logits(again), logits(model))


def test_a_plain_checkpoint_has_none(tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path / "plain")
    model = coterie.from_pretrained(tmp_path / "plain", dense="own")
    assert not formats(model) and any(packed_modules(model)) and model.config.quantization_config.dense is None


def test_nothing_that_is_kept_and_layers_left_out(tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path / "plain")
    with pytest.raises(ArgumentError, match="dense_skip: expected dense="):
        coterie.from_pretrained(tmp_path / "plain", dense_skip=[HEAD])
    model = coterie.from_pretrained(tmp_path / "plain", dense="own")
    assert not formats(model) and model.config.quantization_config.dense is None
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(coterie.from_pretrained(tmp_path / "saved")), logits(model))


def test_training_a_packed_layer_is_refused(file):
    model = coterie.from_pretrained(file[0])
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with pytest.raises(ArgumentError, match="to be trained: open the model with dense=None"):
        adapted(input_ids=prompt(1)).logits.sum().backward()
    with torch.no_grad():
        assert adapted(input_ids=prompt(1)).logits.isfinite().all()


def test_plan_without_the_files(file, tmp_path):
    coterie.from_pretrained(file[0], dense="own").save_pretrained(tmp_path / "saved")
    source = plan.open_source(str(tmp_path / "saved" / "config.json"))
    assert "which linear layers are packed, and how, is in its files" in source.problem


@pytest.mark.parametrize("dense", ["own", "q6_k"])
def test_converted_as_opened(dense, file, tmp_path):
    report = convert(file[0], tmp_path / "out", dense=dense)
    model, opened = coterie.from_pretrained(tmp_path / "out"), coterie.from_pretrained(file[0], dense=dense)
    assert formats(model) == formats(opened) and torch.equal(logits(model), logits(opened))
    assert report.linear_errors.count == 9
    worst = verify_linears(tmp_path / "out", file[0]).worst
    assert worst < (4e-3 if dense == "own" else 0.05)


@pytest.mark.parametrize("dense", ["own", "q6_k"])
def test_codes_are_read_once_by_a_conversion(dense, file, tmp_path, monkeypatch):
    """And what keeps its codes is not dequantised."""
    read, dequantize, codes, kept = [], GgufFile.dequantize, GgufReader.codes, []
    monkeypatch.setattr(GgufFile, "dequantize", lambda *what: (read.append(what[1]), dequantize(*what))[1])
    monkeypatch.setattr(GgufReader, "codes", lambda *what: (kept.append(what[1]), codes(*what))[1])
    convert(file[0], tmp_path / "out", dense=dense)
    assert {"blk.0.attn_v.weight", "output.weight"}.isdisjoint(read) and "token_embd.weight" in read
    assert len(kept) == len(set(kept)) == 9


def test_a_head_that_is_the_embedding_converted(tmp_path):
    path = write_qwen(tmp_path / "model.gguf", stock(tie_word_embeddings=True), experts="Q4_K", rest="Q4_K")
    convert(path, tmp_path / "out", dense="own")
    opened = coterie.from_pretrained(path, dense="own")
    assert torch.equal(logits(coterie.from_pretrained(tmp_path / "out")), logits(opened))


def test_a_plain_checkpoint_converted(tmp_path):
    make("qwen3_moe").save_pretrained(tmp_path / "plain")
    assert convert(tmp_path / "plain", tmp_path / "out", quant_method="int8", dense="own").linear_errors is None
    assert "dense" not in json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
