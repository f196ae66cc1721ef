"""What people bring: kinds of rows told from their columns, and rows brought into the form that training reads."""

from __future__ import annotations

from typing import Any

from trl import extract_prompt

from coterie.errors import ArgumentError
from coterie.train.config import DatasetConfig, TrainConfig
from coterie.train.data.template import ASSISTANT

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
CHATS = ("messages", "conversations", "conversation")  # columns of messages

# Columns of instructions: the question, what may be added to it, the answer.
INSTRUCTIONS = (
    ("instruction", "input", "output"),
    ("instruction", "context", "response"),
    ("question", "context", "answer"),
    ("question", "context", "response"),
    ("query", "context", "response"),
    ("query", "context", "answer"),
    ("prompt", "context", "response"),
    ("problem", "context", "solution"),
)
SYSTEM = ("system", "system_prompt")  # columns of what is said before the question

NEEDED = {
    "chat_template": "messages (or conversations)",
    "prompt_completion": "prompt, completion",
    "alpaca": "instruction, output (or question, answer)",
    "completion": "text",
    "preference": "chosen, rejected",
    "stepwise": "prompt, completions, labels",
}


def wanted_kinds(config: TrainConfig) -> tuple[str, ...]:
    """The kinds of rows that what is to be trained can read, in the order in which they are looked for."""
    if config.process_reward_model:
        return ("stepwise",)
    if config.rl or config.reward_model:
        return ("preference",)
    return ("chat_template", "prompt_completion", "alpaca", "completion")


def tell_kind(columns: list[str], entry: DatasetConfig, wanted: tuple[str, ...]) -> str:
    """What an entry's rows are: its type, or what its columns say. Raises ArgumentError."""
    found = ", ".join(columns)
    if entry.type is None:
        kind = next((kind for kind in wanted if columns_of(kind, columns, entry)), None)
        if kind is None:
            expected = " or ".join(f"{needed(kind, entry)} ({kind})" for kind in wanted)
            raise ArgumentError(f"{entry.path}: expected columns {expected}; found {found}")
        return kind
    if entry.type not in wanted:
        expected = " or ".join(wanted)
        raise ArgumentError(f"{entry.path}: type: expected {expected} for this training, found {entry.type!r}")
    if not columns_of(entry.type, columns, entry):
        expected = needed(entry.type, entry)
        raise ArgumentError(f"{entry.path}: type {entry.type} needs the columns {expected}; found {found}")
    return entry.type


def needed(kind: str, entry: DatasetConfig) -> str:
    """The columns of a kind, in words."""
    if kind == "chat_template" and entry.field_messages != CHATS[0]:
        return entry.field_messages
    return entry.field if kind == "completion" else NEEDED[kind]


def columns_of(kind: str, columns: list[str], entry: DatasetConfig) -> list[str]:
    """The columns without which there is no row of a kind; none where they are not there."""
    if kind == "chat_template":
        names = CHATS if entry.field_messages == CHATS[0] else (entry.field_messages,)
        return next(([name] for name in names if name in columns), [])
    if kind == "alpaca":
        pairs = ([asked, answer] for asked, _, answer in INSTRUCTIONS)
        return next((pair for pair in pairs if set(pair) <= set(columns)), [])
    names = [entry.field] if kind == "completion" else NEEDED[kind].split(", ")
    return names if set(names) <= set(columns) else []


def extra_columns(kind: str, columns: list[str], required: list[str]) -> list[str]:
    """The columns that are read beside those of `columns_of`, where they are there."""
    extra = {"chat_template": ["tools"], "prompt_completion": ["tools"], "preference": ["prompt"], "alpaca": [*SYSTEM]}
    names = extra.get(kind, [])
    if kind == "alpaca":
        names = [*names, *(more for asked, more, answer in INSTRUCTIONS if [asked, answer] == required)]
    return [name for name in columns if name in names]


def messages_of(value: Any, entry: DatasetConfig) -> list[dict[str, Any]]:
    """A chat with the keys role and content, as templates read it. Raises ValueError for what is none."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"expected a list of messages, each with role and content, found {short(value)}")
    return [message_of(message, entry) for message in value]


def message_of(message: dict[str, Any], entry: DatasetConfig) -> dict[str, Any]:
    given = {key: value for key, value in message.items() if value is not None}
    role = next((key for key in (entry.message_field_role, "role", "from") if key in given), None)
    content = next((key for key in (entry.message_field_content, "content", "value") if key in given), None)
    if role is None or (content is None and "tool_calls" not in given):
        raise ValueError(f"expected a message with role and content (or from and value), found {short(message)}")
    name, said = str(given.pop(role)), given.pop(content) if content else ""
    return {"role": ROLES.get(name, name), "content": said, **given}


def instruction_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A row of instructions as a chat; without an answer, of the question alone."""
    asked, more, answer = next(names for names in INSTRUCTIONS if names[0] in row and names[2] in row)
    system = next((row[name] for name in SYSTEM if row.get(name)), None)
    question = "\n\n".join(str(part) for part in (row[asked], row.get(more)) if part)
    said = [("system", system), ("user", question), ("assistant", row[answer])]
    return [{"role": role, "content": str(content)} for role, content in said if content]


def is_chat(value: Any) -> bool:
    return isinstance(value, list)


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def pair_of(row: dict[str, Any], entry: DatasetConfig) -> dict[str, Any]:
    """A preference row whose sides are chats, as TRL's trainers read it: with a prompt that both sides answer."""
    made = {side: [message_of(message, entry) for message in row[side] or []] for side in ("chosen", "rejected")}
    prompt = row.get("prompt") or []
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if all(made.values()) and (not prompt or all(side[0]["role"] != ASSISTANT for side in made.values())):
        return extract_prompt(made)
    return {"prompt": [message_of(message, entry) for message in prompt], **made}
