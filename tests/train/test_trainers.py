"""Losses that can be compared: the router's told apart, evaluation by tokens and pairs whatever the batch."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoTokenizer

import coterie
from coterie import tiny
from coterie.train import run
from coterie.train.example import DATA

PREFERENCES = [{"path": str(DATA / "preferences.jsonl")}]


@pytest.fixture
def evaluated(configure, train, tmp_path):
    """evaluated(...) -> the last evaluation of a run whose steps are too small to change anything."""

    def evaluated(**changes) -> dict[str, float]:
        name = str(len(list(tmp_path.iterdir())))
        options = {"experts": "bf16", "bf16": False, "max_steps": 1, "learning_rate": 1e-30, "micro_batch_size": 1}
        train(configure(**{**options, "output_dir": str(tmp_path / name), **changes}))
        rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return next(row for row in rows if "eval_loss" in row)

    return evaluated


def test_evaluation_is_by_tokens(evaluated, tmp_path):
    """Ragged rows, batches of one, of three with one left over, and flattened: the mean over all assistant tokens."""
    lines = (DATA / "heldout.jsonl").read_text().splitlines()[:4]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    model = coterie.from_pretrained(tiny.PATH, "bf16", dtype=torch.float32)
    total, count, hits = 0.0, 0, 0
    for line in lines:
        chat = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learned = torch.tensor(chat["input_ids"])[:64], torch.tensor(chat["assistant_masks"])[1:64].bool()
        with torch.no_grad():
            scores = model(ids[None]).logits[0, :-1][learned]
        total += torch.nn.functional.cross_entropy(scores, ids[1:][learned], reduction="sum").item()
        hits += int((scores.argmax(-1) == ids[1:][learned]).sum())
        count += int(learned.sum())
    for options in ({"eval_batch_size": 1}, {"eval_batch_size": 3}, {"eval_batch_size": 3, "sample_packing": True}):
        found = evaluated(test_datasets=[{"path": str(tmp_path / "rows.jsonl")}], **options)
        assert found["eval_loss"] == pytest.approx(total / count, rel=1e-4)
        assert found["eval_mean_token_accuracy"] == pytest.approx(hits / count)


@pytest.mark.parametrize(
    "options",
    [
        {"rl": "dpo", "datasets": PREFERENCES, "unfrozen_parameters": ["mlp.gate"], "learning_rate": 1e-3},
        {"reward_model": True, "datasets": PREFERENCES},
        {"process_reward_model": True, "datasets": [{"path": str(DATA / "steps.jsonl")}]},
    ],
    ids=["dpo", "reward", "process reward"],
)
def test_evaluation_of_other_trainings(options, evaluated):
    losses = [evaluated(**options, val_set_size=5, eval_batch_size=size)["eval_loss"] for size in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_dpo_begins_at_ln_2(configure, train):
    """Without an adapter too: the reference is the packed model as it was. The router's loss is told apart."""
    config = configure(
        rl="dpo",
        datasets=PREFERENCES,
        adapter=None,
        experts="bf16",
        unfrozen_parameters=["mlp.gate.weight"],
        max_steps=1,
        logging_steps=5,
    )
    (row,) = train(config)
    assert row["dpo_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert row["loss"] > row["dpo_loss"] + 1e-4


def test_the_reference_shares_what_is_frozen(configure):
    from coterie.train.model import load_model, load_tokenizer, reference_model

    config = configure(adapter=None, unfrozen_parameters=[r"layers\.1\.mlp\.gate"])
    model = load_model(config, str(tiny.PATH), load_tokenizer(config, str(tiny.PATH), tiny.PATH))
    reference = reference_model(model)
    own = {name for name, p in reference.named_parameters() if p is not model.get_parameter(name)}
    assert own == {"model.layers.1.mlp.gate.weight"}
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        before = model(ids).logits
        model.get_parameter(*own).add_(1.0)
        assert torch.equal(reference(ids).logits, before)
        assert not torch.equal(model(ids).logits, before)
    assert not any(p.requires_grad for p in reference.parameters()) and not reference.training


@pytest.mark.parametrize("name", ["embed_tokens", "mlp.gate.weight"])
def test_what_is_saved_opens_as_the_base_did(name, configure, train, monkeypatch, tmp_path):
    kept = {}
    stock = run.make_trainer
    monkeypatch.setattr(run, "make_trainer", lambda *a, **k: kept.setdefault("trainer", stock(*a, **k)))
    train(configure(adapter=None, unfrozen_parameters=[name], max_steps=1, save_steps=1))
    ids = torch.arange(20, 60)[None]
    for folder in (tmp_path / "output", tmp_path / "output" / "checkpoint-1"):
        saved = json.loads((folder / "config.json").read_text())
        assert (saved["dtype"], saved["use_cache"]) == ("bfloat16", True)
        model = coterie.from_pretrained(folder, activations="bf16")  # as they were trained
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        with torch.no_grad():
            assert torch.equal(model(ids).logits, kept["trainer"].model.eval().requires_grad_(False)(ids).logits)
