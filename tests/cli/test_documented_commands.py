"""Every `coterie` command of the README and of docs/ is run as it is written, in a folder that has what it names; what
is left out of it, and options that make it short, follow. Of other programs it is tested that they are there."""

from __future__ import annotations

import ast
import builtins
import itertools
import json
import re
import shlex
import shutil
import socket
from importlib.metadata import metadata
from pathlib import Path

import llm_compressor
import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file, save_file
from short_runs import write as write_config

from coterie import tiny
from coterie.bench.like import config_like
from coterie.cli import app
from coterie.convert import convert_cpu

ROOT = Path(__file__).parents[2]
DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COMMANDS = typer.main.get_command(app)
PROGRAMS = ("coterie", "python", "pip", "make", "torchrun", "vllm")


def documented() -> list[str]:
    """Commands in code spans and in indented lines, each once, without comments."""
    found = []
    for document in DOCUMENTS:
        text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        lines = re.findall(r"^    (\w.*)$", text, re.MULTILINE)
        spans = re.findall(r"`([^`]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
        found += [" ".join(command.split("  #")[0].split()) for command in (*lines, *spans)]
    return list(dict.fromkeys(command for command in found if command.split()[0] in PROGRAMS))


def of(program: str) -> list[str]:
    return [command for command in documented() if command.split()[0] == program and command != program]


SHAPE = "--shape E=4,H=64,I=64,K=2"
QUICK = "--seconds 0.01 --rounds 1"
# What a command needs that a line leaves out; it is added to lines that do not have it.
NEEDS = {
    "plan": "MODEL",
    "sft": "CONFIG",
    "chat": "MODEL",
    "serve": "MODEL",
    "convert cpu": "-i MODEL -o OUT",
    "convert dequantize": "-i QUANTISED -o OUT",
    "convert merge": "-i LOOSE -o OUT",
    "convert gpu": "--model_id MODEL --output_dir OUT",
    "convert compare": "PACKED PACKED",
    "convert verify": "PACKED MODEL",
    "adapter export": "-a FOLDER -o OUT",
    "adapter merge": "-a FOLDER -o OUT",
    "adapter convert": "-a OLD -o OUT",
}
# What makes a command short, or does without what is not here.
SHORT = {
    "plan": "--experts int4",
    "chat": "--max-tokens 4",
    "serve": "--port {port}",
    "convert gpu": "--force_cpu --dataset texts.jsonl",
    "bench layer": f"{SHAPE} -T 1 {QUICK}",
    "bench formats": f"{SHAPE} --experts int4 --isa scalar {QUICK}",
    "bench model": f"--like MODEL --layers 1 --vocabulary 64 --prompt 4 {QUICK}",
    "bench train layer": f"{SHAPE} --rank 2 -T 3 {QUICK}",
    "bench train model": f"--layers 1 --vocabulary 64 --rank 2 -T 3 {QUICK}",
    "bench train lora": f"{SHAPE} --rank 2 -T 3 {QUICK}",
    "bench train memory": f"{SHAPE} --rank 2 -T 3 --num-experts 4",
}
# What is in the folder under names that lines use for other things.
CHANGED = {
    "convert dequantize": {"MODEL": "QUANTISED"},
    "convert merge": {"-o PACKED": "-o OUT"},
    "convert compare": {"A B": "PACKED PACKED"},
    "bench layer": {"FORMAT": "int4"},
    "sft": {"FILE": "CONFIG"},
}
# Run by tests of their own.
ELSEWHERE = {"quickstart": "tests/cli/test_quickstart.py"}
OUTPUTS = ("-o", "--output_dir", "--init")


def path_of(words: list[str]) -> str:
    """The command that a line begins with: "convert cpu". Raises KeyError where there is none."""
    command, names = COMMANDS, []
    for word in words:
        if not hasattr(command, "commands"):
            break
        command = command.commands[word]
        names.append(word)
    return " ".join(names)


def completed(line: str) -> tuple[str, list[str]]:
    """(the command, its arguments in full)."""
    name = path_of(shlex.split(line)[1:])
    for theirs, ours in CHANGED.get(name, {}).items():
        line = line.replace(theirs, ours)
    words = shlex.split(line)[1:]
    needed, given = shlex.split(NEEDS.get(name, "")), words[len(name.split()) :]
    if needed and needed[0].startswith("-"):
        pairs = zip(needed[::2], needed[1::2], strict=True)
        needed = [word for pair in pairs if pair[0] not in given for word in pair]
    elif given:
        needed = []
    return name, [*words, *needed, *shlex.split(SHORT.get(name, ""))]


class Here:
    """`coterie.bench.process.Remote` without a process."""

    def __init__(self, make):
        self.made = make()

    def call(self, method, *arguments):
        return getattr(self.made, method)(*arguments)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def quantise(folder: Path) -> None:
    """Makes the experts of a copy of the bundled model FP8 by blocks, all scales 1."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if ".experts." in name]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.ones(1, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def age(adapter: Path) -> None:
    """Lays LoRA of experts out as PEFT 0.19.0 had it, input and output the other way round."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.19.0"}))
    file = adapter / "adapter_model.safetensors"
    save_file(
        {name.translate(str.maketrans("AB", "BA")): t.T.contiguous() for name, t in load_file(file).items()}, file
    )


@pytest.fixture(scope="module")
def things(tmp_path_factory) -> Path:
    """A folder with all that lines name."""
    peft = pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("things")
    for name in ("MODEL", "path-or-id"):
        (folder / name).symlink_to(tiny.PATH)
    quantise(Path(shutil.copytree(tiny.PATH, folder / "QUANTISED")))
    convert_cpu(tiny.PATH, folder / "PACKED")
    convert_cpu(tiny.PATH, folder / "LOOSE", loose=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny.PATH)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_parameters=targets)).save_pretrained(folder / "FOLDER")
    age(Path(shutil.copytree(folder / "FOLDER", folder / "OLD")))
    (folder / "texts.jsonl").write_text('{"text": "one two three"}\n')
    return folder


@pytest.fixture
def ready(things, tmp_path, monkeypatch):
    """In a folder with links to all that lines name, with nothing that waits for somebody or takes processes."""
    for thing in things.iterdir():
        (tmp_path / thing.name).symlink_to(thing)
    for name in ("CONFIG", "config.yaml"):
        write_config(tmp_path / name, tmp_path / "trained", max_steps=1)
    monkeypatch.chdir(tmp_path)
    llm_compressor.install(monkeypatch)
    asked = iter(["What is a list?"])

    def answer(_):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr(builtins, "input", answer)
    for module in ("train", "train_memory"):
        monkeypatch.setattr(f"coterie.bench.{module}.Remote", Here)
    small, _ = config_like(str(tiny.PATH), layers=1)
    monkeypatch.setattr("coterie.bench.train_model.qwen3_30b", lambda layers, vocabulary: small)
    monkeypatch.setattr("coterie.serve.server.run", lambda server, bound, key: server.stop())
    for rate in ("read_bandwidth", "dot_rate", "row_rate", "attention_rate", "packing_rate"):
        monkeypatch.setattr(f"coterie.machine.{rate}", lambda *_: 1e11)
    monkeypatch.setattr("coterie.plan.overhead", lambda: (1e-4, 1e-3))
    said = transformers.logging.get_verbosity()
    yield tmp_path
    transformers.logging.set_verbosity(said)


COMPLETED = {" ".join(completed(line)[1]): line for line in reversed(of("coterie"))}


@pytest.mark.parametrize("line", [line for line in COMPLETED.values() if path_of(line.split()[1:]) not in ELSEWHERE])
def test_runs(coterie, ready, line):
    _, words = completed(line)
    for word, following in itertools.pairwise(words):
        if word in OUTPUTS:
            (ready / following).unlink(missing_ok=True)
    ran = coterie(*(word.replace("{port}", str(free_port())) for word in words))
    assert ran.code == 0, ran.err


def test_what_is_run_elsewhere():
    lines = {path_of(line.split()[1:]) for line in of("coterie")}
    for name, file in ELSEWHERE.items():
        assert name in lines and f'coterie("{name}")' in (ROOT / file).read_text()
    assert lines >= NEEDS.keys() | SHORT.keys() | CHANGED.keys()


def leaves(command, names=()):
    if not hasattr(command, "commands"):
        yield " ".join(names)
    for name, each in getattr(command, "commands", {}).items():
        yield from leaves(each, (*names, name))


def test_every_command_is_documented():
    assert set(leaves(COMMANDS)) <= {path_of(line.split()[1:]) for line in of("coterie")}


def test_scripts_have_the_options_that_are_named():
    """Benchmarks beside other engines need those; here they are not run."""
    for line in of("python"):
        script, *words = shlex.split(line)[1:]
        if script == "-m":
            assert words[0] == "vllm.entrypoints.openai.api_server" or (ROOT / words[1]).exists(), line
            continue
        text = (ROOT / script).read_text()
        strings = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
        assert [word for word in words if word.startswith("-") and word not in strings] == [], line


def test_extras_and_targets_exist():
    extras = metadata("coterie").get_all("Provides-Extra")
    named = {extra for line in of("pip") for extra in re.findall(r"\[(\w+)\]", line)}
    assert named and named <= set(extras)
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {line.split()[1] for line in of("make")} <= set(targets)


def test_torchrun_is_given_a_command():
    """Run with two processes in tests/train/test_torchrun.py."""
    for line in of("torchrun"):
        words = shlex.split(line)
        assert "--no-python" in words and path_of(words[words.index("coterie") + 1 :]) == "sft"
