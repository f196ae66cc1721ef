"""`coterie serve`, asked by OpenAI's client; answers are compared with plain `generate`."""

from __future__ import annotations

import http.client
import json
import queue
import shutil
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import forks
import pytest
import torch
from transformers import AutoTokenizer

import coterie
from coterie import tiny

openai = pytest.importorskip("openai", reason="needs pip install 'coterie[serve]'")
pytest.importorskip("fastapi", reason="needs pip install 'coterie[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install 'coterie[serve]'")

from servers import KEY, Serving, free_port  # noqa: E402

QUESTION = [{"role": "user", "content": "What does the with statement do?"}]
GREEDY = {"temperature": 0, "max_tokens": 20}
OTHER = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def server(adapter, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")  # the same with a template of its own
    shutil.copytree(adapter, other, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    tokenizer.chat_template = OTHER
    tokenizer.save_pretrained(other)
    options = "--adapter", f"tuned={adapter}", "--adapter", f"other={other}"
    serving = Serving(tiny.PATH, "--name", "tiny", "--experts", "bf16", "--dense", "none", *options)
    yield serving
    serving.kill()


@pytest.fixture(scope="module")
def client(server):
    return server.client


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.PATH)


@pytest.fixture(scope="module")
def truth(adapter, tokenizer):
    """truth(prompt, adapted) -> (tokens read, text written) by plain `generate`, one thread as the server.

    Of answers in a chat Transformers' server takes away the white space at the ends.
    """
    from peft import PeftModel

    model = PeftModel.from_pretrained(coterie.from_pretrained(tiny.PATH, experts="bf16"), adapter).eval()

    def answer(prompt, adapted=False):
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        options = {"input_ids": torch.tensor([ids]), "max_new_tokens": 20, "do_sample": False}
        before = torch.get_num_threads(), coterie.cpu.threads()
        torch.set_num_threads(1)
        coterie.cpu.set_threads(1)
        if adapted:
            out = model.generate(**options)
        else:
            with model.disable_adapter():
                out = model.generate(**options)
        torch.set_num_threads(before[0])
        coterie.cpu.set_threads(before[1])
        text = tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        return len(ids), text if isinstance(prompt, str) else text.strip()

    return answer


def streamed(chunks):
    """(the text, the last chunk) of a streamed chat completion."""
    chunks = list(chunks)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks), chunks[-1]


def raw(server, method, path, body=None, key=KEY):
    """(status, parsed body) without a client's help."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


@pytest.mark.parametrize("name", ["tiny", "tuned"])
def test_chat_completions_are_what_generate_answers(client, truth, name):
    length, text = truth(QUESTION, adapted=name == "tuned")
    answer = client.chat.completions.create(model=name, messages=QUESTION, **GREEDY)
    assert answer.choices[0].message.content == text and answer.model == name
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 20)
    pieces, last = streamed(client.chat.completions.create(model=name, messages=QUESTION, stream=True, **GREEDY))
    assert pieces.strip() == text
    assert last.choices[0].finish_reason == "length" and last.usage == answer.usage


def test_an_adapter_changes_the_answer_and_only_under_its_name(client, truth):
    assert truth(QUESTION, adapted=True)[1] != truth(QUESTION)[1]
    names = ["tiny", "tuned"] * 3
    with ThreadPoolExecutor(len(names)) as pool:
        ask = lambda name: client.chat.completions.create(model=name, messages=QUESTION, **GREEDY)  # noqa: E731
        answers = list(pool.map(ask, names))
    for name, answer in zip(names, answers, strict=True):
        assert answer.choices[0].message.content == truth(QUESTION, adapted=name == "tuned")[1]


def test_an_adapter_has_its_own_template(client, tokenizer):
    answer = client.chat.completions.create(model="other", messages=QUESTION, **GREEDY)
    assert answer.usage.prompt_tokens == len(tokenizer(QUESTION[0]["content"])["input_ids"])


def test_completions_continue_text_and_stop(client, truth):
    length, text = truth("The with statement")
    answer = client.completions.create(model="tiny", prompt="The with statement", **GREEDY)
    assert answer.choices[0].text == text
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (length, 20)
    word = text.split()[2]
    stopped = client.completions.create(model="tiny", prompt="The with statement", stop=[word], **GREEDY)
    assert stopped.choices[0].finish_reason == "stop"
    assert word in stopped.choices[0].text and len(stopped.choices[0].text) < len(text)
    chunks = client.completions.create(model="tiny", prompt="The with statement", stream=True, **GREEDY)
    assert "".join(chunk.choices[0].text for chunk in chunks) == text


def test_responses(client, truth):
    length, text = truth(QUESTION)
    asked = {"model": "tiny", "input": QUESTION[0]["content"], "temperature": 0, "max_output_tokens": 20}
    answer = client.responses.create(**asked)
    assert answer.output_text == text
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (length, 20)
    events = list(client.responses.create(stream=True, **asked))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == text
    assert events[-1].type == "response.completed" and events[-1].response.usage == answer.usage


def test_sampling_follows_the_request(client, truth):
    def sample(**options):
        made = client.chat.completions.create(model="tiny", messages=QUESTION, max_tokens=20, **options)
        return made.choices[0].message.content

    first = sample(temperature=1.5, seed=3)
    assert first == sample(temperature=1.5, seed=3)
    assert len({first, truth(QUESTION)[1], sample(temperature=1.5, seed=4)}) == 3


def test_models_and_health(server, client):
    assert [model.id for model in client.models.list()] == ["tiny", "tuned", "other"]
    assert raw(server, "GET", "/health", key=None) == (200, {"status": "ok"})


@pytest.mark.parametrize("key", [None, "", "wrong", KEY + "x"])
def test_a_key_is_asked_for(server, key):
    status, body = raw(server, "GET", "/v1/models", key=key)
    assert status == 401 and body["error"]["type"] == "authentication_error"


def test_nothing_else_is_served(server):
    for path in ("/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions"):
        status, body = raw(server, "POST", path, "{}")
        assert status == 404 and body["error"]["message"] == "Not Found"


BAD = {
    "another model": ({"model": "gpt"}, 404, "one of"),
    "no messages": ({"messages": []}, 400, "messages"),
    "messages of a wrong type": ({"messages": "hello"}, 400, "messages"),
    "a message without a role": ({"messages": [{"content": "x"}]}, 400, "role"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "of text"),
    "no tokens": ({"max_tokens": 0}, 400, "max_tokens"),
    "a temperature of a wrong type": ({"temperature": "hot"}, 400, "temperature"),
    "a negative temperature": ({"temperature": -1}, 400, "temperature"),
    "an empty stop": ({"stop": [""]}, 400, "stop"),
    "two answers": ({"n": 2}, 400, "n=2"),
    "JSON": ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    "an unknown field": ({"colour": "red"}, 422, "colour"),
    "a call that is no JSON": (
        {"messages": [*QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        500,
        "JSONDecodeError",
    ),
    "a token that is none": ({"logit_bias": {"99999999": 1}}, 500, "Error"),
    "a prompt beyond the context": ({"messages": [{"role": "user", "content": "with " * 1200}]}, 400, "is 1024"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_request_is_refused_and_disturbs_nobody(server, client, truth, case, stream):
    change, status, message = BAD[case]
    if case == "a token that is none" and stream:
        pytest.skip("Transformers finds it when the stream has begun")
    _, text = truth(QUESTION)
    with ThreadPoolExecutor() as pool:
        good = pool.submit(client.chat.completions.create, model="tiny", messages=QUESTION, **GREEDY)
        body = {"model": "tiny", "messages": QUESTION, "stream": stream, **GREEDY, **change}
        found, answer = raw(server, "POST", "/v1/chat/completions", json.dumps(body))
        assert found == status and message in answer["error"]["message"]
        assert good.result().choices[0].message.content == text
    assert client.chat.completions.create(model="tiny", messages=QUESTION, **GREEDY).choices[0].message.content == text


@pytest.mark.parametrize("body", ["{nope", "", "[1]", '"text"', b"\xff\xfe", "{" * 5000])
def test_malformed_json(server, body):
    status, answer = raw(server, "POST", "/v1/chat/completions", body)
    assert status == 400 and answer["error"]["type"] == "invalid_request_error"


def test_an_answer_ends_with_the_context(client):
    answer = client.completions.create(model="tiny", prompt="with " * 990, max_tokens=500, temperature=0)
    assert answer.usage.total_tokens == 1024 and answer.choices[0].finish_reason == "length"


def test_sixteen_streams_at_once(client, truth):
    prompts = [[{"role": "user", "content": f"What is a statement number {i}?"}] for i in range(16)]

    def ask(messages):
        return streamed(client.chat.completions.create(model="tiny", messages=messages, stream=True, **GREEDY))

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, prompts))
    for messages, (text, last) in zip(prompts, answers, strict=True):
        length, expected = truth(messages)
        assert text.strip() == expected and last.usage.prompt_tokens == length


def test_a_disconnect_in_mid_stream(client, truth):
    for _ in range(3):
        stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, max_tokens=900)
        for _, _ in zip(stream, range(3), strict=False):
            pass
        stream.close()
    answer = client.chat.completions.create(model="tiny", messages=QUESTION, **GREEDY)
    assert answer.choices[0].message.content == truth(QUESTION)[1]


def test_a_disconnect_ends_the_generation(monkeypatch, tokenizer):
    import uvicorn

    from coterie.hf.serving.server import NamedModel, Server
    from coterie.serve.server import bind

    ended = queue.Queue()
    generate = NamedModel.generate

    def recorded(self, *arguments, **options):
        try:
            ended.put(generate(self, *arguments, **options).shape)
        except BaseException as error:
            ended.put(type(error).__name__)
            raise

    monkeypatch.setattr(NamedModel, "generate", recorded)
    model = coterie.from_pretrained(tiny.PATH, experts="bf16").eval()
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(Server("tiny", model, {None: tokenizer}, 1024).app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bind("127.0.0.1", port)]})
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    stream = client.chat.completions.create(model="tiny", messages=QUESTION, stream=True, max_tokens=900)
    next(iter(stream))
    stream.close()
    assert ended.get(timeout=300) == "_GenerationCancelled"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, -signal.SIGTERM)])
def test_it_stops_when_running_answers_have_ended(number, code, truth):
    serving = Serving(tiny.PATH, "--name", "tiny", "--experts", "bf16", "--dense", "none")
    try:
        begun = threading.Event()

        def ask():
            pieces = []
            options = {"temperature": 0, "max_tokens": 200, "stream": True}
            for chunk in serving.client.chat.completions.create(model="tiny", messages=QUESTION, **options):
                pieces.append(chunk.choices[0].delta.content or "")
                begun.set()
            return "".join(pieces), chunk

        with ThreadPoolExecutor() as pool:
            asked = pool.submit(ask)
            assert begun.wait(300)
            assert serving.end(number) == code, serving.log()
            text, last = asked.result()
        assert last.choices[0].finish_reason in ("length", "stop") and last.usage.completion_tokens > 20
        assert text.strip()
        with pytest.raises(openai.APIConnectionError):
            serving.client.models.list()
    finally:
        serving.kill()


def test_an_address_in_use_is_said_before_loading():
    port = free_port()
    with socket.create_server(("127.0.0.1", port)):
        done = forks.run("from coterie.cli import main; main()", "serve", tiny.PATH, "--port", port)
    assert done.returncode == 2 and f"cannot serve at 127.0.0.1:{port}" in done.stderr
