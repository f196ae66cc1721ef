"""The assistant's tokens found by rendering prefixes: the masks that {% generation %} gives where a template has it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import trl
from transformers import AutoTokenizer

from coterie import tiny
from coterie.errors import ArgumentError
from coterie.train.data.template import CHATML, ChatTemplate, set_template
from coterie.train.example import DATA

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKERS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
STOPS = re.compile(r"<\|?[a-z_0-9A-Z]+\|?>")
CHAT = [
    {"role": "user", "content": "Hi there?"},
    {"role": "assistant", "content": "Hello, friend."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "More of it."},
]


def tokenizer_with(template: str, names: str = ""):
    """The bundled tokenizer with a template, and as special tokens what looks like one in `names`."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    tokenizer.add_tokens(sorted(set(STOPS.findall(names))), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def learnt(tokenizer, messages: list[dict]) -> list[list[str]]:
    """What is learnt of a chat, as text: for each sample its runs of learnt tokens."""
    found = []
    for ids, mask in ChatTemplate(tokenizer).samples(messages):
        runs: list[list[int]] = []
        for i, (token, is_learnt) in enumerate(zip(ids, mask, strict=True)):
            if is_learnt:
                if not (i and mask[i - 1]):
                    runs.append([])
                runs[-1].append(token)
        found.append([tokenizer.decode(run) for run in runs])
    return found


def test_markers_removed_give_the_same_masks():
    marked = AutoTokenizer.from_pretrained(tiny.PATH)
    bare = tokenizer_with(MARKERS.sub("", marked.chat_template))
    rows = [json.loads(line)["messages"] for line in (DATA / "train.jsonl").read_text().splitlines()]
    rows += [rows[i] + rows[i + 1] + rows[i + 2] for i in range(20)]
    rows += [[{"role": "system", "content": "Be brief."}, *rows[0]]]
    templates = ChatTemplate(marked), ChatTemplate(bare)
    assert templates[0].has_markers and not templates[1].has_markers
    for messages in rows:
        expected, found = (template.samples(messages) for template in templates)
        assert expected == found
        assert any(expected[0][1]) and not all(expected[0][1])


@pytest.mark.parametrize("name", ["cohere", "gemma", "gemma3", "glm4moe", "lfm2", "qwen2_5", "qwen3_instruct_2507"])
def test_templates_of_the_field(name):
    """TRL ships templates as published, and with markers added: the same answers, but for white space around them."""
    plain, marked = ((TEMPLATES / f"{name}{end}.jinja").read_text() for end in ("", "_training"))
    found, expected = (learnt(tokenizer_with(text, plain), CHAT) for text in (plain, marked))
    assert len(found) == 1 and len(found[0]) == 2
    assert [run.strip() for run in found[0]] == [run.strip() for run in expected[0]]


def test_answers_that_are_rewritten_are_samples_of_their_own():
    """Qwen3 drops the thinking of earlier answers, and writes an empty one before the last."""
    template = (TEMPLATES / "qwen3.jinja").read_text()
    found = learnt(tokenizer_with(template, template), CHAT)
    empty = "<think>\n\n</think>\n\n"
    assert found == [[f"{empty}Hello, friend.<|im_end|>"], [f"{empty}More of it.<|im_end|>"]]


def test_a_template_that_hides_where_answers_begin():
    template = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    with pytest.raises(ValueError, match=r"cannot be told apart: mark answers by"):
        ChatTemplate(tokenizer_with(template)).samples(CHAT)


def test_chatml_by_name():
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    before = ChatTemplate(tokenizer).samples(CHAT)
    tokenizer.chat_template = None
    set_template(tokenizer, "chatml", Path())
    assert tokenizer.chat_template == CHATML and ChatTemplate(tokenizer).samples(CHAT) == before


def test_chatml_ends_answers_in_a_token_that_the_model_knows():
    class Other:
        eos_token = "</s>"

        @staticmethod
        def get_vocab() -> dict[str, int]:
            return {"</s>": 2}

    set_template(Other, "chatml", Path())
    assert "</s>{% endgeneration %}" in Other.chat_template and "<|im_end|>" not in Other.chat_template


def test_no_such_template(tmp_path):
    with pytest.raises(ArgumentError, match="expected chatml, a Jinja template or a file of one, found no file"):
        set_template(AutoTokenizer.from_pretrained(tiny.PATH), "llama3", tmp_path)
