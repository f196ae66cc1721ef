"""Make the small instruction, preference and step sets that ship with coterie, from Python's own documentation.

    python scripts/make_instructions.py [--output src/coterie/data/instructions]

The text is `pydoc_data.topics`, split as `make_tiny_model.py` splits it: what is held out here, the bundled model never
saw. The chats ask about a subject ("What is the "range" type?") and answer with the sentence that begins with it. Each
subject is asked about in all wordings but one in training, and in that one in `reworded.jsonl`: whoever answers those
has learned what was asked, not how. Deterministic for one version of Python.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from make_tiny_model import split

DATA = Path(__file__).parent.parent / "src" / "coterie" / "data"
SHORTEST, LONGEST = 90, 420  # characters of a paragraph
WORDINGS = ("What is {}?", "Explain {}.", "Tell me about {}.")
ANSWER = 30, 160  # characters
VERBS = (
    "is was can may must will should has does cannot allows returns yields specifies raises provides takes defines "
    "creates causes makes means evaluates contains represents describes matches supports uses gives executes occurs "
    "denotes produces works needs accepts computes binds introduces performs implements behaves adds calls includes "
    "requires refers begins sets determines controls"
).replace(" ", "|")
OTHER_WORDS = (
    "are|have|do|which|that|whose|then|first|itself|always|usually|never|builds|defaults"  # no subject has these
)
# No subject begins with these: what it is about stands in another sentence.
VAGUE = (
    "following above below same only next previous other latter former new resulting remaining final optional numeric "
    "similar equivalent returned assigned original exact different general counter-intuitive absence length number"
).replace(" ", "|")
WORD = r"""(?:"[^"]{1,30}"|\*[^*]{1,30}\*|[A-Za-z][\w’'-]*)"""
SUBJECT = re.compile(
    rf"((?:The|A|An) (?!(?:{VAGUE})\b){WORD}(?: (?!(?:{VERBS}|{OTHER_WORDS})\b){WORD}){{0,5}}) (?:{VERBS})\b"
)


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


def definitions(topics: list[str]) -> dict[str, str]:
    """Sentences by their subject: {'The "range" type': 'The "range" type represents ...'}, the first of each."""
    found: dict[str, str] = {}
    for block in (block for topic in topics for block in topic.split("\n\n")):
        if "::=" in block or ">>>" in block or re.search(r"[^\s.]  ", block):  # grammar, code and tables
            continue
        text = re.sub(r"^[*+-] | \(see [^)]*\)", "", " ".join(block.split()))
        for sentence in re.split(r"(?<=\.) (?=[A-Z\"*])", text):
            subject = SUBJECT.match(sentence)
            if subject and clear(subject[1]) and whole(sentence):
                found.setdefault(subject[1], sentence)
    return found


def clear(subject: str) -> bool:
    """Whether one can ask about it alone: not of "the name", but of "a name", 'the "del" statement' or '"len()"'."""
    article, first, *more = subject.split()
    head = re.split(r" (?:of|to|for|in) ", subject)[0]
    plural = re.search(r"[^s]s$| and ", head)
    return not plural and (article != "The" or bool(more) or first[0] in '"*')


def whole(sentence: str) -> bool:
    """Whether nothing is missing: no quote left open, no reference to what stands elsewhere."""
    balanced = sentence.count('"') % 2 == 0 and sentence.count("(") == sentence.count(")")
    elsewhere = re.search(
        r"\b(this|these|such|below|above|following|follows|section|is executed\.|is invoked)", sentence
    )
    return balanced and not elsewhere and sentence.endswith(".") and ANSWER[0] <= len(sentence) <= ANSWER[1]


def ask(subject: str, wording: str) -> str:
    return wording.format(subject[0].lower() + subject[1:])


def instructions(topics: list[str], chance: random.Random) -> tuple[list[dict], list[dict]]:
    """(chats to train on, the same questions in the wording that each was not asked in)."""
    training, reworded = [], []
    for subject, answer in definitions(topics).items():
        left_out = chance.choice(WORDINGS)
        for wording in WORDINGS:
            (reworded if wording == left_out else training).append(chat(ask(subject, wording), answer))
    chance.shuffle(training)
    return training, reworded


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
    chats, reworded = instructions(training, random.Random(0))
    known = {row["messages"][1]["content"] for row in chats}
    unknown = [chat(ask(subject, WORDINGS[0]), answer) for subject, answer in definitions(heldout).items()]
    write(args.output / "train.jsonl", chats)
    write(args.output / "reworded.jsonl", reworded)
    write(args.output / "heldout.jsonl", [row for row in unknown if row["messages"][1]["content"] not in known])
    write(args.output / "preferences.jsonl", preferences(training, random.Random(0)))
    write(args.output / "steps.jsonl", steps(training, random.Random(0))[:100])


if __name__ == "__main__":
    main()
