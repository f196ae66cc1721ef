"""LoRA on packed experts through PEFT: the same losses, gradients and files as PEFT has on the dequantised weights."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import tiny_models
import torch
from lora_models import PARAMETERS, adapt, dequantised, loss_and_gradients, packed, randomise, relative, twin
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie import ops, tiny
from coterie.errors import ArgumentError

BF16 = 0.012  # relative error of a gradient that was computed from bf16 activations


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.prompt()).logits


def one_moe_layer(family: str) -> dict:
    """What leaves one MoE layer: no router then sees rounding before it, which could send a token elsewhere."""
    own, names = tiny_models.FAMILIES[family], ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers")
    dense = next((own[name] for name in (*names, "expert_layer_offset") if name in own), 0)
    kinds = {"layer_types": ["full_attention"] * (dense + 1)} if "layer_types" in own else {}
    kinds |= {"attn_layer_period": 1, "attn_layer_offset": 0} if "attn_layer_period" in own else {}
    return {"num_hidden_layers": dense + 1, **kinds}


def assert_same_training(path, experts: str, **changes) -> None:
    ours = adapt(packed(path, experts), **changes)
    stock = twin(ours, dequantised(path, experts), **changes)
    loss, gradients = loss_and_gradients(ours)
    expected_loss, expected = loss_and_gradients(stock)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=2e-3)
    assert gradients.keys() == expected.keys()
    errors = {name: relative(gradients[name], expected[name]) for name in gradients}
    assert max(errors.values()) < BF16, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_trains_like_peft(family, tmp_path):
    tiny_models.make(family, **one_moe_layer(family)).save_pretrained(tmp_path)
    assert_same_training(tmp_path, "bf16")


@pytest.mark.parametrize("experts", ["int8", "int4"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_trains_like_peft_on_quantised_weights(family, experts, tmp_path):
    tiny_models.make(family, **one_moe_layer(family)).save_pretrained(tmp_path)
    assert_same_training(tmp_path, experts)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"rank_pattern": {"experts.down_proj": 7}, "alpha_pattern": {"experts.down_proj": 3}},
        {"target_parameters": ["experts.down_proj"]},
        {"target_parameters": ["experts.gate_up_proj"]},
        {"target_modules": ["q_proj", "o_proj"]},
        {"r": 1},
    ],
    ids=str,
)
def test_options_of_lora(changes, tmp_path):
    tiny_models.make("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path)
    assert_same_training(tmp_path, "int8", **changes)


def test_loss_curve_equals_stock_peft():
    """30 steps of AdamW on the bundled model, int4: within 1% of PEFT on the dequantised weights, step by step."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(tiny.PATH)(tiny.heldout_text())["input_ids"])
    batches = ids[: 6 * 2 * 32].view(6, 2, 32).repeat(5, 1, 1)
    ours = adapt(packed(tiny.PATH, "int4"), r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    stock = twin(ours, dequantised(tiny.PATH, "int4"), r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    curves = []
    for model in (ours, stock):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for batch in batches:
            loss = model(batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    assert curves[0][-6:].mean() < 0.8 * curves[0][:6].mean()
    assert ((curves[0] - curves[1]) / curves[1]).abs().max() < 0.01


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_adapter_is_pefts_own(family, tmp_path):
    """Bit-equal when loaded in coterie; in PEFT alone, on the original checkpoint, equal but for bf16."""
    tiny_models.make(family, **one_moe_layer(family)).save_pretrained(tmp_path / "model")
    model = adapt(packed(tmp_path / "model", "bf16"), target_modules=["q_proj"])
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(packed(tmp_path / "model", "bf16"), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert relative(logits(plain), logits(model)) < BF16
    assert relative(logits(packed(tmp_path / "model", "bf16")), logits(model)) > 5 * BF16
    shapes = {
        name.partition("experts.")[2]: v.shape
        for name, v in load_file(next(tmp_path.glob("adapter/*.safetensors"))).items()
    }
    assert {"base_layer.lora_A.weight", "base_layer.lora_B.weight", "lora_A.weight", "lora_B.weight"} <= shapes.keys()


def test_adapters_are_switched_and_disabled(checkpoint):
    model = adapt(packed(checkpoint("qwen3_moe")))
    base = logits(packed(checkpoint("qwen3_moe")).train().eval())
    first = logits(model)
    model.add_adapter("second", LoraConfig(r=3, target_parameters=PARAMETERS))
    randomise(model, seed=5)
    model.set_adapter("default")
    default = logits(model)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(default, second) and not torch.equal(first, second)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), second)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), default)


def test_adapters_active_together_add_up(checkpoint):
    models = []
    for make in (packed, dequantised):
        model = adapt(make(checkpoint("qwen3_moe")))
        model.add_adapter("second", LoraConfig(r=3, lora_alpha=12, target_parameters=PARAMETERS))
        randomise(model, seed=5)
        models.append(model)
    for name, parameter in models[1].named_parameters():
        if "lora_" in name:
            parameter.data.copy_(models[0].get_parameter(name).data)
    for model in models:
        model.base_model.set_adapter(["default", "second"])
    assert relative(logits(models[0]), logits(models[1])) < BF16


def test_merging_is_refused_before_anything_changes(checkpoint):
    model = adapt(packed(checkpoint("qwen3_moe")), target_modules=["q_proj"])
    before = logits(model)
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ArgumentError, match=r"packed.*coterie adapter merge"):
            merge()
    assert torch.equal(logits(model), before)
    base = model.unload()
    assert torch.equal(logits(base), logits(packed(checkpoint("qwen3_moe")).train().eval()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 0}, "down_proj: expected r >= 1, found 0|gate_up_proj: expected r >= 1, found 0"),
        ({"rank_pattern": {"experts.down_proj": -1}}, "down_proj: expected r >= 1, found -1"),
        ({"use_dora": True}, "use_dora=True is not supported"),
        ({"lora_dropout": 0.1}, "lora_dropout=0.1 is not supported"),
        ({"lora_bias": True}, "lora_bias=True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' is not supported"),
        ({"target_parameters": ["experts.down_proj_bias"]}, "expected target_parameters gate_up_proj or down_proj"),
    ],
)
def test_what_cannot_be_computed_is_refused(changes, message, checkpoint):
    with pytest.raises(ArgumentError, match=message):
        get_peft_model(packed(checkpoint("gpt_oss")), LoraConfig(**{"target_parameters": PARAMETERS, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_local_experts": 4}, r"expected shape \[16, \d+\], found \[\d+, \d+\]"),
        ({"hidden_size": 96}, r"expected shape \[\d+, 96\]"),
        ({"intermediate_size": 64}, "expected shape"),
        ({"num_hidden_layers": 1}, r"expected 4 tensors, found 8: 4 have no place in it, .*layers\.1\."),
        ({"num_hidden_layers": 3}, r"expected 12 tensors, found 8: 4 are missing, .*layers\.2\."),
    ],
    ids=str,
)
def test_adapter_of_another_model(changes, message, checkpoint, tmp_path):
    adapt(packed(checkpoint("mixtral"))).save_pretrained(tmp_path)
    tiny_models.make("mixtral", **changes).save_pretrained(tmp_path / "other")
    expected = rf"does not fit MixtralForCausalLM: .*{message}.*trained on \({re.escape(str(checkpoint('mixtral')))}\)"
    with pytest.raises(ArgumentError, match=expected):
        PeftModel.from_pretrained(packed(tmp_path / "other"), tmp_path)


def test_adapter_of_another_rank(checkpoint, tmp_path):
    """What is loaded into an adapter that is there must fit it; what was there is kept."""
    adapt(packed(checkpoint("mixtral"))).save_pretrained(tmp_path)
    model = adapt(packed(checkpoint("mixtral")), seed=1, r=8)
    before = logits(model)
    with pytest.raises(ArgumentError, match="does not fit"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(logits(model), before)


def test_other_models_are_left_to_peft(checkpoint):
    """A model of Transformers alone trains and merges as if coterie were not there."""
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), dtype=torch.float32)
    model = adapt(plain)
    expected = logits(model)
    assert relative(logits(model.merge_and_unload()), expected) < 1e-4


def test_packs_a_model_of_transformers_under_an_adapter(checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), experts_implementation="coterie")
    model = adapt(plain)
    _, gradients = loss_and_gradients(model)
    assert len(gradients) == 8
    assert torch.equal(logits(model), logits(twin(model, coterie.from_pretrained(checkpoint("qwen3_moe"), "bf16"))))


def test_checkpointing_gives_the_same_gradients(checkpoint, monkeypatch):
    """None, reentrant, non-reentrant, and selective, which runs each layer's experts once."""
    runs = []
    run = ops._run
    monkeypatch.setattr(ops, "_run", lambda *args: runs.append(1) or run(*args))
    kinds = {
        "none": (None, 2),
        "reentrant": ({"use_reentrant": True}, 4),
        "all recomputed": (coterie.checkpointing(retain_experts=False), 4),
        "experts retained": (coterie.checkpointing(), 2),
    }
    results = {}
    for name, (options, expected_runs) in kinds.items():
        model = adapt(packed(checkpoint("qwen3_moe")), target_modules=["q_proj"])
        model.train()
        if options is not None:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        runs.clear()
        results[name] = loss_and_gradients(model)
        assert len(runs) == expected_runs, name
    loss, gradients = results.pop("none")
    for name, (other_loss, others) in results.items():
        assert torch.equal(loss, other_loss), name
        assert all(torch.equal(gradients[key], others[key]) for key in gradients), name


def test_importing_coterie_leaves_peft_alone():
    code = "import sys, coterie; assert 'peft' not in sys.modules\nimport peft; assert 'coterie.hf.peft' in sys.modules"
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, capture_output=True)
