"""Adapters written for servers and merged into checkpoints."""

from __future__ import annotations

import json
import os
import re
import resource
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie import tiny
from coterie.adapters.export import export_adapter
from coterie.adapters.merge import merge_adapter
from coterie.bench.memory import peak_rise
from coterie.errors import ArgumentError, CheckpointError
from coterie.hf.modules import packed_modules

IDS = torch.arange(20, 60)[None]
BF16 = 0.012


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.requires_grad_(False)(IDS).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> tuple[Path, PeftModel]:
    """(folder of an adapter on the bundled model, that model on packed bf16 experts)."""
    torch.manual_seed(0)
    model = coterie.from_pretrained(tiny.PATH, experts="bf16", dtype=torch.float32)
    config = LoraConfig(
        r=4,
        target_modules=["q_proj"],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        rank_pattern={"experts.down_proj": 3},
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory) -> Path:
    """A base whose experts are transposed, gate and up in turns."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=2048,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_local_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    folder = tmp_path_factory.mktemp("gpt_oss")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny.PATH).save_pretrained(folder)
    return folder


def test_merged_adapter_gives_the_unmerged_logits(adapted, tmp_path):
    folder, model = adapted
    done = merge_adapter(folder, tmp_path / "merged")
    assert 0 < done.rounding_error < 0.004 and done.quantisation_error == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(logits(merged), logits(model)) < BF16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 2048


def test_merged_and_packed_again(adapted, tmp_path):
    """The same bits as from the merged model, packed when it is loaded."""
    folder, _ = adapted
    done = merge_adapter(folder, tmp_path / "merged", experts="int8")
    merged = coterie.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert merged.config.quantization_config.experts == "int8"
    assert not (tmp_path / "merged" / "plain").exists()
    merge_adapter(folder, tmp_path / "plain")
    packed = coterie.from_pretrained(tmp_path / "plain", experts="int8", dtype=torch.float32)
    assert torch.equal(logits(merged), logits(packed))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    errors = []
    for name, module in packed_modules(merged):
        experts = plain.get_submodule(name)
        gate, up = experts.gate_up_proj.chunk(2, dim=1)
        for found, expected in zip(module.experts.dequantize(), (gate, up, experts.down_proj), strict=True):
            errors += ((found - expected).norm(dim=(1, 2)) / expected.norm(dim=(1, 2))).tolist()
    assert done.quantisation_error == pytest.approx(max(errors), rel=1e-5)  # float32 sums


@pytest.mark.parametrize("stacked", [False, True])
def test_merged_as_peft_merges_in_float32(stacked, tmp_path):
    """PEFT's merge of the whole model, rounded once to nearest; experts stored apart or stacked, in shards."""
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH)
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="1MB", save_original_format=not stacked)
    AutoTokenizer.from_pretrained(tiny.PATH).save_pretrained(base)
    config = LoraConfig(
        target_modules=["q_proj", "o_proj"],
        target_parameters=["experts.down_proj"],
        modules_to_save=["model.norm", "layers.1.mlp.gate"],
        init_lora_weights=False,
        use_rslora=True,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    with torch.no_grad():
        model.get_parameter("base_model.model.model.norm.modules_to_save.default.weight").mul_(1.25)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    assert sorted(f.name for f in (tmp_path / "merged").iterdir()) == sorted(f.name for f in base.iterdir())
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = PeftModel.from_pretrained(plain, tmp_path / "adapter").float().merge_and_unload()
    merged, before = (AutoModelForCausalLM.from_pretrained(path) for path in (tmp_path / "merged", base))
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in before.parameters())
    changed = set()
    for name, parameter in expected.named_parameters():
        rounded = parameter.to(torch.bfloat16)
        off, least = ((p.float() - parameter).abs() for p in (merged.get_parameter(name), rounded))
        assert (off <= least + 1e-6 * parameter.abs().max()).all(), name
        if not torch.equal(rounded, before.get_parameter(name)):
            changed.add(re.sub(r"\d+", "*", name))
    assert changed == {
        "model.norm.weight",
        "model.layers.*.mlp.experts.down_proj",
        "model.layers.*.self_attn.q_proj.weight",
        "model.layers.*.self_attn.o_proj.weight",
    }


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc/self/clear_refs")
@pytest.mark.parametrize("experts", ["bf16", "int4"])
def test_merging_takes_the_memory_of_an_expert(experts, tmp_path):
    """Of 200 MB of experts and an adapter of 2 MB, never a layer is in memory."""
    sizes = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 32, "num_hidden_layers": 2}
    config = AutoConfig.from_pretrained(tiny.PATH, layer_types=None, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    layer = sum(p.nbytes for p in model.model.layers[0].mlp.experts.parameters())
    assert layer > 95 << 20
    for stacked in (False, True):
        model.save_pretrained(tmp_path / str(stacked), save_original_format=not stacked)
    parameters = ["experts.gate_up_proj", "experts.down_proj"]
    lora = LoraConfig(r=1, target_parameters=parameters, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    del model
    merge_adapter(tmp_path / "adapter", tmp_path / "first", str(tmp_path / "False"), experts)  # imports, workspace
    for stacked in (False, True):
        base, output = str(tmp_path / str(stacked)), tmp_path / f"merged {stacked}"
        rise = peak_rise(lambda base=base, output=output: merge_adapter(tmp_path / "adapter", output, base, experts))
        assert rise < 0.75 * layer  # 0.43 to 0.52 measured


def test_adapters_that_are_more_than_lora(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    config = LoraConfig(target_modules=["q_proj"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(logits(merged), logits(model)) < BF16


def test_merged_into_a_packed_base(adapted, tmp_path):
    folder, _ = adapted
    coterie.from_pretrained(tiny.PATH, experts="int8").save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny.PATH).save_pretrained(tmp_path / "base")
    merge_adapter(folder, tmp_path / "merged", str(tmp_path / "base"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    beside = PeftModel.from_pretrained(coterie.from_pretrained(tmp_path / "base", dtype=torch.float32), folder)
    assert relative(logits(merged), logits(beside)) < BF16


def test_merged_into_transposed_experts(gpt_oss, tmp_path):
    model = coterie.from_pretrained(gpt_oss, experts="bf16", dtype=torch.float32)
    config = LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False)
    model = get_peft_model(model, config)
    model.save_pretrained(tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(logits(merged), logits(model)) < BF16


def test_exported_tensors_add_up_to_the_same_weights(adapted, tmp_path):
    """W + scaling * B A of every exported pair is the merged weight."""
    plain = AutoModelForCausalLM.from_pretrained(tiny.PATH, dtype=torch.float32)
    before = {name: p.clone() for name, p in plain.named_parameters()}
    merged = PeftModel.from_pretrained(plain, adapted[0]).merge_and_unload()
    done = export_adapter(adapted[0], tmp_path / "exported")
    tensors = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert done.tensors == len(tensors) == 4 * (16 * 3 + 1) * 2 and done.experts == 4 * 16
    config = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["down_proj", "gate_proj", "q_proj", "up_proj"]
    assert not config["target_parameters"]
    for e in (0, 3):
        module = "model.layers.1.mlp.experts"
        gate_up, down = (
            (merged.get_parameter(f"{module}.{name}") - before[f"{module}.{name}"])[e]
            for name in ("gate_up_proj", "down_proj")
        )
        gate, up = gate_up.chunk(2)
        for name, delta in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
            key = f"{module}.{e}.{name}"
            a, b = (tensors[f"base_model.model.{key}.lora_{x}.weight"] for x in "AB")
            rank = next((r for pattern, r in config["rank_pattern"].items() if re.fullmatch(pattern, key)), config["r"])
            assert a.shape[0] == b.shape[1] == rank == (3 if name == "down_proj" else 4)
            assert torch.allclose(config["lora_alpha"] / rank * (b @ a), delta, atol=1e-5)


def test_stacked_experts_keep_pefts_tensors(gpt_oss, tmp_path):
    config = LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], init_lora_weights=False)
    get_peft_model(coterie.from_pretrained(gpt_oss), config).save_pretrained(tmp_path / "adapter")
    assert export_adapter(tmp_path / "adapter", tmp_path / "exported").experts == 0
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("exported", "adapter"))
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("layers", [2, 6])
@pytest.mark.parametrize("command", [export_adapter, merge_adapter])
def test_adapter_of_a_model_of_other_depth(command, layers, adapted, tmp_path):
    """PEFT itself would apply it to the layers there are."""
    config = AutoConfig.from_pretrained(tiny.PATH, num_hidden_layers=layers, layer_types=None)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny.PATH).save_pretrained(tmp_path / "other")
    with pytest.raises(ArgumentError, match=rf"does not fit .*expected {6 * layers} tensors, found 24"):
        command(adapted[0], tmp_path / "out", str(tmp_path / "other"))
    assert not (tmp_path / "out").exists()


def test_what_is_refused(adapted, gpt_oss, tmp_path):
    folder, _ = adapted
    for command in (export_adapter, merge_adapter):
        with pytest.raises(CheckpointError, match="has no adapter_config"):
            command(tmp_path, tmp_path / "out")
        with pytest.raises(ArgumentError, match="does not fit"):
            command(folder, tmp_path / "out", str(gpt_oss))
        (tmp_path / "full").mkdir(exist_ok=True)
        (tmp_path / "full" / "file").touch()
        with pytest.raises(ArgumentError, match="is not empty"):
            command(folder, tmp_path / "full")
    with pytest.raises(ArgumentError):
        merge_adapter(folder, tmp_path / "out", experts="int3")
    attention = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny.PATH), LoraConfig(target_modules=["q_proj"]))
    attention.save_pretrained(tmp_path / "attention")
    with pytest.raises(ArgumentError, match="adapts no experts"):
        export_adapter(tmp_path / "attention", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("limit", [100, 10_000], ids=["at once", "later"])
@pytest.mark.parametrize("write", [export_adapter, merge_adapter])
def test_a_disk_that_fills_up(write, limit, adapted, tmp_path):
    """A limit on the size of one file stands in for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*out.*File too large"):
            write(adapted[0], tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_commands(adapted, tmp_path, monkeypatch, capsys):
    from coterie import cli

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["coterie", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out = capsys.readouterr()
        return ended.value.code or 0, out.out + out.err

    code, text = run("adapter", "export", "-a", adapted[0], "-o", tmp_path / "exported")
    assert code == 0 and "64" in text
    code, text = run("adapter", "merge", "-a", adapted[0], "-o", tmp_path / "merged", "--experts", "int4")
    assert code == 0 and "quantising to int4" in text
    code, text = run("adapter", "merge", "-a", tmp_path, "-o", tmp_path / "merged")
    assert code == 2 and text.startswith("coterie: ")
    code, text = run("sft", "--init", tmp_path / "mine.yaml")
    assert code == 0 and (tmp_path / "mine.yaml").exists()
    code, text = run("sft", "--validate", tmp_path / "mine.yaml")
    assert code == 0 and "248 rows" in text
    (tmp_path / "wrong.yaml").write_text("lora_rank: 8")
    code, text = run("sft", tmp_path / "wrong.yaml")
    assert code == 2 and "did you mean lora_r or" in text
