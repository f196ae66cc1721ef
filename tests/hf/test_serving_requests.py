"""What a request may ask for: each refusal names its field, and what clients send by default passes."""

import pytest

from coterie.hf.serving.requests import Refused, check, check_batched

MESSAGES = [{"role": "user", "content": "Hello"}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
CALLED = [{"role": "assistant", "content": None, "tool_calls": []}, {"role": "tool", "content": "1"}]


def ask(endpoint, has_template=True, **body):
    check({"model": "m", **body}, ["m", "n"], ["m"] if has_template else ["n"], endpoint)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"messages": PARTS},
        {"messages": MESSAGES + CALLED},
        {"n": 1, "logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}, "user": "me"},
        {"temperature": 0, "top_p": 1, "max_tokens": 5, "seed": 0, "stop": "x", "stream": True},
        {"frequency_penalty": -0.5, "max_completion_tokens": 1},
        {"stop": ["a", "b"], "logit_bias": {"5": -100}, "tools": [{"type": "function"}], "stream": None},
    ],
)
def test_what_passes(body):
    ask("chat", **{"messages": MESSAGES, **body})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("messages", value) for value in (None, {}, [], [1], [{}], [{"role": 1}], [{"role": "user", "content": 5}])),
        *(("messages", [{"role": "user", "content": [part]}]) for part in ({}, {"type": "text"}, {"type": "audio"})),
        *(("max_tokens", value) for value in (0, -1, 1.5, "5", True)),
        ("max_completion_tokens", 0),
        *(("temperature", value) for value in (-0.1, "0", float("nan"), float("inf"), [], True)),
        *(("top_p", value) for value in (-0.1, 1.1)),
        *(("frequency_penalty", value) for value in (-1, 3)),
        *(("seed", value) for value in (1.5, 2**64, "1")),
        *(("stop", value) for value in ("", [], [""], 5, [5])),
        *(("stream", value) for value in ("yes", 2)),
        *(("tools", value) for value in ({}, [1])),
        *(("logit_bias", value) for value in ([], {"x": 1}, {"1": "x"})),
        *(("n", value) for value in (2, 0)),
        ("logprobs", True),
        ("presence_penalty", 1),
        ("response_format", {"type": "json_object"}),
        ("generation_config", "{}"),
    ],
)
def test_what_is_refused(field, value):
    with pytest.raises(Refused, match=field) as refused:
        ask("chat", **{"messages": MESSAGES, field: value})
    assert refused.value.status == 400


@pytest.mark.parametrize("model", [None, "", "x", ["m"], {}])
def test_another_model_is_not_found(model):
    with pytest.raises(Refused, match="one of") as refused:
        ask("chat", model=model, messages=MESSAGES)
    assert refused.value.status == 404


def test_completions_take_a_text():
    ask("completions", prompt="Hello")
    ask("completions", has_template=False, prompt="Hello")
    for prompt in (None, "", ["Hello"], [1, 2]):
        with pytest.raises(Refused, match="prompt"):
            ask("completions", prompt=prompt)


def test_responses_take_a_text_or_messages():
    ask("responses", input="Hello")
    ask("responses", input=[*MESSAGES, {"type": "function_call", "name": "f"}])
    for value in (None, [], 5, [{"content": "x"}]):
        with pytest.raises(Refused, match="input"):
            ask("responses", input=value)
    with pytest.raises(Refused, match="previous_response_id"):
        ask("responses", input="Hello", previous_response_id="x")


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_without_a_template_there_is_no_chat(endpoint):
    with pytest.raises(Refused, match="no chat template"):
        ask(endpoint, has_template=False, messages=MESSAGES, input="Hello")


def test_what_a_batch_refuses():
    check_batched({"temperature": 0.5, "top_p": 0.9, "stop": None})
    for field in ("stop", "seed", "logit_bias", "frequency_penalty"):
        with pytest.raises(Refused, match=field):
            check_batched({field: 1})
