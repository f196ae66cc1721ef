"""Make the small instruction, preference and step sets that ship with coterie, from Python's own documentation.

    python scripts/make_instructions.py [--output src/coterie/data/instructions]

The text is `pydoc_data.topics`, split as `make_tiny_model.py` splits it: what is held out here, the bundled model never
saw. Deterministic for one version of Python.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from make_tiny_model import split

DATA = Path(__file__).parent.parent / "src" / "coterie" / "data"
TRAINING_ROWS = 240
HELDOUT_ROWS = 40
SHORTEST, LONGEST = 90, 420


def paragraphs(topic: str) -> list[str]:
    """The prose of a topic: paragraphs that are neither indented, nor grammar, nor lists."""
    found = []
    for block in topic.split("\n\n"):
        plain = not block.startswith((" ", "*", "-", "+", "|", "[")) and "::=" not in block and "  " not in block
        text = " ".join(block.split())
        if plain and SHORTEST <= len(text) <= LONGEST and text.endswith("."):
            found.append(text)
    return found


def chat(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def instructions(topics: list[str]) -> list[dict]:
    """What a topic says first, and how its paragraphs go on after their first sentence."""
    rows = []
    for topic in topics:
        title, text = topic.split("\n", 1)[0].strip(), paragraphs(topic)
        if not text:
            continue
        rows.append(chat(f"Explain: {title}", text[0]))
        for paragraph in text[1:]:
            first, _, rest = paragraph.partition(". ")
            if len(rest) >= SHORTEST // 2:
                rows.append(chat(f"Go on: {first}.", rest))
    return rows


def preferences(topics: list[str], chance: random.Random) -> list[dict]:
    """How a topic begins is better than the same words in another order."""
    rows = []
    for topic in topics:
        title, text = topic.split("\n", 1)[0].strip(), paragraphs(topic)
        if not text:
            continue
        words = text[0].split()
        chance.shuffle(words)
        prompt = [{"role": "user", "content": f"Explain: {title}"}]
        chosen, rejected = ([{"role": "assistant", "content": t}] for t in (text[0], " ".join(words)))
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return rows


def steps(topics: list[str], chance: random.Random) -> list[dict]:
    """Sentences of one paragraph in order are right steps; a sentence from elsewhere is a wrong one."""
    all_sentences = [re.split(r"(?<=\.) ", p) for topic in topics for p in paragraphs(topic)]
    strangers = [s for sentences in all_sentences for s in sentences]
    rows = []
    for sentences in all_sentences:
        if len(sentences) < 3:
            continue
        labels = [chance.random() < 0.5 for _ in sentences[1:]]
        given = [s if right else chance.choice(strangers) for s, right in zip(sentences[1:], labels, strict=True)]
        rows.append({"prompt": sentences[0], "completions": given, "labels": labels})
    return rows


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DATA / "instructions")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    training, heldout = split()
    chance = random.Random(0)
    rows = instructions(training)
    chance.shuffle(rows)
    write(args.output / "train.jsonl", rows[:TRAINING_ROWS])
    write(args.output / "heldout.jsonl", instructions(heldout)[:HELDOUT_ROWS])
    write(args.output / "preferences.jsonl", preferences(training, chance))
    write(args.output / "steps.jsonl", steps(training, chance)[:100])


if __name__ == "__main__":
    main()
