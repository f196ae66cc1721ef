"""The model card beside what was fine-tuned."""

from __future__ import annotations

from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from coterie import tiny
from coterie.adapters.card import write_card


def test_card_names_base_and_data(tmp_path):
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    write_card(tmp_path, "Qwen/Qwen3-30B-A3B", ["HuggingFaceH4/ultrachat_200k", "mine/train.jsonl", "/data/more.jsonl"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-30B-A3B" and card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-generation"
    for name in ("Qwen/Qwen3-30B-A3B", "HuggingFaceH4/ultrachat_200k", "mine/train.jsonl", "/data/more.jsonl"):
        assert name in card.text


def test_metadata_names_nothing_of_this_machine(tmp_path, monkeypatch):
    """The Hub refuses a card whose base model or data set is no id; PEFT's names the folder, which is replaced."""
    model = AutoModelForCausalLM.from_pretrained(tiny.PATH)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    assert str(tiny.PATH) in (tmp_path / "README.md").read_text().split("---")[1]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "data").touch()
    write_card(tmp_path, str(tiny.PATH), ["mine/data", "/data/more.jsonl"])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and card.data.datasets is None
    assert all(name in card.text for name in (str(tiny.PATH), "`mine/data`", "`/data/more.jsonl`"))


def test_card_of_a_whole_model(tmp_path):
    write_card(tmp_path, "Qwen/Qwen3-30B-A3B", [])
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and "PeftModel" not in card.text
