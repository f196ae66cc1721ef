"""A conversation beside plain `generate` on the whole of it, with a cache and without."""

import pytest
import torch
from hf.tiny_models import make
from transformers import AutoTokenizer, GenerationConfig

import coterie
from coterie import tiny
from coterie.errors import ArgumentError
from coterie.serve.conversation import Conversation
from coterie.serve.sampling import settings

QUESTIONS = ("What does the with statement do?", "And try?", "How long is a tuple?")


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return coterie.from_pretrained(tiny.PATH, experts="bf16", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(tiny.PATH)


@pytest.fixture
def talk(model, tokenizer):
    def make(**options):
        greedy = settings(model.generation_config, temperature=0.0, max_new_tokens=options.pop("tokens", 12))
        return Conversation(model, options.pop("tokenizer", tokenizer), greedy, **options)

    return make


def whole(model, tokenizer, messages, tokens=12):
    """What the model answers when it reads all messages anew."""
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(ids, max_new_tokens=tokens, do_sample=False)
    return ids.shape[1], tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("system", [None, "You are brief."])
def test_answers_are_those_to_the_whole_conversation(talk, model, tokenizer, system):
    conversation = talk(system=system)
    messages = [{"role": "system", "content": system}] if system else []
    for number, question in enumerate(QUESTIONS):
        shown = []
        answer = conversation.ask(question, lambda *piece, shown=shown: shown.append(piece))
        messages.append({"role": "user", "content": question})
        length, expected = whole(model, tokenizer, messages)
        assert answer.text == expected == "".join(text for text, _ in shown)
        assert not any(thought for _, thought in shown)
        assert (answer.prompt_tokens, answer.tokens, answer.ended) == (length, 12, "length")
        assert (answer.computed_tokens < length) == (number > 0)
        messages.append({"role": "assistant", "content": expected.strip()})
    assert conversation.messages == messages


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_next"])
def test_caches_that_nothing_can_be_taken_out_of(family, tmp_path):
    """What the template leaves out of earlier answers would have to be: such a model reads the conversation anew."""
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    said = "{% generation %}{{ message.content"
    assert said in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(said, f"{said}[:4]")
    make(family, vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, experts="bf16", dtype=torch.float32).eval()
    greedy = settings(model.generation_config, temperature=0.0, max_new_tokens=12)
    conversation, messages = Conversation(model, tokenizer, greedy), []
    for question in QUESTIONS:
        answer = conversation.ask(question, lambda *_: None)
        messages.append({"role": "user", "content": question})
        assert (answer.prompt_tokens, answer.text) == whole(model, tokenizer, messages)
        messages.append({"role": "assistant", "content": answer.text.strip()})


def test_what_is_restarted_is_forgotten(talk):
    conversation = talk()
    first = conversation.ask(QUESTIONS[0], lambda *_: None)
    conversation.ask(QUESTIONS[1], lambda *_: None)
    conversation.restart()
    again = conversation.ask(QUESTIONS[0], lambda *_: None)
    assert (again.text, again.prompt_tokens) == (first.text, first.prompt_tokens)


def test_an_interrupted_answer_is_kept_as_far_as_it_came(talk, model, tokenizer):
    conversation = talk(tokens=40)
    shown = []

    def interrupt(piece, thought):
        shown.append(piece)
        if len(shown) == 4:
            raise KeyboardInterrupt

    answer = conversation.ask(QUESTIONS[0], interrupt)
    assert answer.ended == "interrupted" and 0 < answer.tokens < 40
    messages = conversation.messages
    assert messages[-1]["content"] == answer.text.strip() and answer.text.startswith("".join(shown[:4]))
    after = conversation.ask(QUESTIONS[1], lambda *_: None)
    expected = whole(model, tokenizer, [*messages, {"role": "user", "content": QUESTIONS[1]}], tokens=40)
    assert (after.prompt_tokens, after.text) == expected
    assert after.computed_tokens == after.prompt_tokens


def test_what_was_thought_is_not_remembered(talk, tokenizer):
    """A template that opens the block itself: all the text up to </think> is thought."""
    thinking = AutoTokenizer.from_pretrained(tiny.PATH)
    thinking.chat_template = tokenizer.chat_template.replace(
        "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n<think>\n{% endif %}"
    )
    assert thinking.chat_template != tokenizer.chat_template
    conversation = talk(tokenizer=thinking)
    shown = []
    answer = conversation.ask(QUESTIONS[0], lambda *piece: shown.append(piece))
    assert shown and all(thought for _, thought in shown)
    assert answer.text == conversation.messages[-1]["content"] == ""


def test_a_full_context_is_said_and_not_remembered(talk):
    conversation = talk()
    conversation.ask(QUESTIONS[0], lambda *_: None)
    before = list(conversation.messages)
    with pytest.raises(ArgumentError, match="context is 1024"):
        conversation.ask("with " * 1100, lambda *_: None)
    assert conversation.messages == before
    assert conversation.ask(QUESTIONS[1], lambda *_: None).tokens == 12


def test_an_answer_ends_where_the_context_does(talk):
    answer = talk(tokens=500).ask("with " * 900, lambda *_: None)
    assert answer.prompt_tokens > 900 and answer.prompt_tokens + answer.tokens == 1024
    assert answer.ended == "length"


def test_a_template_that_refuses_is_an_error(talk, tokenizer):
    picky = AutoTokenizer.from_pretrained(tiny.PATH)
    picky.chat_template = "{{ raise_exception('no system prompts') }}" + tokenizer.chat_template
    with pytest.raises(ArgumentError, match="no system prompts"):
        talk(tokenizer=picky).ask(QUESTIONS[0], lambda *_: None)


def test_without_a_template_text_is_continued(talk, model, tokenizer):
    bare = AutoTokenizer.from_pretrained(tiny.PATH)
    bare.chat_template = None
    conversation = talk(tokenizer=bare)
    for text in ("The with statement", "A tuple is"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
        answer = conversation.ask(text, lambda *_: None)
        assert answer.text == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    with pytest.raises(ArgumentError, match="system prompt"):
        talk(tokenizer=bare, system="Be brief.")


def test_settings_are_the_models_until_asked():
    default = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, top_k=20)
    same = settings(default, temperature=None, max_new_tokens=5)
    assert (same.do_sample, same.temperature, same.top_p, same.top_k, same.max_new_tokens) == (True, 0.7, 0.8, 20, 5)
    greedy = settings(default, temperature=0.0, top_p=0.5)
    assert greedy.do_sample is False and greedy.temperature is None and greedy.top_p is None
    assert settings(GenerationConfig(), top_k=5).do_sample is True
    assert not settings(GenerationConfig(), repetition_penalty=1.1).do_sample
    assert default.temperature == 0.7
