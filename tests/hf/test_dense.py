"""Models whose linear layers are packed too."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoTokenizer

import coterie
from coterie import tiny
from coterie.errors import ArgumentError, CheckpointError
from coterie.hf.dense import PackedLinear, linear_names, packed_linears
from coterie.hf.weight import PackedWeight

IDS = torch.arange(5, 37)[None]


def opened(dense: str | None = "int8", **options):
    return coterie.from_pretrained(tiny.PATH, experts="bf16", dense=dense, **options)


def logits(model, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids).logits


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize(("dense", "error"), [("bf16", 0.004), ("int8", 0.02), ("fp8_channel", 0.05), ("int4", 0.15)])
def test_logits(dense, error):
    model, plain = opened(dense), opened(None)
    assert 0 <= relative(logits(model), logits(plain)) < error
    found = dict(packed_linears(model))
    assert len(found) == 17 and all(linear.spec.name == dense for linear in found.values())
    assert "lm_head" in found and not any("gate" in name for name in found)  # routers


def test_perplexity():
    """int8 beside int8 experts is as good as bf16, beside int4 experts as good as those."""
    ids = AutoTokenizer.from_pretrained(tiny.PATH)(tiny.heldout_text(), return_tensors="pt").input_ids[0]
    plain, int8, int4 = (
        tiny.perplexity(coterie.from_pretrained(tiny.PATH, experts=experts, dense=dense), ids)
        for experts, dense in (("bf16", None), ("int8", "int8"), ("int4", "int8"))
    )
    assert int8 == pytest.approx(plain, rel=0.003)
    assert int4 == pytest.approx(plain, rel=0.015)


def test_what_is_said_and_counted():
    model, plain = opened("int8"), opened(None)
    packed = sum(linear.nbytes for _, linear in packed_linears(model))
    weights = sum(p.nbytes for name, p in plain.named_parameters() if "_proj.weight" in name and "self_attn" in name)
    assert plain.get_memory_footprint() - model.get_memory_footprint() == weights - packed
    assert "17 linear layers as int8" in repr(model)
    assert "packed as int8" in repr(model.model.layers[0].self_attn.q_proj)
    head = plain.lm_head.weight.numel()  # shared with the embedding until it is packed
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters()) + head


def test_loading_says_what_is_packed(monkeypatch):
    said = []
    monkeypatch.setattr("coterie.hf.quantizer.logger.info", lambda text, *values: said.append(text % values))
    opened("int8")
    assert said[0].startswith("Qwen3MoeForCausalLM: experts packed as bf16: 6.3 MB; 17 linear layers as int8: 0.5 MB; ")


def test_tied_head():
    """The head is packed; the embedding keeps the weight that they shared, and gives it back."""
    model, plain = opened("int4"), opened(None)
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    expected = coterie.Linear.pack(plain.lm_head.weight, format="int4")
    assert torch.equal(dict(packed_linears(model))["lm_head"].packed, expected.packed)
    model.dequantize()
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_skip():
    model = opened("int8", dense_skip=[r"layers\.0\.", "o_proj"])
    names = [name for name, _ in packed_linears(model)]
    assert len(names) == 10 and not any("layers.0." in name or "o_proj" in name for name in names)
    assert len(list(packed_linears(opened("int8", dense_skip="lm_head|[qk]_proj")))) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dense": "int3"}, "unknown format 'int3'"),
        ({"dense": None, "dense_skip": ["o_proj"]}, "expected dense="),
        ({"dense_skip": ["q_prj"]}, "'q_prj' matches none of the 17 linear layers; the nearest name is q_proj"),
        ({"dense_skip": ["."]}, "has no linear layers to pack: dense_skip leaves out all 17"),
        ({"dense_skip": ["(q_proj"]}, r"'\(q_proj' is not a regular expression"),
    ],
)
def test_mistakes(options, message, monkeypatch):
    """They are found before a weight is read."""
    monkeypatch.setattr("coterie.hf.quantizer.memory.require", lambda *_: pytest.fail("went on"))
    with pytest.raises(ArgumentError, match=message):
        opened(**options)


def test_groups_that_do_not_divide(tmp_path):
    tiny_models.make("qwen3_moe", head_dim=12).save_pretrained(tmp_path)
    with pytest.raises(ArgumentError, match=r"o_proj has 48 columns, not a multiple.*dense_skip=\['o_proj'\]"):
        coterie.from_pretrained(tmp_path, dense="int4")
    assert any(packed_linears(coterie.from_pretrained(tmp_path, dense="int4", dense_skip=["o_proj"])))


def test_no_linear_layers(monkeypatch, plain):
    monkeypatch.setattr("coterie.hf.dense.linear_names", lambda model: iter(()))
    with pytest.raises(ArgumentError, match=r"Qwen3MoeForCausalLM has no linear layers to pack$"):
        coterie.from_pretrained(plain, dense="int8", dense_skip=["q_proj"])


def test_weights_that_a_format_cannot_hold(plain):
    model = tiny_models.make("qwen3_moe")
    model.model.layers[1].self_attn.k_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(plain)
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.k_proj: .* NaN"):
        coterie.from_pretrained(plain, dense="int8")


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_families(family, tmp_path, float32_products):
    """Shared experts, latent attention, an untied head, biases."""
    tiny_models.make(family).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dense="bf16", dtype=torch.float32)
    plain = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32)
    assert relative(logits(model, tiny_models.prompt()), logits(plain, tiny_models.prompt())) < 1e-4
    assert any(name == "lm_head" for name, _ in packed_linears(model))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_routers_stay(family):
    """Whatever has as many outputs as there are experts, or one; shared experts do not stay."""
    model = tiny_models.make(family)
    packed = {name: model.get_submodule(name).out_features for name in linear_names(model)}
    assert not any(size in (1, 8) for name, size in packed.items() if "linear_attn" not in name)
    shared = {name for name, part in model.named_modules() if "shared" in name and type(part) is nn.Linear}
    assert shared - packed.keys() <= {name for name in shared if name.endswith("shared_expert_gate")}


def test_dequantize():
    model = opened("int8")
    dense = {name: linear.dequantize().bfloat16() for name, linear in packed_linears(model) if name != "lm_head"}
    model.dequantize()
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in dense.items())


def test_adapters_train(float32_products):
    """LoRA of PEFT on packed attention and experts: the gradients of dense layers of the same values."""
    packed, dense = opened("int8").float(), opened(None).float()
    for name, linear in packed_linears(packed):
        dense.get_submodule(name).weight = nn.Parameter(linear.dequantize())  # the head's is not the embedding's then
    config = LoraConfig(r=4, target_modules=["q_proj", "o_proj"], target_parameters=["experts.gate_up_proj"])
    found = []
    for model in (packed, dense):
        torch.manual_seed(0)
        adapted = get_peft_model(model, copy.deepcopy(config))
        adapted.train()
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.02)
        loss = adapted(IDS, labels=IDS).loss
        loss.backward()
        found.append((loss.item(), {name: p.grad for name, p in adapted.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert found[0][1].keys() == found[1][1].keys() and len(found[0][1]) > 16
    for name, gradient in found[0][1].items():
        assert relative(gradient, found[1][1][name]) < 0.004, name  # weights are bf16 in the backward pass


def test_a_model_in_training_has_one_arithmetic():
    model = opened("int8")
    before = logits(model)
    model.train()
    model.eval()
    after = logits(model)
    assert not torch.equal(before, after)
    assert torch.equal(after, logits(model))


def test_merging_into_a_packed_layer_is_refused():
    adapted = get_peft_model(opened("int8"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(ArgumentError, match="packed weights, which are frozen"):
        adapted.merge_and_unload()


def test_copies_share_the_weights():
    model = opened("int8")
    copied = copy.deepcopy(model)
    assert torch.equal(logits(copied), logits(model))
    pairs = zip(packed_linears(model), packed_linears(copied), strict=True)
    assert all(a is b for (_, a), (_, b) in pairs)
    assert isinstance(copied.model.layers[0].self_attn.q_proj.weight, PackedWeight)
