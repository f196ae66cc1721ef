"""from_pretrained opens what others quantised: the same as converting it first and opening the result."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import tiny_models
import torch
from gpt_oss_checkpoints import write_mxfp4
from packed_models import assert_same_bytes, logits, packed_bytes
from peft import LoraConfig, get_peft_model
from quantised_checkpoints import COMPRESSED, GPTQ, METHODS, gptq
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import coterie
from coterie import plan
from coterie.cli import app
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.hf.converting import convert
from coterie.hf.modules import packed_modules

# Columns in every group size, rows in every number of an element.
SIZES = {"hidden_size": 128, "moe_intermediate_size": 192, "intermediate_size": 192}
QUANTISED = r"(experts|experts\.\d+|self_attn|mlp)\.\w+(?<!gate)\.weight"


def write(folder, family, make, method, which=QUANTISED, **sizes):
    """A model of that family whose weights of names `which` are quantised; what `make` gives replaces theirs."""
    model = tiny_models.make(family, **(SIZES | sizes))
    model.save_pretrained(folder)
    random, tensors = torch.Generator().manual_seed(0), {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if tensor.ndim != 2 or not re.search(which, name):
            tensors[name] = tensor
            continue
        parts, _ = make(random, *tensor.shape)
        base = name.removesuffix(".weight")
        tensors |= {f"{base}.{part}": value.contiguous().clone() for part, value in parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config=method)
    return folder


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_opens_as_converted(folder, tmp_path, converted_as=None, **options):
    convert(folder, tmp_path / "converted", **converted_as or {})
    converted = coterie.from_pretrained(tmp_path / "converted")
    opened, info = coterie.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert_same_bytes(opened, converted)
    assert opened.state_dict().keys() == converted.state_dict().keys()
    for (name, found), expected in zip(opened.named_parameters(), converted.parameters(), strict=True):
        assert found.dtype == expected.dtype and found.requires_grad == expected.requires_grad, name
    found = logits(opened)
    assert found.isfinite().all() and torch.equal(found, logits(converted))
    return opened


@pytest.mark.parametrize("method", METHODS)
def test_opens_as_converted(tmp_path, method):
    make, config, spec = METHODS[method]
    folder = write(tmp_path / "in", "qwen3_moe", make, config)
    model = assert_opens_as_converted(folder, tmp_path)
    stored = model.config.quantization_config
    assert stored.spec == spec and stored.quant_method == "coterie"
    planned = plan.open_source(str(folder))
    assert planned.own == stored.packing and planned.formats()[0] == planned.own and planned.choice is None
    assert plan.keeping_rate(planned.experts, planned.own) > 0


@pytest.mark.parametrize("family", tiny_models.QUANTISED)
def test_names_of_other_families(tmp_path, family):
    make, config, _ = METHODS[tiny_models.QUANTISED[family]]
    assert_opens_as_converted(write(tmp_path / "in", family, make, config), tmp_path)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_draft_layers_and_heads_are_left_out(tmp_path, family):
    """Their weights are quantised too, and the model has no place for them."""
    make, config, _ = METHODS["fp8 by blocks"]
    folder = write(tmp_path / "in", family, make, config)
    tensors = load_file(folder / "model.safetensors")
    last = max(int(found[1]) for name in tensors if (found := re.search(r"layers\.(\d+)\.", name)))
    copies = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): tensor.clone()
        for name, tensor in tensors.items()
        if f"layers.{last}." in name
    }
    save_file(tensors | copies, folder / "model.safetensors", {"format": "pt"})
    model = coterie.from_pretrained(folder)
    convert(folder, tmp_path / "converted")
    assert torch.equal(logits(model), logits(coterie.from_pretrained(tmp_path / "converted")))


def test_a_bias_that_the_model_lacks_is_told(tmp_path):
    """What stands beside codes is known; a bias is not one of it."""
    folder = write(tmp_path / "in", "qwen3_moe", *METHODS["GPTQ"][:2])
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.ones(64)}, folder / "model.safetensors", {"format": "pt"})
    _, info = coterie.from_pretrained(folder, output_loading_info=True)
    assert info["unexpected_keys"] == {name}


def test_gpt_oss(tmp_path):
    model = assert_opens_as_converted(write_mxfp4(tmp_path / "in"), tmp_path)
    assert model.config.quantization_config.experts == "mxfp4"


def test_in_another_format(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", *METHODS["fp8 by blocks"][:2])
    named = {"quant_method": "int4", "group_size": 64}
    model = assert_opens_as_converted(folder, tmp_path, named, experts="int4", group_size=64)
    assert model.config.quantization_config.group_size == 64


def test_saved_and_opened_again(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", *METHODS["GPTQ, zero points"][:2])
    model = coterie.from_pretrained(folder)
    model.save_pretrained(tmp_path / "saved")
    again = coterie.from_pretrained(tmp_path / "saved")
    assert_same_bytes(again, model)
    assert torch.equal(logits(again), logits(model))


def test_dtype_that_is_asked_for(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", *METHODS["AWQ"][:2])
    model = coterie.from_pretrained(folder, dtype=torch.float32)
    weight = coterie.from_pretrained(folder).get_parameter("model.layers.0.self_attn.q_proj.weight")
    found = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert weight.dtype == torch.bfloat16 and found.dtype == torch.float32 and torch.equal(found, weight.float())


def test_a_config_without_dtype(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", *METHODS["compressed-tensors fp8 by rows"][:2])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert coterie.from_pretrained(folder).dtype == torch.bfloat16


def test_a_config_that_is_given_stays(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", *METHODS["GPTQ"][:2])
    config = coterie.from_pretrained(folder).config.__class__.from_pretrained(folder)
    model = coterie.from_pretrained(folder, config=config)
    assert config.quantization_config["quant_method"] == "gptq"
    assert model.config.quantization_config.quant_method == "coterie"


def test_act_order_is_said_once(tmp_path, recwarn):
    folder = write(tmp_path / "in", "qwen3_moe", lambda *a: gptq(*a, scattered=True), GPTQ)
    assert_opens_as_converted(folder, tmp_path)
    assert sum("packed anew" in str(warning.message) for warning in recwarn) == 1


def test_experts_in_several_formats(tmp_path):
    """By projection they keep theirs, as attention does its own, and what is plain; or all become what is named."""
    rows, int4 = METHODS["compressed-tensors fp8 by rows"][0], METHODS["compressed-tensors int4"][0]

    def either(random, rows_, cols):
        return (rows if rows_ == SIZES["hidden_size"] else int4)(random, rows_, cols)

    folder = write(tmp_path / "in", "qwen3_moe", either, COMPRESSED, which=r"experts\.\d+\.\w+\.weight|[qk]_proj")
    model = coterie.from_pretrained(folder)
    assert [module.experts.format for _, module in packed_modules(model)] == 2 * ["int4/fp8_channel"]
    assert_opens_as_converted(folder, tmp_path / "kept")
    assert_opens_as_converted(folder, tmp_path / "named", {"quant_method": "int4"}, experts="int4")


def test_gate_and_up_in_two_formats_are_to_be_one(tmp_path):
    methods = itertools.cycle(METHODS[f"compressed-tensors {name}"][0] for name in ("fp8 by rows", "int4"))
    folder = write(tmp_path / "in", "qwen3_moe", lambda *a: next(methods)(*a), COMPRESSED, which=r"experts\.\d")
    planned = plan.open_source(str(folder))
    assert planned.problem is None and planned.own is None
    assert planned.choice.endswith("name one format for all experts")
    with pytest.raises(ArgumentError, match=re.escape(planned.choice)):
        coterie.from_pretrained(folder)
    said = " ".join(CliRunner().invoke(app, ["plan", str(folder), "--experts", "int4"]).output.split())
    assert f"experts=... is to be given: {planned.choice}." in said and "Not opened" not in said


def test_trains_an_adapter(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", *METHODS["fp8 by blocks"][:2])
    model = coterie.from_pretrained(folder)
    before = list(packed_bytes(model).values())
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapted = get_peft_model(model, LoraConfig(r=4, **targets))
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer, ids, losses = torch.optim.AdamW(trained, 1e-2), tiny_models.prompt(), []
    for _ in range(3):
        loss = adapted(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(packed_bytes(model).values(), before, strict=True))


# --- what is refused, before weights are read ---


def test_a_method_that_is_not_read(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", gptq, GPTQ)
    for method, message in (
        ({"quant_method": "bitsandbytes"}, "quantised by bitsandbytes: this version reads"),
        (GPTQ | {"checkpoint_format": "marlin"}, "quantised by gptq with checkpoint_format 'marlin'"),
    ):
        edit_json(folder / "config.json", quantization_config=method)
        with pytest.raises(UnsupportedModelError, match=message):
            coterie.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.experts.3.down_proj.scales"), "experts.3.down_proj.scales"),
        (lambda t: t.pop("model.layers.1.self_attn.q_proj.scales"), "self_attn.q_proj"),
        (
            lambda t: t.update(dict.fromkeys(["model.layers.1.self_attn.q_proj.act_scale"], torch.ones(1))),
            "self_attn.q_proj.act_scale' .F32.: this version does not know",
        ),
    ],
)
def test_broken(tmp_path, change, message):
    folder = write(tmp_path / "in", "qwen3_moe", gptq, GPTQ)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        coterie.from_pretrained(folder)


def test_sizes_that_config_denies(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", gptq, GPTQ)
    edit_json(folder / "config.json", moe_intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"layer 0: intermediate_size is 192, config\.json says 64"):
        coterie.from_pretrained(folder)


def test_weights_of_another_shape(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", gptq, GPTQ)
    edit_json(folder / "config.json", num_attention_heads=8)
    with pytest.raises(CheckpointError, match=r"self_attn.o_proj.qweight: shape \[128, 64\], expected \[128, 128\]"):
        coterie.from_pretrained(folder)


def test_not_mapped(tmp_path):
    folder = write(tmp_path / "in", "qwen3_moe", gptq, GPTQ)
    with pytest.raises(ArgumentError, match="mmap=True needs a packed checkpoint"):
        coterie.from_pretrained(folder, mmap=True)
