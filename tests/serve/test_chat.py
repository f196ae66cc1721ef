"""`coterie chat` on a pseudo-terminal."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from terminal import Terminal, plain
from transformers import AutoTokenizer

import coterie
from coterie import tiny
from coterie.convert import convert_cpu

GREEDY = ("--temperature", "0", "--max-tokens", "20")
QUESTION = "What does the with statement do?"
DIM = "\x1b[2m"


def expected(path, adapter=None, messages=({"role": "user", "content": QUESTION},), **options):
    """What plain `generate` answers, computed as the command computes it: with one thread."""
    threads = torch.get_num_threads(), coterie.cpu.threads()
    torch.set_num_threads(1)
    coterie.cpu.set_threads(1)
    model, tokenizer = coterie.from_pretrained(path, **options).eval(), AutoTokenizer.from_pretrained(tiny.PATH)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).eval()
    ids = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_tensors="pt")["input_ids"]
    out = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False)
    torch.set_num_threads(threads[0])
    coterie.cpu.set_threads(threads[1])
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_chat_from_beginning_to_end():
    with Terminal("chat", tiny.PATH, *GREEDY, "--experts", "int8", "--system", "You are brief.") as terminal:
        assert "/new forgets" in terminal.until("stops an answer.")
        answer, took = terminal.ask(QUESTION)
        messages = {"role": "system", "content": "You are brief."}, {"role": "user", "content": QUESTION}
        assert answer == expected(tiny.PATH, messages=messages, experts="int8", dense="int8")
        answered, read, memory = took.split("; ")
        assert re.fullmatch(r"20 tokens, [\d.]+ tokens/s, stopped at the most tokens", answered)
        assert re.fullmatch(r"prompt of \d+ tokens in [\d.]+ s", read)
        assert re.fullmatch(r"[\d.]+ [MG]B of RAM", memory)
        _, took = terminal.ask("And try?")
        assert re.search(r"prompt of \d+ tokens, \d+ of them known, in", took)
        terminal.until("> ")
        terminal.type("/new")
        terminal.until("forgotten")
        assert terminal.ask(QUESTION)[0] == answer
        terminal.until("> ")
        terminal.press(b"\x04")
        assert terminal.end() == 0


def test_ctrl_c_stops_an_answer_and_not_the_chat():
    with Terminal("chat", tiny.PATH, "--temperature", "0") as terminal:
        terminal.until("> ")
        terminal.type("Tell me about statements.")
        terminal.until(" ")  # the first word is there
        terminal.press(b"\x03")
        assert ", interrupted; prompt of" in terminal.until("]\x1b[0m")
        terminal.until("> ")
        terminal.press(b"half a line")
        terminal.until("half a line")
        terminal.until_it_waits()
        terminal.press(b"\x03")
        terminal.until("Ctrl-D leaves")
        answer, took = terminal.ask("And try?")
        assert answer and "interrupted" not in took
        terminal.until("> ")
        terminal.type("/exit")
        assert terminal.end() == 0


def test_sampling_repeats_itself_from_a_seed():
    answers = []
    for _ in range(2):
        options = "--temperature", "1.5", "--top-k", "50", "--max-tokens", "20", "--seed", "1"
        with Terminal("chat", tiny.PATH, *options) as terminal:
            answers.append(terminal.ask(QUESTION)[0])
    assert answers[0] == answers[1] != expected(tiny.PATH)


def test_thoughts_are_dimmed(variant):
    opening = "<|im_start|>assistant\n{% endif %}"
    path = variant(lambda text: text.replace(opening, opening.replace("{%", "<think>\n{%")))
    with Terminal("chat", path, *GREEDY) as terminal:
        terminal.until("> ")
        terminal.type(QUESTION)
        answer = terminal.until("\n\x1b[2m[")
        assert plain(answer).strip()
        assert re.sub(r"\x1b\[2m[^\x1b]*\x1b\[0m", "", answer).strip() == ""
    with Terminal("chat", tiny.PATH, *GREEDY) as terminal:
        terminal.until("> ")
        terminal.type(QUESTION)
        assert DIM not in terminal.until("\n\x1b[2m[")


def test_a_model_without_a_template_continues_text(variant):
    path = variant(template=None)
    with Terminal("chat", path, *GREEDY) as terminal:
        assert "no chat template: it continues" in terminal.until("Ctrl-C")
        tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
        answer, took = terminal.ask("The with statement")
        assert answer and f"prompt of {len(tokenizer('The with statement')['input_ids'])} tokens" in took


def test_packed_checkpoints_and_adapters(adapter, tmp_path):
    convert_cpu(tiny.PATH, tmp_path / "packed", "int4")
    with Terminal("chat", tmp_path / "packed", *GREEDY, "--mmap", "--adapter", adapter) as terminal:
        adapted = terminal.ask(QUESTION)[0]
    assert adapted == expected(tmp_path / "packed", adapter)
    assert adapted != expected(tmp_path / "packed")


def test_an_adapter_brings_its_template(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    with Terminal("chat", tiny.PATH, *GREEDY, "--adapter", tmp_path) as terminal:
        assert f"prompt of {len(tokenizer(QUESTION)['input_ids'])} tokens" in terminal.ask(QUESTION)[1]


def test_quantised_checkpoints(variant):
    path = variant(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        weight = tensors[name]
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(weight.shape[0] // 128, weight.shape[1] // 128)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with Terminal("chat", path, *GREEDY) as terminal:
        assert terminal.ask(QUESTION)[0] == expected(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "/nowhere is not a checkpoint folder"),
        ([tiny.PATH, "--adapter", "/nowhere"], "expected the folder of a PEFT adapter"),
        ([tiny.PATH, "--experts", "int3"], "int3"),
        ([tiny.PATH, "--temperature", "-1"], "greater than or equal to 0"),
        ([tiny.PATH, "--gpu-experts", "all"], "--gpu-experts: they are on the GPU that the rest of the model is on"),
        ([tiny.PATH, "--device", "cuda", "--gpu-experts", "half"], "gpu_experts: expected all, auto, stream"),
        ([tiny.PATH, "--device", "cuda:99", "--gpu-experts", "4"], "device='cuda:99' cannot be used here"),
    ],
)
def test_mistakes_end_it_with_exit_code_2(arguments, message):
    with Terminal("chat", *arguments) as terminal:
        terminal.until(message)
        assert terminal.end() == 2
