"""The whole quickstart, as `make demo` runs it, with less training."""

from __future__ import annotations

import re

import pytest
import torch

from coterie import cpu
from coterie.train import demo

NUMBER = r" +([\d.]+) │"


@pytest.fixture(scope="module")
def short_training():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", 16)
        patch.setattr(demo, "LOGS", 4)
        patch.setattr(demo, "SECONDS", 1e9)
        yield


def test_quickstart_compares_the_formats_writes_text_and_fine_tunes(coterie, short_training):
    threads = torch.get_num_threads(), cpu.threads()
    ran = coterie("quickstart")
    assert ran.code == 0, ran.err
    rows = {m[1]: float(m[2]) for m in re.finditer(r"│ (\w+ \w+) +│[^│]+│[^│]+│ +([\d.]+) │", ran.out)}
    assert set(rows) == {"transformers bf16", "coterie bf16", "coterie int8", "coterie int4"}
    for name, perplexity in rows.items():
        assert abs(perplexity / rows["transformers bf16"] - 1) < 0.03, name
    written, _, tuned = ran.out.split("When an exception is raised,")[1].partition("Fine-tuning on int4 experts")
    assert len(written.split()) > 10

    steps = [(int(m[1]), float(m[2])) for m in re.finditer(r"^ +(\d+)  ([\d.]+) █+$", tuned, re.MULTILINE)]
    assert [step for step, _ in steps] == [4, 8, 12, 16]
    assert steps[-1][1] < 0.9 * steps[0][1]
    for kind, least in (("what it was taught, asked in other words", 0.85), ("what it was not taught", 0.99)):
        before, after, reloaded = map(float, re.search(f"│ {kind} +│{NUMBER}{NUMBER}{NUMBER}", tuned).groups())
        assert after < least * before, kind
        assert reloaded == after, kind
    answers = re.findall(r"^(before|after): +(\S.*)$", tuned, re.MULTILINE)
    assert [when for when, _ in answers] == ["before", "after"] * len(demo.QUESTIONS)
    assert all(old != new for (_, old), (_, new) in zip(answers[::2], answers[1::2], strict=True))
    assert (torch.get_num_threads(), cpu.threads()) == threads


def test_what_it_is_asked_is_held_out():
    """No question that is asked after the training, nor an answer that it was not taught, is in the training set."""
    taught, reworded, untaught = (demo.chats(name) for name in ("train", "reworded", "heldout"))
    asked = {question["content"] for question, _ in taught}
    answers = {answer["content"] for _, answer in taught}
    assert not asked & ({question["content"] for question, _ in reworded} | set(demo.QUESTIONS))
    assert {answer["content"] for _, answer in reworded} == answers
    assert not answers & {answer["content"] for _, answer in untaught}
