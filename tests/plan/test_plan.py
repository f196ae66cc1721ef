"""What plan says of a model, against what the model really takes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from hf.tiny_models import FAMILIES, make
from made_checkpoints import write_checkpoint
from quantised_checkpoints import quantised

import coterie
from coterie import Experts, formats, machine, plan, tiny
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.formats import Formats
from coterie.hf.modules import packed_modules
from coterie.plan import source as plan_source
from coterie.train import config as sft

RATES = plan.Rates(bandwidth=1e9, bf16=2e9, int8=4e9)


def inspect(path, context=4096):
    return plan.inspect(plan.open_source(str(path)).config, context)


def one(*format):
    return ModelFormats(formats.resolve(*format))


def write(folder, values):
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tiny_config(**changes):
    return {**json.loads((tiny.PATH / "config.json").read_text()), **changes}


@pytest.mark.parametrize("family", FAMILIES)
def test_counts_are_those_of_the_real_model(tmp_path, family):
    model = make(family)
    model.config.save_pretrained(tmp_path)
    anatomy = inspect(tmp_path, context=20)
    assert anatomy.parameters == sum(p.numel() for p in model.parameters())
    with torch.inference_mode():
        cache = model(input_ids=torch.zeros(1, 20, dtype=torch.long), use_cache=True).past_key_values
    tensors = {id(t): t for layer in cache.layers for t in tensors_in(vars(layer))}
    assert anatomy.cache_nbytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert {layer.per_token for layer in anatomy.experts} == {2}


def tensors_in(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)


@pytest.mark.parametrize("format", formats.FORMATS)
def test_expert_bytes_are_those_of_the_packed_model(format):
    model = coterie.from_pretrained(tiny.PATH, experts=format)
    packed = sum(module.experts.nbytes for _, module in packed_modules(model))
    anatomy = inspect(tiny.PATH)
    assert anatomy.experts_nbytes(one(format)) == packed
    assert anatomy.experts_read_nbytes(one(format)) == packed * 4 // 16


def test_bytes_and_speed_of_several_formats(tmp_path):
    """By layer, as config.json alone says them; a layer is multiplied in int8 where both of its formats are."""
    layers = [Formats.of(formats.resolve("int4")), Formats(formats.resolve("q4_k"), formats.resolve("bf16"))]
    packing = ModelFormats.of({n: layers[n % 2] for n in range(4)})
    stored = json.loads(json.dumps({"quant_method": "coterie", "version": "2.0", **packing.stored()}))
    assert list(stored["formats"]) == ["0, 2", "1, 3"]
    source = plan.open_source(str(write(tmp_path, tiny_config(quantization_config=stored))))
    assert source.formats() == [packing] and source.problem is None
    with pytest.raises(ArgumentError, match="packed as int4/q4_k/bf16"):
        source.formats("int4")
    anatomy = plan.inspect(source.config)
    whole = sum(Experts.empty(16, 128, 128, format=each).nbytes for each in layers)
    assert anatomy.experts_nbytes(packing) == 2 * whole
    found = plan.estimate(anatomy, packing, 10**10, RATES)
    assert (found.format, found.experts, found.problem) == ("int4/q4_k/bf16", 2 * whole, None)
    halves = anatomy.active_expert_parameters / 2
    products = halves / 4e9 + (halves + anatomy.active_rest_parameters - anatomy.head_parameters) / 2e9
    assert found.prefill == pytest.approx(1 / (2 * products))


def test_stored_bytes_come_from_the_headers(tmp_path):
    assert plan.open_source(str(tiny.PATH)).stored == {"BF16": 2 * inspect(tiny.PATH).parameters}
    assert plan.open_source(str(tiny.PATH / "config.json")).stored == {}


def test_what_is_needed_and_the_bounds():
    anatomy, spec = inspect(tiny.PATH), one("int4")
    needed = anatomy.experts_nbytes(spec) + anatomy.rest_nbytes + anatomy.cache_nbytes + plan.RESERVE
    found = plan.estimate(anatomy, spec, needed - 5, RATES)
    assert (found.ram, found.ram_short, found.problem) == (needed, 5, None)
    read = anatomy.experts_read_nbytes(spec) + 2 * anatomy.active_rest_parameters + anatomy.cache_nbytes
    assert found.decode == pytest.approx(1e9 / read)
    products = anatomy.active_rest_parameters - anatomy.head_parameters
    assert found.prefill == pytest.approx(1 / (2 * anatomy.active_expert_parameters / 4e9 + 2 * products / 2e9))
    assert plan.usable(100) == 95


def test_what_is_predicted():
    """Bytes, operations and overheads, each at a rate of its own."""
    anatomy, spec = inspect(tiny.PATH), one("fp8_block")  # multiplied in bf16
    besides = {"row": 0.5e9, "attention": 3e9, "layer": 0.01, "forward": 0.02, "reached": 0.5}
    rates = plan.Rates(bandwidth=1e9, bf16=2e9, int8=4e9, **besides)
    found = plan.estimate(anatomy, spec, 10**10, rates)
    packed = anatomy.experts_read_nbytes(spec) + anatomy.cache_nbytes
    seconds = (packed / 1e9 + 4 * 0.01 + 0.02) / 0.5 + 2 * anatomy.active_rest_parameters / 0.5e9
    assert found.decode == pytest.approx(1 / seconds)
    products = anatomy.active_expert_parameters + anatomy.active_rest_parameters - anatomy.head_parameters
    attention = 4 * (2 * 2 * 4 * 32) * plan.PROMPT**2  # layers, products, heads of 32
    assert (anatomy.layers, anatomy.prompt_operations) == (4, attention)
    seconds = (plan.PROMPT * 2 * products / 2e9 + attention / 3e9 + 4 * 0.01 + 0.02) / 0.5
    assert found.prefill == pytest.approx(plan.PROMPT / seconds)


def test_queries_that_meet_latents():
    """A decoded token's, of all positions: the sums of keys' products and of values'."""
    config = make("deepseek_v3").config
    rates = plan.Rates(bandwidth=1e9, bf16=2e9, int8=4e9, attention=3e9)
    near, far = (plan.inspect(config, context) for context in (10, 1000))
    assert near.latent_operations == 2 * 10 * 3 * 4 * (2 * 16 + 8)  # layers, heads, widths
    soon, late = (1 / plan.estimate(anatomy, one("int4"), 10**10, rates).decode for anatomy in (near, far))
    read = (far.cache_nbytes - near.cache_nbytes) / 1e9
    assert late - soon == pytest.approx(read + (far.latent_operations - near.latent_operations) / 3e9)
    assert plan.inspect(make("mixtral").config).latent_operations == 0


def test_overhead_and_rates_are_measured():
    layer, forward = plan.overhead()
    assert 0 <= layer < 1 and 0 <= forward < 1 and layer + forward > 1e-5
    assert machine.attention_rate(0.01) > 1e8 and machine.row_rate(0.01) > 1e8


def test_a_format_that_does_not_divide_the_columns_is_said_so(tmp_path):
    anatomy = inspect(write(tmp_path, tiny_config(moe_intermediate_size=80)))
    assert "80 columns" in plan.estimate(anatomy, one("int4"), 10**10, RATES).problem


def test_a_packed_folder_is_its_own_format_alone(tmp_path):
    packed = {"quant_method": "coterie", "version": "2.0", "experts": "int4", "group_size": 64, "zero_point": True}
    source = plan.open_source(str(write(tmp_path, tiny_config(quantization_config=packed))))
    assert source.problem is None and source.quantised is None
    assert source.formats() == source.formats("int4") == [one("int4", 64, True)]
    with pytest.raises(ArgumentError, match="packed as int4"):
        source.formats("int8")


@pytest.mark.parametrize(
    ("quantization", "name", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8 + 32 / 128**2),
        ({"quant_method": "mxfp4"}, "mxfp4", 4.25),
        ({"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}, "int4", 4.125),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4", 4.5),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 32, "symmetric": True}}},
            },
            "pack-quantized",
            4.5,
        ),
        ({"quant_method": "novel", "bits": "few"}, "unnamed", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_that_others_quantised_are_counted_as_they_are(tmp_path, quantization, name, bits):
    source = plan.open_source(str(write(tmp_path, tiny_config(quantization_config=quantization))))
    if quantization["quant_method"] == "novel":
        assert re.search("it is quantised by novel: this version reads .* a copy written in bf16$", source.problem)
    else:
        assert source.problem is None
    assert source.quantised.name == name and source.quantised.bits == bits
    assert plan.inspect(source.config).parameters == inspect(tiny.PATH).parameters


def test_a_quantised_folder(tmp_path):
    tensors, config, _ = quantised("fp8 by blocks")
    source = plan.open_source(str(write_checkpoint(tmp_path, tensors, config)))
    assert source.problem is None and source.stored["F8_E4M3"] > 0
    config["quantization_config"] = config["quantization_config"] | {"weight_block_size": [64, 64]}
    source = plan.open_source(str(write_checkpoint(tmp_path, tensors, config)))
    assert "quantised by fp8 with weight_block_size [64, 64]" in source.problem


def test_a_hub_id_has_its_config_downloaded_and_a_path_never(monkeypatch):
    asked = []

    def download(model, file):
        asked.append((model, file))
        if model == "a/missing":
            raise OSError("no such model")
        return str(tiny.PATH / "config.json")

    monkeypatch.setattr(plan_source, "hf_hub_download", download)
    assert plan.open_source("a/b").config.model_type == "qwen3_moe"
    with pytest.raises(CheckpointError, match=r"a/missing is no folder here.*no such model"):
        plan.open_source("a/missing")
    for path in ("/nowhere", "./a", "a/b/c", "config.json", "model.gguf"):
        with pytest.raises(CheckpointError, match="does not exist"):
            plan.open_source(path)
    assert asked == [("a/b", "config.json"), ("a/missing", "config.json")]


def test_what_is_no_model_says_what_it_is(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    with pytest.raises(CheckpointError, match="adapter, plan some/base"):
        plan.open_source(str(tmp_path))


def test_training_counts_what_sft_adapts_and_grows_with_its_options():
    config = plan.open_source(str(tiny.PATH)).config
    anatomy = plan.inspect(config)
    small, long, high = (
        plan.train_inspect(config, anatomy, rank, 1, tokens) for rank, tokens in ((4, 64), (4, 128), (8, 64))
    )
    model = coterie.from_pretrained(tiny.PATH, experts="int4")
    lora = sft.TrainConfig()
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model,
        LoraConfig(r=4, target_modules=lora.lora_target_modules, target_parameters=lora.lora_target_parameters),
    )
    assert small.lora == 4 * sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert high.lora == 2 * small.lora
    assert small.activations < long.activations < 2.2 * small.activations
    assert small.checkpointed < small.activations
    with pytest.raises(ArgumentError, match="sequence-len"):
        plan.train_inspect(config, anatomy, tokens=0)


def test_multimodal_models_are_built_as_their_config_names_them():
    from transformers import Qwen3VLMoeConfig

    text = {"num_hidden_layers": 2, "hidden_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 64}
    text |= {"moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64, "deepstack_visual_indexes": [0]}
    config = Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    config.architectures = ["Qwen3VLMoeForConditionalGeneration"]
    anatomy = plan.inspect(config, 16)
    assert [layer.per_token for layer in anatomy.experts] == [2, 2]
    assert anatomy.cache_nbytes == 2 * 2 * 16 * 2 * 16 * 2
    assert anatomy.active_rest_parameters < anatomy.rest_parameters - 64 * 64


def test_long_contexts_are_extrapolated_exactly_where_the_cache_grows_evenly():
    short, long = inspect(tiny.PATH, 100), inspect(tiny.PATH, 100_000)
    assert long.cache_nbytes == 1000 * short.cache_nbytes


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("not json", CheckpointError, "not valid JSON"),
        ("[]", CheckpointError, "expected an object"),
        ('{"model_type": "no_such_model"}', UnsupportedModelError, "no_such_model"),
        ("{}", UnsupportedModelError, "model_type is None"),
        ('{"model_type": "qwen3_moe", "hidden_size": "wide"}', CheckpointError, "qwen3_moe"),
    ],
)
def test_bad_configs(tmp_path, content, error, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match=message):
        inspect(tmp_path)


def test_a_dense_model_is_refused_by_name(tmp_path):
    dense = {"model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    with pytest.raises(UnsupportedModelError, match="Qwen3ForCausalLM"):
        inspect(tmp_path)
