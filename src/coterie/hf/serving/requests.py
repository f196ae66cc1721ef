"""What a request may ask of Transformers' server: the rest would be ignored in silence, or fail halfway."""

from __future__ import annotations

import math
from typing import Any

# Fields that the server does not honour, with the value that asks for nothing; null does so for all.
UNHONOURED = {
    "audio": None,
    "background": False,
    "best_of": 1,
    "echo": False,
    "function_call": None,
    "functions": None,
    "generation_config": None,  # could ask for any amount of memory
    "logprobs": False,
    "max_tool_calls": None,
    "n": 1,
    "prediction": None,
    "presence_penalty": 0,
    "previous_response_id": None,
    "response_format": {"type": "text"},
    "top_logprobs": 0,
    "web_search_options": None,
}
# What is not honoured where requests are answered together.
UNBATCHED = ("frequency_penalty", "logit_bias", "seed", "stop")
TEXT_PARTS = ("text", "input_text", "output_text")


class Refused(Exception):
    """A request that is refused, and the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def check(body: dict, models: list[str], with_template: list[str], endpoint: str) -> None:
    """Raises Refused for a request that cannot be answered as asked.

    with_template: those of the models that have a chat template. endpoint: "chat", "completions", "responses".
    """
    model = body.get("model")
    if model not in models:
        raise Refused(f"expected model to be one of {models}, found {model!r}", 404)
    for field, neutral in UNHONOURED.items():
        if body.get(field) not in (None, neutral):
            raise Refused(f"{field}={body[field]!r} is not supported: leave it out")
    if endpoint == "completions":
        expect(isinstance(body.get("prompt"), str) and body["prompt"], "prompt", "a text that is not empty", body)
    elif model not in with_template:
        raise Refused(f"{model} has no chat template: ask /v1/completions to continue a text")
    if endpoint == "chat":
        check_messages(body, "messages")
    elif endpoint == "responses" and not isinstance(body.get("input"), str):
        check_messages(body, "input")
    check_settings(body)


def check_batched(body: dict) -> None:
    """Raises Refused for a request that cannot be answered together with others."""
    for field in UNBATCHED:
        if body.get(field) is not None:
            raise Refused(f"{field} is not supported by a server that answers requests together: leave it out")


def check_messages(body: dict, field: str) -> None:
    """Raises Refused unless a field is a list of messages of text."""
    messages = body.get(field)
    expect(isinstance(messages, list) and messages, field, "a list of messages that is not empty", body)
    for message in messages:
        if not isinstance(message, dict):
            raise Refused(f"{field}: expected messages, found {message!r}")
        if field == "input" and message.get("type", "message") != "message":
            continue  # a function call, or what it returned
        if not isinstance(message.get("role"), str):
            raise Refused(f"{field}: expected a role in each message, found {message!r}")
        content = message.get("content")
        if content is None or isinstance(content, str):
            continue
        for part in content if isinstance(content, list) else [content]:
            is_text = isinstance(part, dict) and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str)
            if not is_text:
                raise Refused(f"{field}: expected content of text, found {str(part)[:100]!r}")


def check_settings(body: dict) -> None:
    """Raises Refused for settings of a wrong type or outside of their range."""
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        value = body.get(field)
        expect(value is None or (is_integer(value) and value > 0), field, "a whole number above 0", body)
    for field, low, high in (("temperature", 0, math.inf), ("top_p", 0, 1), ("frequency_penalty", -0.99, 2)):
        value = body.get(field)
        ok = value is None or (is_number(value) and low <= value <= high and not math.isinf(value))
        expect(ok, field, f"a number from {low}" + (f" to {high}" if high < math.inf else ""), body)
    seed = body.get("seed")
    expect(seed is None or (is_integer(seed) and -(2**63) <= seed < 2**64), "seed", "a whole number", body)
    expect(body.get("stream") in (None, True, False), "stream", "true or false", body)
    stop = body.get("stop")
    texts = [stop] if isinstance(stop, str) else stop
    ok = stop is None or (isinstance(texts, list) and texts and all(isinstance(text, str) and text for text in texts))
    expect(ok, "stop", "a text or a list of texts, none of them empty", body)
    tools = body.get("tools")
    ok = tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))
    expect(ok, "tools", "a list of objects", body)
    bias = body.get("logit_bias")
    ok = bias is None or (isinstance(bias, dict) and all(key.isdigit() and is_number(v) for key, v in bias.items()))
    expect(ok, "logit_bias", "an object of numbers by token", body)


def expect(ok: Any, field: str, what: str, body: dict) -> None:
    if not ok:
        raise Refused(f"{field}: expected {what}, found {str(body.get(field))[:100]!r}")


def is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_integer(value) or (isinstance(value, float) and not math.isnan(value))
