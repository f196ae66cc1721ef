"""Every command as a newcomer would type it: what it prints, and what a mistake gives."""

from __future__ import annotations

import json
import sys
import types

import pytest
import torch

from coterie import cpu, machine, memory, plan, tiny
from coterie.cli.console import count, significant, size
from coterie.cli.convert_cpu import parse_layers
from coterie.cli.doctor import advise
from coterie.errors import ArgumentError
from coterie.gpu import rates

COMMANDS = ("quickstart", "doctor", "plan", "convert", "bench", "chat", "serve")


def test_help_names_every_command(coterie):
    ran = coterie("--help")
    assert ran.code == 0
    assert all(command in ran.out for command in COMMANDS)


EXPLAINED = (
    ["quickstart"],
    ["plan"],
    ["chat"],
    ["serve"],
    *(["convert", command] for command in ("cpu", "gpu", "merge", "dequantize", "compare", "verify")),
    ["bench", "layer"],
    ["bench", "model"],
    ["bench", "train", "layer"],
    ["bench", "train", "model"],
    ["bench", "train", "lora"],
    ["bench", "train", "memory"],
)


@pytest.mark.parametrize("command", EXPLAINED, ids=" ".join)
def test_every_command_explains_itself(coterie, command):
    ran = coterie(*command, "--help")
    assert ran.code == 0
    assert "Usage" in ran.out


def test_version(coterie):
    assert coterie("--version").out.startswith("coterie 0.")


def test_mistyped_command_exits_2(coterie):
    assert coterie("quikstart").code == 2


OUTPUT = object()  # a folder that is not to be made


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "/nowhere"], "/nowhere does not exist"),
        (["plan", tiny.PATH, "--ram", "lots"], "expected a size like 64GB"),
        (["plan", tiny.PATH, "--experts", "int3"], "unknown format 'int3'"),
        (["plan", tiny.PATH, "--context", "0"], "expected at least 1"),
        (["convert", "cpu", "-i", "/nowhere", "-o", OUTPUT], "/nowhere"),
        (["convert", "cpu", "-i", tiny.PATH, "-o", OUTPUT, "--group-size", "7"], "group_size"),
        (["convert", "cpu", "-i", tiny.PATH, "-o", OUTPUT, "--layers", "x"], "--layers"),
        (["convert", "cpu", "-i", tiny.PATH, "-o", OUTPUT, "--layers", "9"], "layer 9"),
        (["convert", "cpu", "-i", tiny.PATH, "-o", OUTPUT, "--input-type", "gptq"], "holds experts in bf16"),
        (["convert", "cpu", "-i", tiny.PATH, "-o", OUTPUT, "--resume-layer", "2"], "layer 0 is not finished"),
        (["bench", "layer", "--shape", "round"], "unknown shape 'round'"),
        (["bench", "layer", "-T", "1,two"], "--tokens"),
        (["bench", "layer", "--shape", "tiny", "--peer", "fastest"], "unknown peer"),
        (["bench", "model", "--layers", "0"], "at least 1"),
        (["bench", "train", "layer", "--rank", "0"], "rank=0"),
        (["bench", "train", "layer", "--peer", "fastest"], "unknown peer"),
        (["bench", "train", "model", "--experts", "int3"], "unknown format 'int3'"),
        (["bench", "train", "lora", "-T", "0"], "--tokens"),
        (["bench", "train", "memory", "--num-experts", "all"], "--num-experts"),
        (["bench", "train", "memory", "--num-experts", "4"], "K at most E"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(coterie, arguments, message, tmp_path):
    ran = coterie(*(tmp_path / "made" if argument is OUTPUT else argument for argument in arguments))
    assert ran.code == 2 and not any(tmp_path.iterdir())
    assert ran.out == ""
    assert ran.err.startswith("coterie: ") and ran.err.count("\n") == 1
    assert message in ran.err


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "openai"])
def test_serve_names_the_package_that_is_missing(coterie, monkeypatch, package):
    for name in ("fastapi", "uvicorn", "openai"):
        monkeypatch.setitem(sys.modules, name, None if name == package else types.ModuleType(name))
    ran = coterie("serve", tiny.PATH)
    assert ran.code == 2
    assert ran.err == f"coterie: serving needs {package}: pip install 'coterie[serve]'\n"


@pytest.mark.parametrize("adapter", ["folder", "=folder", "name=", f"{tiny.PATH}=folder"])
def test_serve_takes_adapters_by_name(coterie, monkeypatch, adapter):
    for name in ("fastapi", "uvicorn", "openai"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    ran = coterie("serve", tiny.PATH, "--adapter", adapter)
    assert ran.code == 2 and "--adapter: " in ran.err


def test_serve_does_not_batch_adapters(coterie, monkeypatch):
    for name in ("fastapi", "uvicorn", "openai"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    ran = coterie("serve", tiny.PATH, "--adapter", "a=folder", "--batch-tokens", "1000")
    assert ran.code == 2 and "leave out --batch-tokens" in ran.err


@pytest.fixture
def known_rates(monkeypatch):
    """Those of a machine, without measuring them: a second for each plan."""
    monkeypatch.setattr(machine, "read_bandwidth", lambda: 40e9)
    monkeypatch.setattr(machine, "dot_rate", lambda format: {"bf16": 1e12, "int8": 2e12}[format])
    monkeypatch.setattr(machine, "row_rate", lambda: 20e9)
    monkeypatch.setattr(machine, "attention_rate", lambda: 3e11)
    monkeypatch.setattr(machine, "packing_rate", lambda format: 1e9)
    monkeypatch.setattr(plan, "overhead", lambda: (1e-4, 1e-3))


def test_plan_prints_a_row_for_each_format(coterie):
    ran = coterie("plan", tiny.PATH, "--bandwidth", "50GB")
    assert ran.code == 0
    assert "3.61M parameters" in ran.out and "4 of 16 used per token" in ran.out
    assert "7.23 MB of BF16" in ran.out
    assert all(f"│ {name} " in ran.out for name in ("bf16", "int8", "int4"))
    assert "fits" in ran.out


def test_plan_says_what_is_missing(coterie, known_rates):
    ran = coterie("plan", tiny.PATH, "--bandwidth", "50GB", "--ram", "500MB", "--experts", "int4")
    assert "532 MB short" in ran.out


def test_plan_reads_a_number_as_gigabytes_and_keeps_a_margin(coterie, known_rates):
    assert "RAM: 64 GB planned for, as given; 60.8 GB after" in coterie("plan", tiny.PATH, "--ram", "64").out


def test_plan_says_first_whether_the_model_opens(coterie, known_rates, tmp_path):
    assert coterie("plan", tiny.PATH).out.startswith("Opened by this version")
    config = json.loads((tiny.PATH / "config.json").read_text())
    for quantization, said in (
        ({"quant_method": "mxfp4"}, "Opened by this version: quantised as mxfp4; its experts keep their codes"),
        ({"quant_method": "novel"}, "Not opened by this version: it is quantised by novel"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        ran = coterie("plan", tmp_path)
        assert " ".join(ran.out.split()).startswith(said)
        row = next((line for line in ran.out.splitlines() if "as it is" in line), "")
        assert ("mxfp4, as it is" in row and "fits" in row) == (quantization["quant_method"] == "mxfp4")
        assert "deprecated" not in ran.out + ran.err


@pytest.fixture
def one_gpu(monkeypatch, known_rates):
    """One that is the CPU, of 24 GB, with rates that are given."""
    gpu = machine.Gpu(torch.device("cpu"), "A [new] card", "8.9", 24 * 10**9, 20 * 10**9)
    monkeypatch.setattr(machine, "gpus", lambda: [gpu])
    monkeypatch.setattr(machine, "link_rates", lambda device: (25e9, 20e9))
    monkeypatch.setattr(machine, "gpu_bandwidth", lambda device: 1e12)
    monkeypatch.setattr(rates, "delivered", lambda device: 12e9)
    monkeypatch.setattr(rates, "products", lambda device: 100e12)


def test_plan_places_experts_on_a_gpu_that_is_named(coterie, known_rates, monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    assert "VRAM" not in coterie("plan", tiny.PATH, "--experts", "int4").out
    said = " ".join(coterie("plan", tiny.PATH, "--experts", "int4", "--vram", "24GB").out.split())
    assert "With a GPU: 24 GB of VRAM, as given; 22.8 GB after a margin of 5%." in said
    assert 'int4: device="cuda", gpu_experts="all"' in said and "The GPU, assumed: reads 600 GB/s" in said
    said = " ".join(coterie("plan", tiny.PATH, "--vram", "1GB").out.split())
    assert "short" in said and "device=" not in said


def test_plan_places_experts_on_the_gpu_that_is_here(coterie, one_gpu):
    said = " ".join(coterie("plan", tiny.PATH, "--experts", "int4").out.split())
    assert "With a GPU: 20 GB of VRAM, free on A [new] card; 19 GB after" in said
    assert "The GPU, measured here: reads 1 TB/s, gets 12 GB/s of packed experts, 100 TFLOP/s in bf16." in said


def test_plan_train_adds_what_fine_tuning_takes(coterie, known_rates):
    ran = coterie("plan", tiny.PATH, "--train", "--lora-r", "4", "--sequence-len", "64", "--experts", "int4")
    assert "LoRA of rank 4 on attention and experts, 1 x 64 tokens" in ran.out and "AdamW" in ran.out


def test_convert_reports_sizes_and_errors(coterie, tmp_path):
    ran = coterie("convert", "cpu", "-i", tiny.PATH, "-o", tmp_path / "packed", "--quant-method", "int8")
    assert ran.code == 0
    assert json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["experts"] == "int8"
    assert "layer 4/4: 6.29 MB of 6.29 MB" in ran.err
    assert all(word in ran.out for word in ("6.29 MB", "3.41 MB", "gate", "up", "down"))


def test_doctor_says_what_was_chosen_and_measured(coterie):
    ran = coterie("doctor")
    assert ran.code == 0
    assert cpu.info().isa in ran.out
    assert "GB/s" in ran.out and "GFLOP/s" in ran.out and "transformers" in ran.out


def test_doctor_says_where_experts_lie(coterie, monkeypatch):
    assert "experts by node" not in coterie("doctor").out or cpu.info().numa_nodes > 1
    monkeypatch.setattr(machine, "numa_shares", lambda: {0: 0.97, 2: 0.5})
    assert "97% of what 0 computes, 50% of what 2 computes" in coterie("doctor").out


def test_doctor_says_what_the_gpu_is_for(coterie, one_gpu):
    said = " ".join(coterie("doctor").out.split())
    assert "A [new] card 24 GB, 20 GB free; compute capability 8.9; 25 GB/s to it, 20 GB/s from it" in said
    # 340 MB at 12 GB/s: what the CPU does in that time, 75.5 MFLOP a token at 2 TFLOP/s.
    assert 'gpu_experts="stream": a layer like Qwen3-30B-A3B\'s in int4 on the GPU from 1024 tokens on' in said
    assert "to which 12 GB/s of packed experts are brought" in said


def test_doctor_says_what_computes_without_a_gpu(coterie, monkeypatch):
    monkeypatch.setattr(machine, "gpus", list)
    said = " ".join(coterie("doctor").out.split())
    assert f"computes the CPU: experts and packed layers by the {cpu.info().isa} kernels, the rest by torch" in said


def test_doctor_advises():
    info = cpu.CpuInfo("a CPU", "avx2", "forced", ("avx512", "avx2", "scalar"), 8, 4, 2, "never")
    advice = "\n".join(advise(info, ["transformers>=5"]))
    for word in ("madvise", "COTERIE_ISA", "4 of 8 cores", "NUMA", "transformers>=5"):
        assert word in advice
    best = cpu.CpuInfo("a CPU", "avx512", "best", ("avx512", "avx2", "scalar"), 8, 8, 1, "madvise")
    assert advise(best, []) == []


def test_bench_layer_prints_a_row_for_each_number_of_tokens(coterie):
    free = "E=4,H=64,I=64,K=2"
    ran = coterie("bench", "layer", "--shape", free, "-T", "1,5", "--seconds", "0.01", "--rounds", "1")
    assert ran.code == 0
    assert "│ 1 " in ran.out and "│ 5 " in ran.out


FREE = ("--shape", "E=4,H=64,I=64,K=2", "--rank", "2")
QUICK = ("--seconds", "0.01", "--rounds", "1")


def test_bench_train_layer_prints_both_sides(coterie):
    ran = coterie("bench", "train", "layer", *FREE, "-T", "3,9", *QUICK)
    assert ran.code == 0
    assert "│ 3 " in ran.out and "│ 9 " in ran.out and "peer PEFT" in ran.out


def test_bench_train_lora_prints_what_it_adds(coterie):
    ran = coterie("bench", "train", "lora", *FREE, "-T", "5", *QUICK)
    assert ran.code == 0
    assert "│ 5 " in ran.out and "ExpertLora" in ran.out


def test_bench_train_memory_prints_a_row_for_each_number_of_experts(coterie):
    ran = coterie("bench", "train", "memory", *FREE, "--num-experts", "8", "-T", "5")
    assert ran.code == 0
    assert "│ 8 " in ran.out and "the rest of a step" in ran.out


def test_layer_ranges():
    assert parse_layers("2-4") == [2, 3, 4]
    assert parse_layers("5") == [5]
    for wrong in ("", "a", "3-1", "1-", "-2", "1-2-3"):
        with pytest.raises(ArgumentError, match="--layers"):
            parse_layers(wrong)


def test_numbers_are_written_for_people():
    assert [size(n) for n in (12, 4_096, 1_152_000_000, 2e12)] == ["12 B", "4.1 kB", "1.15 GB", "2 TB"]
    assert [significant(v) for v in (0, 0.01234, 4.567, 78.94, 1234.5)] == ["0", "0.0123", "4.57", "78.9", "1234"]
    assert count(30_532_122_624) == "30.5B" and count(3_614_080) == "3.61M"


def test_sizes_are_read():
    assert memory.parse_bytes("64GB") == 64 * 10**9
    assert memory.parse_bytes("1.5 GiB") == 3 * 2**29
    assert memory.parse_bytes("512") == 512 * 10**9
    for wrong in ("", "GB", "-1GB", "1XB"):
        with pytest.raises(ArgumentError, match="64GB"):
            memory.parse_bytes(wrong)
