"""`coterie serve --batch-tokens`: many requests at once, each answered as if it were alone."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoTokenizer

import coterie
from coterie import tiny

openai = pytest.importorskip("openai", reason="needs pip install 'coterie[serve]'")
pytest.importorskip("fastapi", reason="needs pip install 'coterie[serve]'")
pytest.importorskip("uvicorn", reason="needs pip install 'coterie[serve]'")

from servers import Serving  # noqa: E402

GREEDY = {"temperature": 0, "max_tokens": 20}
NOISE = 0.25  # of bf16 logits, which reach 30


@pytest.fixture(scope="module")
def client():
    serving = Serving(tiny.PATH, "--name", "tiny", "--experts", "bf16", "--dense", "none", "--batch-tokens", "8000")
    yield serving.client
    serving.kill()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.PATH)


@pytest.fixture(scope="module")
def shortfall(tokenizer):
    """shortfall(prompt, text) -> by how much the logits of the text's tokens are below the highest, at most."""
    model = coterie.from_pretrained(tiny.PATH, experts="bf16").eval()

    def measure(prompt, text):
        ids = tokenizer(prompt)["input_ids"]
        both = tokenizer(prompt + text)["input_ids"]
        if both[: len(ids)] != ids:  # what was sampled may be spelled with the prompt's last letters
            both = ids + tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([both])).logits[0, len(ids) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(both[len(ids) :])[:, None])[:, 0]
        return (logits.max(1).values - chosen).max().item()

    return measure


def prompts(number):
    return [f"The statement of kind {i} is executed when" for i in range(number)]


def test_the_measure_tells_answers_apart(client, shortfall):
    one, other = prompts(2)[0], "A tuple of numbers is"
    text = client.completions.create(model="tiny", prompt=other, **GREEDY).choices[0].text
    assert shortfall(other, text) <= NOISE < shortfall(one, text)


def test_sixteen_streams_are_each_their_own(client, tokenizer, shortfall):
    def ask(prompt):
        chunks = list(client.completions.create(model="tiny", prompt=prompt, stream=True, **GREEDY))
        return "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].usage

    asked = prompts(16)
    with ThreadPoolExecutor(16) as pool:
        for prompt, (text, usage) in zip(asked, pool.map(ask, asked), strict=True):
            assert shortfall(prompt, text) <= NOISE
            assert (usage.prompt_tokens, usage.completion_tokens) == (len(tokenizer(prompt)["input_ids"]), 20)


def test_sampling_is_each_requests_own(client, shortfall):
    prompt = prompts(1)[0]

    def ask(temperature):
        made = client.completions.create(model="tiny", prompt=prompt, temperature=temperature, max_tokens=20)
        return made.choices[0].text

    with ThreadPoolExecutor(8) as pool:
        cold, hot = list(pool.map(ask, [0] * 4)), list(pool.map(ask, [0, 1.8, 0, 1.8, 0, 1.8, 0, 1.8]))
    assert all(shortfall(prompt, text) <= NOISE for text in [*cold, *hot[::2]])
    assert len(set(hot[1::2])) == 4 and all(shortfall(prompt, text) > NOISE for text in hot[1::2])


def test_chat_streamed_and_not(client):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "What is a tuple?"}], **GREEDY}
    answer = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(stream=True, **asked))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks).strip()
    assert answer.choices[0].message.content and answer.usage == chunks[-1].usage


@pytest.mark.parametrize("change", [{"stop": "x"}, {"seed": 1}, {"frequency_penalty": 1}, {"prompt": "with " * 1200}])
def test_what_cannot_be_had_is_refused_and_disturbs_nobody(client, shortfall, change):
    prompt = prompts(1)[0]
    with ThreadPoolExecutor() as pool:
        good = pool.submit(client.completions.create, model="tiny", prompt=prompt, **GREEDY)
        with pytest.raises(openai.BadRequestError):
            client.completions.create(**{"model": "tiny", "prompt": prompt, **GREEDY, **change})
        assert shortfall(prompt, good.result().choices[0].text) <= NOISE


def test_requests_of_one_id_and_those_that_leave(client, shortfall):
    prompt = prompts(1)[0]
    same = {"extra_headers": {"x-request-id": "same"}}
    for _ in range(3):
        stream = client.completions.create(model="tiny", prompt=prompt, stream=True, max_tokens=900, **same)
        next(iter(stream))
        stream.close()
    ask = lambda _: client.completions.create(model="tiny", prompt=prompt, **GREEDY, **same).choices[0].text  # noqa: E731
    with ThreadPoolExecutor(4) as pool:
        assert all(shortfall(prompt, text) <= NOISE for text in pool.map(ask, range(4)))


def test_it_stops(client):
    serving = Serving(tiny.PATH, "--name", "tiny", "--batch-tokens", "2000")
    try:
        serving.client.completions.create(model="tiny", prompt="A tuple", max_tokens=3)
        assert serving.end() == 0, serving.log()
    finally:
        serving.kill()
