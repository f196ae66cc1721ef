"""Converting a checkpoint: what comes out is whole and exact; what fails says why, and leaves nothing half-done."""

import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from made_checkpoints import CONFIG, E, H, I, fused, random_experts, separate, two_layers, write_checkpoint
from safetensors.torch import load_file, save_file

import coterie
from coterie import Experts
from coterie.checkpoints.folder import PACKED_INDEX
from coterie.checkpoints.packed import UNFINISHED
from coterie.convert import convert_cpu
from coterie.convert import rest as rest_of_checkpoint
from coterie.convert import tensors as tensors_of_checkpoint
from coterie.errors import ArgumentError, CheckpointError, CoterieError, MissingTensorError
from coterie.formats import resolve

EXPERT_BYTES = 3 * H * I * 2


def all_tensors(folder):
    return {name: t for file in folder.glob("model*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"quant_method": "bf16"},
        {"quant_method": "int8"},
        {"quant_method": "int4", "group_size": 32, "zero_point": True},
    ],
    ids=str,
)
def test_experts_are_packed_as_ever(tmp_path, dtype, options):
    folder, layers = two_layers(tmp_path / "in", dtype, shards=3)
    convert_cpu(folder, tmp_path / "out", **options)
    packing = {"format" if name == "quant_method" else name: value for name, value in options.items()}
    for number, weights in enumerate(layers):
        expected = Experts.pack(**weights, **packing)
        opened = Experts.open(tmp_path / "out", number)
        assert opened.spec == expected.spec
        assert all(torch.equal(opened.packed(e), expected.packed(e)) for e in range(expected.num_experts))


def test_the_rest_is_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(rest_of_checkpoint, "SHARD_BYTES", 7000)
    monkeypatch.setattr(tensors_of_checkpoint, "CHUNK", 1000)
    folder, _ = two_layers(tmp_path / "in", shards=2)
    draft = {"mtp.layers.0.mlp.experts.0.up_proj.weight": torch.randn(I, H), "empty": torch.zeros(0, 4)}
    save_file(draft, folder / "model-00003.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] |= dict.fromkeys(draft, "model-00003.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("chat_template.jinja", "modeling_x.py", "LICENSE", "additional/templates/a.jinja"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (".gitattributes", ".cache/x", "pytorch_model.bin", "original/consolidated.pth"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    report = convert_cpu(folder, tmp_path / "out")
    out = tmp_path / "out"
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    shards = {name for name in files if name.startswith("model-")}
    assert shards == {f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))}
    assert len(shards) > 2
    experts = {"experts-00000.safetensors", "experts-00001.safetensors"}
    copied = {"tokenizer.json", "chat_template.jinja", "modeling_x.py", "LICENSE", "additional/templates/a.jinja"}
    assert files == copied | shards | experts | {"config.json", PACKED_INDEX}
    assert all((out / name).read_text() == (folder / name).read_text() for name in copied)

    before, after = all_tensors(folder), all_tensors(out)
    kept = {name for name in before if not name.startswith("model.layers.") or ".experts." not in name}
    assert {"mtp.layers.0.mlp.experts.0.up_proj.weight", "empty"} <= kept
    assert after.keys() == kept
    assert all(before[name].dtype == after[name].dtype and torch.equal(before[name], after[name]) for name in kept)

    index = json.loads((out / PACKED_INDEX).read_text())
    for shard in shards | experts:
        assert set(load_file(out / shard)) == {name for name, where in index["weight_map"].items() if where == shard}
    assert index["metadata"]["total_size"] == report.packed_bytes + report.rest_bytes
    assert report.rest_bytes == sum(t.nbytes for t in after.values())


def test_config_says_what_the_loader_reads(tmp_path):
    folder, _ = two_layers(tmp_path / "in")
    convert_cpu(folder, tmp_path / "out", "int4", group_size=32, zero_point=True)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    expected = coterie.CoterieConfig(experts="int4", group_size=32, zero_point=True).to_dict()
    assert written.pop("quantization_config") == expected
    assert written == CONFIG


def test_report(tmp_path):
    folder, layers = two_layers(tmp_path / "in")
    seen = []
    report = convert_cpu(folder, tmp_path / "out", "int8", progress=lambda *step: seen.append(step))
    assert seen == [
        (layer, 2, expert, E, ((layer - 1) * E + expert) * EXPERT_BYTES, 2 * E * EXPERT_BYTES)
        for layer in (1, 2)
        for expert in (1, 2, 3)
    ]
    assert (report.read_bytes, report.resumed) == (2 * E * EXPERT_BYTES, ())
    assert (report.formats.spec, report.layers) == (resolve("int8"), (0, 1))
    assert report.source_bytes == 2 * E * EXPERT_BYTES
    assert report.packed_bytes == sum(Experts.open(tmp_path / "out", layer).nbytes for layer in (0, 1))
    assert report.seconds > 0
    errors = {}
    for number, weights in enumerate(layers):
        for projection, packed in zip(weights, Experts.open(tmp_path / "out", number).dequantize(), strict=True):
            for expert in range(E):
                a, b = weights[projection][expert].float(), packed[expert]
                errors.setdefault(projection, {})[number, expert] = float((a - b).norm() / a.norm())
    for projection, by_matrix in errors.items():
        found = report.errors[projection]
        assert found.matrices == 6
        assert found.mean == pytest.approx(sum(by_matrix.values()) / 6, rel=1e-4)
        assert found.worst == pytest.approx(max(by_matrix.values()), rel=1e-4)
        assert (found.worst_layer, found.worst_expert) == max(by_matrix, key=by_matrix.get)


def test_errors_of_zeros_and_of_what_fits_exactly(tmp_path):
    weights = {part: torch.zeros_like(w) for part, w in random_experts(0).items()}
    folder = write_checkpoint(tmp_path / "in", separate("model.layers.0.mlp.experts", weights))
    assert convert_cpu(folder, tmp_path / "out", "int4").errors["down"].worst == 0.0
    folder, _ = two_layers(tmp_path / "bf16")
    assert convert_cpu(folder, tmp_path / "out2", "bf16").errors["down"].worst == 0.0


def test_some_layers_are_loose_files(tmp_path):
    folder, _ = two_layers(tmp_path / "in")
    report = convert_cpu(folder, tmp_path / "out", layers=[1, 1])
    assert report.layers == (1,)
    assert os.listdir(tmp_path / "out") == ["experts-00001.safetensors"]
    convert_cpu(folder, tmp_path / "whole")
    for name in os.listdir(tmp_path / "out"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_biases_and_activation(tmp_path):
    stem = "model.layers.0.mlp.experts"
    tensors = fused(stem, random_experts(0), transposed=True, interleaved=True)
    tensors |= {f"{stem}.gate_up_proj_bias": torch.randn(E, 2 * I), f"{stem}.down_proj_bias": torch.randn(E, H)}
    folder = write_checkpoint(tmp_path / "in", tensors, CONFIG | {"model_type": "gpt_oss", "num_hidden_layers": 1})
    convert_cpu(folder, tmp_path / "out", "int8")
    a, b = Experts.open(folder), Experts.open(tmp_path / "out")
    assert a.activation == b.activation != coterie.Activation()
    assert all(torch.equal(a.biases()[part], b.biases()[part]) for part in ("gate", "up", "down"))


def test_threads_are_set_for_the_time_being(tmp_path):
    folder, _ = two_layers(tmp_path / "in")
    before, during = coterie.cpu.threads(), []
    convert_cpu(folder, tmp_path / "out", threads=3, progress=lambda *_: during.append(coterie.cpu.threads()))
    assert set(during) == {3} and coterie.cpu.threads() == before
    convert_cpu(folder, tmp_path / "again", threads=1)
    for name in ("experts-00000.safetensors", "experts-00001.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_transformers_loads_it(tmp_path, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 32, "head_dim": 16, "vocab_size": 60}
    counts = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **sizes, **counts, num_experts=4, num_local_experts=4, pad_token_id=0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "in")
    convert_cpu(tmp_path / "in", tmp_path / "out", "int4")
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        expected = coterie.from_pretrained(tmp_path / "in", experts="int4")(ids).logits
        for mmap in (False, True):
            assert torch.equal(coterie.from_pretrained(tmp_path / "out", mmap=mmap)(ids).logits, expected)


def refuse(source, output, message, error=CheckpointError, **options):
    """The conversion is refused, and leaves `output` as it was."""
    before = sorted(os.listdir(output)) if output.is_dir() else output.exists()
    with pytest.raises(error, match=message):
        convert_cpu(source, output, **options)
    assert before == (sorted(os.listdir(output)) if output.is_dir() else output.exists())


def test_options(tmp_path):
    folder, _ = two_layers(tmp_path / "in")
    out = tmp_path / "out"
    refuse(folder, out, "unknown format 'int3'", ArgumentError, quant_method="int3")
    refuse(folder, out, "group_size of int4: expected", ArgumentError, group_size=48)
    refuse(folder, out, "down: 32 columns are not a multiple of group_size=64", ArgumentError, group_size=64)
    refuse(folder, out, "zero_point is an option of int4", ArgumentError, quant_method="int8", zero_point=True)
    refuse(folder, out, "threads: expected", ArgumentError, threads=0)
    refuse(folder, out, "layer 7 has no experts; layers with experts: 0-1", ArgumentError, layers=[0, 7])
    refuse(folder, out, "no layers were asked for", ArgumentError, layers=[])


def test_sources(tmp_path):
    folder, _ = two_layers(tmp_path / "in", shards=2)
    out = tmp_path / "out"
    refuse(tmp_path / "missing", out, "missing does not exist")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", out, "holds no checkpoint")

    no_config = shutil.copytree(folder, tmp_path / "no config")
    (no_config / "config.json").unlink()
    refuse(no_config, out, "is not a model folder: it has no config.json")

    no_experts = write_checkpoint(tmp_path / "dense", {"model.layers.0.mlp.up_proj.weight": torch.zeros(2, 2)})
    refuse(no_experts, out, "no experts found; the names tried", MissingTensorError)

    missing = shutil.copytree(folder, tmp_path / "missing shard")
    (missing / "model-00001-of-00002.safetensors").unlink()
    refuse(missing, out, "1 of the 2 shards")

    convert_cpu(folder, tmp_path / "packed")
    refuse(tmp_path / "packed", out, "is packed already", ArgumentError)


def test_a_broken_shard_without_experts(tmp_path):
    folder, _ = two_layers(tmp_path / "in")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    last = {"lm_head.weight": tensors.pop("lm_head.weight")}
    save_file(tensors, folder / "a.safetensors")
    save_file(last, folder / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | dict.fromkeys(last, "b.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "b.safetensors").write_bytes((folder / "b.safetensors").read_bytes()[:-1])
    refuse(folder, tmp_path / "out", "b.safetensors is truncated in tensor 'lm_head.weight'")


def test_weights_that_no_format_holds(tmp_path):
    weights = random_experts(0)
    weights["up"][1, 3, 5] = float("nan")
    folder = write_checkpoint(tmp_path / "in", separate("model.layers.0.mlp.experts", weights))
    refuse(folder, tmp_path / "out", "layer 0, expert 1, up: .*NaN or Inf")
    (tmp_path / "out").mkdir()
    refuse(folder, tmp_path / "out", "layer 0, expert 1, up: .*NaN or Inf")
    assert torch.isnan(torch.cat([w.flatten() for w in dequantized(folder, tmp_path / "bf16")])).sum() == 1


def dequantized(folder, output):
    convert_cpu(folder, output, "bf16")
    return Experts.open(output).dequantize()


def test_outputs(tmp_path):
    folder, _ = two_layers(tmp_path / "in")
    refuse(folder, folder, "is not empty", ArgumentError)
    file = tmp_path / "file"
    file.touch()
    refuse(folder, file, "is a file, expected a new or empty folder", ArgumentError)
    refuse(folder, file / "out", "cannot write .*Not a directory")
    refuse(folder, Path("/proc/nowhere/out"), "cannot write /proc/nowhere/out: No such file")
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes.txt").touch()
    refuse(folder, used, r"is not empty \(it holds notes.txt\)", ArgumentError)
    (used / "notes.txt").rename(used / UNFINISHED)
    refuse(folder, used, "holds an unfinished conversion: go on with --resume, delete it", ArgumentError)
    (used / UNFINISHED).write_text("{}")
    refuse(folder, used, "does not say what is unfinished: delete .*used and begin again", ArgumentError, resume=True)


def test_read_only_output(tmp_path, monkeypatch):
    folder, _ = two_layers(tmp_path / "in")
    out = tmp_path / "out"
    out.mkdir()
    real = os.open

    def read_only(path, flags, *rest, **more):
        if flags & os.O_CREAT and Path(path).parent == out:
            raise OSError(30, "Read-only file system")
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    refuse(folder, out, "cannot write .*Read-only file system.*choose an output that can be written")


def test_too_small_a_disk(tmp_path, monkeypatch):
    folder, _ = two_layers(tmp_path / "in")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    refuse(folder, tmp_path / "out", r"not enough space for .*out: it takes 0\.\d MB beside what .* 0.0 MB are free")


@pytest.mark.parametrize("limit", [2_000, 20_000], ids=["at an experts file", "later"])
def test_a_disk_that_fills_up(tmp_path, limit):
    """A limit on the size of one file stands in for a full disk: the system refuses the write all the same."""
    folder, _ = two_layers(tmp_path / "in")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        refuse(
            folder,
            tmp_path / "out",
            "cannot write .*File too large.*free some space",
            CoterieError,
            quant_method="int8",
        )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_interrupted(tmp_path, existing):
    folder, _ = two_layers(tmp_path / "in")
    out = tmp_path / "out"
    if existing:
        out.mkdir()

    def interrupt(layer, layers, expert, *_):
        assert (out / UNFINISHED).exists()
        if (layer, expert) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_cpu(folder, out, progress=interrupt)
    assert out.exists() == existing and not (existing and os.listdir(out))
