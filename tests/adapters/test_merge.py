"""What a merged checkpoint is beside its experts: tied layers, heads, draft layers, towers, tokenizer, revision."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import tiny_models
import torch
from made_checkpoints import write_checkpoint
from peft import PeftModel
from quantised_checkpoints import quantised
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import coterie
from coterie import tiny
from coterie.adapters import folder as adapter_folder
from coterie.adapters.base import open_plain
from coterie.adapters.export import export_adapter
from coterie.adapters.merge import merge_adapter
from coterie.convert import convert_cpu
from coterie.convert.merge import merge as put_together
from coterie.errors import ArgumentError, CheckpointError

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
BF16 = 0.012


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_models.prompt()).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def assert_merged(model, tmp_path: Path, auto=AutoModelForCausalLM, base: str | None = None) -> None:
    """The merged checkpoint computes what the adapted model does."""
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base)
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    assert relative(logits(merged), logits(model)) < BF16
    with model.disable_adapter():
        assert relative(logits(merged), logits(model)) > 5 * BF16


@pytest.fixture
def tied(tmp_path):
    """One layer, whose output layer is its embedding."""
    tiny_models.make("qwen3_moe", tie_word_embeddings=True, num_hidden_layers=1).save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("changes", "still_tied"),
    [
        ({"modules_to_save": ["embed_tokens"]}, False),
        ({"modules_to_save": ["lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, False),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"trainable_token_indices": [5, 7]}, True),
    ],
    ids=str,
)
def test_tied_embedding_that_was_trained(changes, still_tied, packed, tied, adapt, tmp_path):
    base = None
    if packed:
        coterie.from_pretrained(tmp_path / "base", experts="bf16").save_pretrained(tmp_path / "packed")
        base = str(tmp_path / "packed")
    assert_merged(adapt(tied, **{"target_modules": ["q_proj"], **changes}), tmp_path, base=base)
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is still_tied
    assert ("lm_head.weight" in tensors(tmp_path / "merged")) is not still_tied


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True},
        {"use_rslora": True, "target_parameters": EXPERTS},
        {"rank_pattern": {"experts.down_proj": 3, "q_proj": 2}, "target_parameters": EXPERTS},
        {"target_parameters": [*EXPERTS, "mlp.gate.weight"]},
        {"target_modules": "all-linear"},
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_kinds_of_lora(changes, adapt, tmp_path):
    tiny_models.make("qwen2_moe", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapt(model, **{"target_modules": ["q_proj"], **changes})
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().to(torch.bfloat16).float()
    assert relative(logits(merged), logits(model)) < 0.004
    assert relative(logits(tiny_models.make("qwen2_moe", num_hidden_layers=1)), logits(model)) > 0.05


@pytest.mark.parametrize(
    ("auto", "task"), [(AutoModelForSequenceClassification, "SEQ_CLS"), (AutoModelForTokenClassification, "TOKEN_CLS")]
)
def test_classifiers(auto, task, adapt, tmp_path):
    tiny_models.make("qwen3_moe", num_hidden_layers=1).save_pretrained(tmp_path / "base")
    model = auto.from_pretrained(tmp_path / "base", num_labels=3, dtype=torch.float32)
    assert_merged(adapt(model, target_parameters=EXPERTS, task_type=task), tmp_path, auto)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_a_packed_base_gives_the_checkpoint_that_a_plain_one_does(family, adapt, tmp_path):
    """The same tensors, bit for bit, under the same names: experts packed as bf16 lose nothing."""
    tiny_models.make(family).save_pretrained(tmp_path / "base")
    convert_cpu(tmp_path / "base", tmp_path / "packed", "bf16")
    adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_parameters=["experts.down_proj"])
    for base in ("base", "packed"):
        merge_adapter(tmp_path / "adapter", tmp_path / f"from {base}", str(tmp_path / base))
    expected, found = tensors(tmp_path / "from base"), tensors(tmp_path / "from packed")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    config = json.loads((tmp_path / "from packed" / "config.json").read_text())
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())


def test_a_packed_base_of_several_formats(adapt, tmp_path):
    tiny_models.make("qwen3_moe").save_pretrained(tmp_path / "base")
    for layer, format in enumerate(("int4", "bf16")):
        convert_cpu(tmp_path / "base", tmp_path / format, format, layers=[layer])
    put_together([tmp_path / "int4", tmp_path / "bf16"], tmp_path / "packed", tmp_path / "base")
    model = coterie.from_pretrained(tmp_path / "packed", dtype=torch.float32, activations="bf16")
    assert model.config.quantization_config.experts == "mixed"
    assert_merged(adapt(model, target_parameters=EXPERTS), tmp_path, base=str(tmp_path / "packed"))


def test_draft_layers_are_kept(adapt, tmp_path):
    """Tensors of multi-token prediction, which no model of Transformers has, from a plain and a packed base."""
    model = tiny_models.make("glm4_moe", num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path / "base")
    own = load_file(tmp_path / "base" / "model.safetensors")
    draft = {name.replace("layers.2.", "layers.3."): t.clone() for name, t in own.items() if ".layers.2." in name}
    save_file(own | draft, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    convert_cpu(tmp_path / "base", tmp_path / "packed", "bf16")
    adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), target_parameters=EXPERTS)
    merge_adapter(tmp_path / "adapter", tmp_path / "from_plain", str(tmp_path / "base"))
    merge_adapter(tmp_path / "adapter", tmp_path / "from_packed", str(tmp_path / "packed"))
    for name in ("from_plain", "from_packed"):
        found = tensors(tmp_path / name)
        assert found.keys() == own.keys() | draft.keys()
        assert all(torch.equal(found[key], draft[key]) for key in draft)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForCausalLM])
@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_multimodal_models(kind, auto, packed, adapt, tmp_path):
    """All tensors are kept, also where the model was adapted as a causal LM, which has no vision tower.

    Stacked experts of a packed base are written as on the Hub, which may be the other way round.
    """
    tiny_models.make_vision(kind).save_pretrained(tmp_path / "base")
    try:
        model = auto.from_pretrained(tmp_path / "base", dtype=torch.float32)
    except ValueError:
        pytest.skip(f"Transformers opens no {kind} as a causal LM")
    model = adapt(model, target_parameters=EXPERTS, target_modules=r".*layers\.1\.self_attn\.q_proj")
    base = tmp_path / "base"
    if packed:
        kinds = {"auto_class": AutoModelForImageTextToText}
        coterie.from_pretrained(base, experts="bf16", **kinds).save_pretrained(tmp_path / "packed")
        base = tmp_path / "packed"
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", str(base))
    before, merged = tensors(tmp_path / "base"), tensors(tmp_path / "merged")
    assert {key: t.numel() for key, t in merged.items()} == {key: t.numel() for key, t in before.items()}
    changed = {key for key in before if not torch.equal(before[key], merged[key])}
    assert changed and all(".experts." in key or "language_model.layers.1.self_attn.q_proj" in key for key in changed)
    again = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert relative(logits(again), logits(model)) < BF16
    export_adapter(tmp_path / "adapter", tmp_path / "exported")
    exported = tensors(tmp_path / "exported")
    if kind == "qwen3_vl_moe":  # which stores them stacked
        assert exported.keys() == tensors(tmp_path / "adapter").keys()
    else:
        names = {re.sub(r"base_model\.model\.(.*)\.lora_[AB]\.weight", r"\1.weight", key) for key in exported}
        AutoModelForImageTextToText.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "Hub")
        assert names <= tensors(tmp_path / "Hub").keys() and len(names) == 2 * 8 * 3 + 1


@pytest.fixture
def trained(tmp_path, adapt) -> Path:
    """An adapter of the bundled model whose folder has a tokenizer with another template."""
    adapt(AutoModelForCausalLM.from_pretrained(tiny.PATH), target_modules=["q_proj"])
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    tokenizer.chat_template = "mine: {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_the_template_trained_with_is_the_merged_models(trained, tmp_path):
    merge_adapter(trained, tmp_path / "merged", experts="int4")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "mine: hi"
    assert not (tmp_path / "merged" / "adapter_config.json").exists()


def test_without_a_tokenizer_the_bases_is_kept(adapt, tmp_path):
    adapt(AutoModelForCausalLM.from_pretrained(tiny.PATH), target_modules=["q_proj"])
    merge_adapter(tmp_path / "adapter", tmp_path / "merged")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (tiny.PATH / name).read_bytes()


def test_the_revision_that_was_trained_on(trained, tmp_path, monkeypatch):
    """From the adapter's own configuration; another base has none."""
    config = json.loads((trained / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "someone/tiny", "revision": "v1"}
    (trained / "adapter_config.json").write_text(json.dumps(config))
    asked = []

    def download(name: str, revision: str | None) -> str:
        asked.append((name, revision))
        return str(tiny.PATH)

    monkeypatch.setattr(adapter_folder, "snapshot_download", download)
    merge_adapter(trained, tmp_path / "merged")
    merge_adapter(trained, tmp_path / "again", "someone/tiny")
    merge_adapter(trained, tmp_path / "other", "someone/else")
    assert asked == [("someone/tiny", "v1"), ("someone/tiny", "v1"), ("someone/else", None)]


def test_exports_read_the_config_of_the_revision(adapt, tmp_path, monkeypatch):
    adapt(AutoModelForCausalLM.from_pretrained(tiny.PATH), target_parameters=EXPERTS, revision="v1")
    asked = []

    def read(name: str, revision: str | None, **changes):
        asked.append((name, revision))
        return stock(name, **changes)

    stock = AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", read)
    export_adapter(tmp_path / "adapter", tmp_path / "exported")
    assert asked == [(str(tiny.PATH), "v1")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"layer_replication": [[0, 2], [1, 3]]}, "repeats layers"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "SEQ_2_SEQ_LM"),
    ],
)
def test_adapters_that_cannot_be_merged(changes, message, trained, tmp_path):
    config = json.loads((trained / "adapter_config.json").read_text())
    (trained / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ArgumentError, match=message):
        merge_adapter(trained, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_quantised_base_is_refused_whoever_says_so(tmp_path):
    """ModelOpt's file may be the only one that says it; nothing is merged into codes."""
    tensors, _, _ = quantised("ModelOpt nvfp4", layers=1)
    base = write_checkpoint(tmp_path, tensors)
    (base / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    name = "model.layers.0.mlp.experts"
    with pytest.raises(CheckpointError, match=r"is quantised \(nvfp4\): merge into the original model"):
        open_plain(base, {name: None}, {name})
