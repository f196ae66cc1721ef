"""`coterie convert gpu` with a stand-in for llm-compressor: what it is given, and what becomes of it."""

import json
import re
import sys
from pathlib import Path

import llm_compressor
import pytest
import torch
import transformers
from made_checkpoints import write_checkpoint
from quantised_checkpoints import quantised

from coterie import tiny
from coterie.convert import convert_cpu
from coterie.convert.gpu import IGNORED, GpuConversion
from coterie.errors import ArgumentError

NEEDED = ("--model_id", tiny.PATH, "--force_cpu")


@pytest.fixture
def given(monkeypatch):
    """What `oneshot` was called with."""
    return llm_compressor.install(monkeypatch)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {n} " * 9, "x": n}) + "\n" for n in range(10)))
    return path


def test_gptq(coterie, tmp_path, given, texts):
    data = ("--dataset", texts, "--num_calibration_samples", 4, "--max_sequence_length", 7, "--dampening_frac", 0.05)
    more = ("--ignore_patterns", "lm_head", "--ignore_patterns", "re:.*gate", "--quant_type", "W8A16")
    ran = coterie("convert", "gpu", *NEEDED, "--output_dir", tmp_path / "out", *data, *more)
    assert ran.code == 0 and "W8A16 by GPTQ" in ran.out
    assert type(given["recipe"]) is llm_compressor.GPTQModifier
    expected = {"targets": "Linear", "scheme": "W8A16", "ignore": ["lm_head", "re:.*gate"], "dampening_frac": 0.05}
    assert given["recipe"].given == expected
    assert (given["num_calibration_samples"], given["max_seq_length"]) == (4, 7)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.PATH)
    rows = [tokenizer(f"number {n} " * 9, truncation=True, max_length=7)["input_ids"] for n in range(10)]
    assert len(given["dataset"]) == 4 and all(row["input_ids"] in rows for row in given["dataset"])
    assert "text" not in given["dataset"].column_names
    assert given["model"].dtype == torch.bfloat16 and given["model"].device.type == "cpu"
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_chats(coterie, tmp_path, given):
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": chat}) + "\n")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny.PATH)
    ran = coterie("convert", "gpu", *NEEDED, "--output_dir", tmp_path / "out", "--dataset", path)
    if tokenizer.chat_template is None:
        assert ran.code == 2 and "no chat template" in ran.err
        return
    assert ran.code == 0 and given["num_calibration_samples"] == 1
    expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True)["input_ids"]
    assert given["dataset"][0]["input_ids"] == expected


def test_rounding_needs_no_data(coterie, tmp_path, given):
    ran = coterie("convert", "gpu", *NEEDED, "--output-dir", tmp_path / "out", "--quant-method", "RTN")
    assert ran.code == 0
    assert type(given["recipe"]) is llm_compressor.QuantizationModifier
    assert given["recipe"].given == {"targets": "Linear", "scheme": "W4A16", "ignore": list(IGNORED)}
    assert given.keys() == {"model", "tokenizer", "recipe"}


def test_only_routed_experts_are_quantised_by_default():
    def ignored(name):
        return any(re.match(pattern.removeprefix("re:"), name) for pattern in IGNORED)

    layer = "model.layers.3"
    for leaf in ("mlp.experts.7.gate_proj", "mlp.experts.0.down_proj", "block_sparse_moe.experts.1.w1"):
        assert not ignored(f"{layer}.{leaf}")
    for leaf in ("self_attn.q_proj", "mlp.gate", "mlp.shared_expert.up_proj", "mlp.shared_experts.down_proj",
                 "mlp.shared_expert_gate", "mlp.up_proj", "mlp.router", "block_sparse_moe.gate"):  # fmt: skip
        assert ignored(f"{layer}.{leaf}")
    assert ignored("lm_head")


def test_memory(coterie, tmp_path, given, monkeypatch):
    loaded = {}

    class Model:
        @staticmethod
        def from_pretrained(name, **options):
            loaded.update(options, name=name)
            raise OSError("stops here\nfor a reason")

    monkeypatch.setattr("coterie.convert.gpu.AutoModelForCausalLM", Model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    command = ("convert", "gpu", "--model_id", tiny.PATH, "--output_dir", tmp_path / "out", "--quant_method", "RTN")
    ran = coterie(*command, "--max_gpu_memory", "40GB", "--max_cpu_memory", "1GiB", "--trust_remote_code")
    assert ran.code == 2 and f"cannot open {tiny.PATH}: stops here" in ran.err and "reason" not in ran.err
    limits = {0: 40 * 10**9, 1: 40 * 10**9, "cpu": 2**30}
    expected = {"dtype": "auto", "trust_remote_code": True, "device_map": "auto", "max_memory": limits}
    assert loaded == expected | {"name": str(tiny.PATH)}
    loaded.clear()
    coterie(*command)
    assert "max_memory" not in loaded and loaded["trust_remote_code"] is False
    assert not list(tmp_path.iterdir())


def test_without_llm_compressor(coterie, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    ran = coterie("convert", "gpu", *NEEDED, "--output_dir", tmp_path / "out")
    assert ran.code == 2 and "needs llm-compressor" in ran.err and "pip install llmcompressor" in ran.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_method": "AWQ"}, "--quant_method is 'AWQ': expected one of GPTQ, RTN"),
        ({"quant_type": "W4A4"}, "--quant_type is 'W4A4': expected one of W4A16, W8A16"),
        ({"num_calibration_samples": 0}, "--num_calibration_samples is 0: expected at least 1"),
        ({"max_sequence_length": -1}, "--max_sequence_length is -1"),
        ({"dampening_frac": 1.5}, "--dampening_frac is 1.5: expected a fraction"),
        ({"force_cpu": True, "max_gpu_memory": "1GB"}, "contradict each other"),
        ({"max_cpu_memory": "lots"}, "expected a size like 64GB"),
    ],
    ids=str,
)
def test_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        GpuConversion(model_id="x", output_dir=Path("out"), **options)


def test_mistakes(coterie, tmp_path, given, texts, monkeypatch):
    tensors, config, _ = quantised("fp8 by blocks")
    fp8 = write_checkpoint(tmp_path / "fp8", tensors, config)
    convert_cpu(tiny.PATH, tmp_path / "packed")
    (tmp_path / "columns.jsonl").write_text('{"question": "x"}\n')
    out = tmp_path / "out"
    for options, message in (
        (("--model_id", fp8, "--force_cpu"), "is quantised already: `coterie convert dequantize` it first"),
        (("--model_id", tmp_path / "packed", "--force_cpu"), "is packed by coterie: quantise the checkpoint that"),
        (("--model_id", tmp_path / "nowhere", "--force_cpu", "--quant_method", "RTN"), "cannot open"),
        ((*NEEDED, "--dataset", tmp_path / "columns.jsonl"), "has the columns question: expected messages or text"),
        ((*NEEDED, "--dataset", tmp_path / "nowhere.jsonl"), "nowhere.jsonl is not there"),
        ((*NEEDED, "--dataset", tmp_path), "cannot read"),
    ):
        ran = coterie("convert", "gpu", "--output_dir", out, *options)
        assert ran.code == 2 and message in ran.err and ran.err.splitlines()[-1].startswith("coterie: ")
        assert not out.exists() and not given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ran = coterie("convert", "gpu", "--output_dir", out, "--model_id", tiny.PATH)
    assert ran.code == 2 and "there is no GPU here: give --force_cpu" in ran.err
    ran = coterie("convert", "gpu", "--output_dir", texts.parent, *NEEDED, "--quant_method", "RTN")
    assert ran.code == 2 and "is not empty" in ran.err
