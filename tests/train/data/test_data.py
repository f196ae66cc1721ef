"""Data sets that people bring: read, told apart, and rows that teach nothing left out by number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from coterie import tiny
from coterie.errors import ArgumentError
from coterie.train.data.load import load_datasets
from coterie.train.data.tokens import IGNORED

TOKENIZER = AutoTokenizer.from_pretrained(tiny.PATH)
ASKED, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
LONG = {"role": "user", "content": "word " * 200}


@pytest.fixture
def load(configure, tmp_path):
    """load(rows, **changes) -> (training rows, what was found) of a JSONL file of those rows."""

    def load(rows: list, entry: dict | None = None, **changes):
        (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        config = configure(datasets=[{"path": "rows.jsonl", **(entry or {})}], **changes)
        train, _, found = load_datasets(config, tmp_path, TOKENIZER)
        return train, found[0]

    return load


def learnt(row: dict) -> str:
    return TOKENIZER.decode([label for label in row["labels"] if label != IGNORED])


CHAT = {"messages": [ASKED, ANSWER]}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}]


@pytest.mark.parametrize(
    ("row", "entry"),
    [
        (CHAT, {}),
        ({"conversations": SHAREGPT}, {}),
        ({"conversations": SHAREGPT}, {"type": "sharegpt"}),
        ({"talk": [ASKED, ANSWER], "id": 1}, {"field_messages": "talk"}),
        (
            {"messages": [{"who": "user", "says": "Hi"}, {"who": "gpt", "says": "Hello."}]},
            {"message_property_mappings": {"role": "who", "content": "says"}},
        ),
        ({"prompt": [ASKED], "completion": [ANSWER]}, {}),
        ({"instruction": "Hi", "input": "", "output": "Hello."}, {}),
        ({"instruction": "Hi", "context": None, "response": "Hello."}, {"type": "alpaca"}),
        ({"question": "Hi", "answer": "Hello."}, {}),
        ({"prompt": "Hi", "response": "Hello."}, {}),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_chats_in_all_their_forms(row, entry, load):
    expected = TOKENIZER.apply_chat_template(CHAT["messages"], return_dict=True)["input_ids"]
    rows, _ = load([row, row], entry)
    assert rows[1]["input_ids"] == expected and learnt(rows[1]) == "Hello.<|im_end|>"


def test_text(load):
    end = TOKENIZER.eos_token
    rows, _ = load([{"prompt": "One and ", "completion": "two."}])
    assert TOKENIZER.decode(rows[0]["input_ids"]) == f"One and two.{end}" and learnt(rows[0]).strip() == f"two.{end}"
    rows, _ = load([{"text": "One and two."}])
    assert learnt(rows[0]) == f"One and two.{end}"
    rows, _ = load([CHAT], train_on_inputs=True)
    assert rows[0]["labels"] == rows[0]["input_ids"]
    rows, _ = load([{"instruction": "Add.", "input": "1", "system": "Be brief.", "output": "2"}])
    assert "Be brief." in TOKENIZER.decode(rows[0]["input_ids"]) and "Add.\n\n1" in TOKENIZER.decode(
        rows[0]["input_ids"]
    )


PAIR = {"prompt": [ASKED], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "No."}]}
STEPS = {"prompt": "One?", "completions": ["a", "b"], "labels": [True, False]}


@pytest.mark.parametrize(
    ("good", "bad", "reason", "changes"),
    [
        (CHAT, {"messages": [ASKED]}, "has no answer", {}),
        (CHAT, {"messages": []}, "is empty", {}),
        (CHAT, {"messages": [ASKED, {**ANSWER, "content": ""}]}, "has no answer", {}),
        (CHAT, {"messages": [LONG, ANSWER]}, "loses all there is to learn when cut", {}),
        ({"text": "One and two."}, {"text": " "}, "is empty", {}),
        ({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}, "has no answer", {}),
        (PAIR, {**PAIR, "rejected": PAIR["chosen"]}, "both sides are equal", {"rl": "dpo"}),
        (PAIR, {**PAIR, "rejected": []}, "has an empty side", {"rl": "dpo"}),
        (PAIR, {**PAIR, "prompt": [LONG]}, "loses all there is to learn when cut", {"rl": "dpo"}),
        (PAIR, {**PAIR, "prompt": [LONG]}, "is longer than sequence_len", {"reward_model": True}),
        (STEPS, {**STEPS, "labels": []}, "has no label for each", {"process_reward_model": True}),
        (STEPS, {**STEPS, "labels": [True]}, "has no label for each", {"process_reward_model": True}),
        (STEPS, {**STEPS, "prompt": LONG["content"]}, "loses all", {"process_reward_model": True}),
    ],
)
def test_rows_with_nothing_to_learn_are_left_out(good, bad, reason, changes, load):
    """With a count and their numbers, from 1; where none is left, that is an error."""
    rows, found = load([good, bad, good, bad], **changes)
    assert len(rows) == 2
    (line,) = found.gaps()
    assert (
        line.startswith("rows.jsonl: 2 of 4 rows left out: each ") and reason in line and line.endswith("(rows 2, 4)")
    )
    with pytest.raises(ArgumentError, match=rf"^datasets: nothing is left to learn: rows.jsonl: 2 of 2 .*{reason}"):
        load([bad, bad], **changes)


def test_rows_that_are_cut_are_counted(load):
    chat = {"messages": [ASKED, {**ANSWER, "content": "word " * 100}]}
    whole = len(TOKENIZER.apply_chat_template(chat["messages"], return_dict=True)["input_ids"])
    rows, found = load([CHAT, chat], sequence_len=64)
    assert len(rows[1]["input_ids"]) == len(rows[1]["labels"]) == 64
    assert (found.cut, found.lost) == ([2], whole - 64)
    assert f"1 of 2 rows are cut to sequence_len 64, {whole - 64} tokens are lost (row 2)" in found.lines(64)[1]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(CHAT), '{"messages": ['], "rows.jsonl: row 2 is not JSON: Expecting value"),
        ([json.dumps(CHAT), json.dumps({"txt": "a"})], "rows.jsonl: row 2: expected messages, found txt"),
        ([json.dumps(CHAT), "[1]"], r"rows.jsonl: row 2: expected an object \{...\}, found list"),
        (
            [json.dumps(CHAT), json.dumps({"messages": "a"})],
            "rows.jsonl: row 2: expected a list of messages, each with role and content",
        ),
        (
            [json.dumps(CHAT), json.dumps({"messages": [{"role": "user"}]})],
            "rows.jsonl: row 2: expected a message with role and content",
        ),
    ],
)
def test_broken_lines_are_named_once(lines, message, configure, tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(ArgumentError, match=f"^{message}") as error:
        load_datasets(configure(datasets=[{"path": "rows.jsonl"}]), tmp_path, TOKENIZER)
    assert str(error.value).count("row 2") == 1 and "\n" not in str(error.value)


def test_a_chat_that_the_template_refuses(load, configure, tmp_path):
    refusing = "{% for m in messages %}{% if m.role == 'x' %}{{ raise_exception('who is x?') }}{% endif %}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{**ASKED, "role": "x"}, ANSWER]}) + "\n")
    config = configure(datasets=[{"path": "rows.jsonl"}])
    tokenizer.chat_template = refusing
    with pytest.raises(ArgumentError, match=r"^rows.jsonl: row 1: the chat template refuses it: who is x\?"):
        load_datasets(config, tmp_path, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ArgumentError, match=r"has no chat template: set chat_template: chatml"):
        load_datasets(config, tmp_path, tokenizer)


def test_sets_of_several_kinds(configure, tmp_path):
    (tmp_path / "plain.txt").write_text("One.\n\nTwo.")
    (tmp_path / "alpaca.json").write_text(json.dumps([{"instruction": "Add.", "output": "2"}]))
    (tmp_path / "empty.jsonl").write_text("")
    config = configure(datasets=[{"path": "plain.txt"}, {"path": "alpaca.json"}])
    train, test, found = load_datasets(config, tmp_path, TOKENIZER)
    assert len(train) == 3 and test is None and [each.rows for each in found] == [2, 1]
    with pytest.raises(ArgumentError, match=r"empty.jsonl"):
        load_datasets(configure(datasets=[{"path": "empty.jsonl"}]), Path(tmp_path), TOKENIZER)
