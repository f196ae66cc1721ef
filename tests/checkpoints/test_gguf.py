"""Experts read from GGUF files beside what the gguf package's own dequantisation makes of them."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from gguf_models import PARTS, E, H, I, blocks, dense, experts, write_experts, write_gguf

from coterie import Experts, reference
from coterie.activations import Activation
from coterie.checkpoints import open_reader
from coterie.checkpoints.gguf_types import TYPES, widest
from coterie.convert.compare import compare
from coterie.convert.dequantize import dequantize
from coterie.errors import CheckpointError, MissingTensorError, UnsupportedModelError

KEPT = {name for name, kind in TYPES.items() if kind.codes is not None}
# Relative error of what is packed anew.
WORST = {"iq4_nl": 0.07, "q4_0": 0.001}


def errors(opened: Experts, values: dict[str, torch.Tensor]) -> list[float]:
    found = opened.dequantize()
    return [((a - b).norm() / b.norm()).item() for a, b in zip(found, values.values(), strict=True)]


@pytest.mark.parametrize("kind", sorted(TYPES))
@pytest.mark.filterwarnings("ignore:some experts have codes")
def test_every_type(tmp_path, kind):
    file, (_, values) = write_experts(tmp_path / "model.gguf", kind, layers=2)
    opened = Experts.open(file, layer=1)
    spec = TYPES[kind].spec
    assert opened.format == (spec.name if spec else "bf16")
    if kind in KEPT:
        assert errors(opened, values) == [0, 0, 0]
    elif spec is None:
        for found, value in zip(opened.dequantize(), values.values(), strict=True):
            assert torch.equal(found, value.bfloat16().float())
    else:
        assert max(errors(opened, values)) < WORST[opened.format]


def test_the_byte_that_q8_0_does_not_hold(tmp_path):
    """-128, which no quantiser writes, becomes -127."""
    tensors, (values,) = experts(dict.fromkeys(PARTS, "Q8_0"))
    name = "blk.0.ffn_up_exps.weight"
    made = tensors[name][0].copy()
    made[0, 0, 2] = 0x80
    tensors[name] = made, "Q8_0"
    scale = made[0, 0, :2].view(np.float16).astype(np.float32)[0]
    values["up"][0, 0, 0] = -127 * torch.tensor(scale)
    assert errors(Experts.open(write_gguf(tmp_path / "model.gguf", tensors)), values) == [0, 0, 0]


def test_what_is_packed_anew_is_said(tmp_path, recwarn):
    file, _ = write_experts(tmp_path / "kept.gguf", "MXFP4")
    Experts.open(file)
    assert not recwarn
    file, _ = write_experts(tmp_path / "model.gguf", {"gate": "Q4_0", "up": "Q8_0", "down": "Q5_1"})
    with pytest.warns(UserWarning, match=r"\(Q4_0\): they are .* packed anew as q8_0/q5_1, with .* error of 0.00"):
        Experts.open(file)


@pytest.mark.parametrize(
    ("kinds", "formats"),
    [
        (("Q4_K", "Q6_K"), "q4_k/q6_k"),
        (("Q6_K", "Q4_K"), "q6_k/q4_k"),
        (("Q2_K", "Q4_0"), "q2_k/q4_0"),
        (("Q3_K", "Q5_K"), "q3_k/q5_k"),
        (("MXFP4", "BF16"), "mxfp4/bf16"),
        (("IQ4_XS", "Q5_1"), "iq4_xs/q5_1"),
    ],
)
def test_down_in_a_type_of_its_own(tmp_path, recwarn, kinds, formats):
    """Not a bit is lost, opened, saved and opened again; what it computes is what its numbers say."""
    file, (_, values) = write_experts(tmp_path / "model.gguf", dict(zip(PARTS, (kinds[0], *kinds), strict=True)), 2)
    opened = Experts.open(file, layer=1)
    assert opened.format == formats and errors(opened, values) == [0, 0, 0]
    opened.save(tmp_path / "packed", layer=1)
    assert not recwarn
    x, ids, weights = torch.randn(9, H), torch.randint(0, E, (9, 2)), torch.rand(9, 2)
    expected = reference.forward(x, ids, weights, *values.values())
    opened.activations = "bf16"
    assert ((opened(x, ids, weights) - expected).norm() / expected.norm()).item() < 0.01
    for mmap in (False, True):
        again = Experts.open(tmp_path / "packed", layer=1, mmap=mmap, activations="bf16")
        assert again.formats == opened.formats and errors(again, values) == [0, 0, 0]
        assert torch.equal(again(x, ids, weights), opened(x, ids, weights))


def test_gate_and_up_have_the_wider_of_their_formats(tmp_path):
    file, (values,) = write_experts(tmp_path / "model.gguf", {"gate": "MXFP4", "up": "Q6_K", "down": "Q4_0"})
    with pytest.warns(UserWarning, match=r"\(MXFP4\)"):
        opened = Experts.open(file)
    assert opened.format == "q6_k/q4_0"
    repacked, *kept = errors(opened, values)
    assert kept == [0, 0] and 0 < repacked < 0.03
    file, _ = write_experts(tmp_path / "plain.gguf", {"gate": "MXFP4", "up": "BF16", "down": "IQ2_S"})
    with pytest.warns(UserWarning, match=r"\(MXFP4, IQ2_S\)"):
        assert Experts.open(file).format == "bf16/iq4_nl"


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (("BF16", "F32"), None),
        (("Q4_0", "Q4_0"), "q4_0"),
        (("IQ3_S", "IQ4_XS"), "iq4_xs"),
        (("TQ1_0", "Q2_K"), "q4_0"),
        (("TQ1_0", "Q4_K"), "q4_k"),
        (("IQ3_S", "Q3_K"), "iq4_nl"),
        (("Q3_K", "Q4_K"), "q6_k"),
        (("Q2_K", "Q4_K"), "q6_k"),
        (("IQ2_XXS", "MXFP4"), "mxfp4"),
        (("IQ4_XS", "IQ4_NL"), "q6_k"),
        (("Q4_0", "IQ4_NL"), "q6_k"),
        (("MXFP4", "Q4_0"), "q6_k"),
        (("Q4_K", "Q5_K"), "q6_k"),
        (("Q5_K", "IQ2_XXS"), "q5_k"),
        (("IQ2_XXS", "Q4_K"), "q4_k"),
        (("Q4_K", "Q6_K"), "q6_k"),
        (("IQ4_NL", "Q6_K"), "q6_k"),
        (("Q4_K", "Q8_0"), "q8_0"),
        (("Q4_0", "Q8_0"), "q8_0"),
        (("Q8_0", "BF16"), "bf16"),
    ],
)
def test_one_format_for_several_types(kinds, expected):
    for order in (kinds, kinds[::-1]):
        spec = widest([TYPES[kind] for kind in order])
        assert (spec and spec.name) == expected


def test_layers_have_formats_of_their_own(tmp_path):
    tensors, _ = experts(dict.fromkeys(PARTS, "MXFP4"))
    more, _ = experts(dict.fromkeys(PARTS, "Q6_K"))
    tensors |= {name.replace("blk.0", "blk.1"): made for name, made in more.items()}
    reader = open_reader(write_gguf(tmp_path / "model.gguf", tensors, {"block_count": 2}))
    assert reader.layers == (0, 1)
    assert [reader.layer(n).formats.name for n in reader.layers] == ["mxfp4", "q6_k"]


def test_gate_and_up_in_one(tmp_path):
    tensors, (values,) = experts(dict.fromkeys(PARTS, "MXFP4"))
    gate, up = (tensors.pop(f"blk.0.ffn_{part}_exps.weight")[0] for part in ("gate", "up"))
    tensors["blk.0.ffn_gate_up_exps.weight"] = np.concatenate([gate, up], 1), "MXFP4"
    assert errors(Experts.open(write_gguf(tmp_path / "model.gguf", tensors)), values) == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:some experts have codes")
@pytest.mark.parametrize("kind", ["NVFP4", "MXFP4", "BF16"])
def test_scales_of_experts_are_multiplied(tmp_path, kind):
    tensors, (values,) = experts(dict.fromkeys(PARTS, kind))
    for number, part in enumerate(PARTS):
        scale = np.linspace(0.5, 2, E, dtype=np.float32) * 2.0**number
        tensors[f"blk.0.ffn_{part}_exps.scale"] = scale.astype(np.float32), "F32"
        values[part] = values[part] * torch.from_numpy(scale)[:, None, None]
    opened = Experts.open(write_gguf(tmp_path / "model.gguf", tensors))
    limit = {"NVFP4": 1e-6, "MXFP4": 0.1, "BF16": 0.004}[kind]
    assert max(errors(opened, values)) < limit


@pytest.mark.filterwarnings("ignore:some experts have codes")
@pytest.mark.parametrize("kind", ["NVFP4", "MXFP4", "Q4_K", "BF16"])
def test_scales_of_a_router_are_not_multiplied(tmp_path, kind):
    """Gemma 4's files have what its router's weights are multiplied by where others have scales of experts."""
    tensors, (values,) = experts(dict.fromkeys(PARTS, kind))
    tensors["blk.0.ffn_gate_up_exps.weight"] = (
        np.concatenate([tensors.pop(f"blk.0.ffn_{part}_exps.weight")[0] for part in ("gate", "up")], 1), kind
    )  # fmt: skip
    for name, scale in (("gate_up", 0.25), ("down", 3.0)):
        tensors[f"blk.0.ffn_{name}_exps.scale"] = np.full(E, scale, np.float32), "F32"
    both = {"NVFP4": 1e-6, "MXFP4": 0, "Q4_K": 0.1, "BF16": 0}[kind]
    opened = Experts.open(write_gguf(tmp_path / "model.gguf", tensors, arch="gemma4"))
    assert opened.activation == Activation("gelu_tanh")
    gate, up, down = errors(opened, values | {part: values[part] * 0.25 for part in ("gate", "up")})
    assert down <= (1e-6 if kind == "NVFP4" else 0) and max(gate, up) <= both


def test_biases_and_activation_of_gpt_oss(tmp_path):
    tensors, _ = experts(dict.fromkeys(PARTS, "MXFP4"))
    random = np.random.default_rng(1)
    biases = {part: random.standard_normal((E, rows), np.float32) for part, (rows, _) in PARTS.items()}
    tensors |= {f"blk.0.ffn_{part}_exps.bias": (bias, "F32") for part, bias in biases.items()}
    opened = Experts.open(write_gguf(tmp_path / "model.gguf", tensors, arch="gpt-oss"))
    assert opened.activation == Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0)
    for part, bias in opened.biases().items():
        assert torch.equal(bias, torch.from_numpy(biases[part]))


def test_what_a_model_sees_with_is_not_the_model(tmp_path):
    write_experts(tmp_path / "model-00001-of-00001.gguf", "MXFP4")
    tensors = {"v.patch_embd.weight": (np.ones(4, np.float32), "F32")}
    seeing = write_gguf(tmp_path / "mmproj-F16.gguf", tensors, arch="clip")
    assert Experts.open(tmp_path).format == "mxfp4"
    with pytest.raises(UnsupportedModelError, match=r"mmproj-F16.gguf is what a model sees or hears with"):
        Experts.open(seeing)
    (tmp_path / "model-00001-of-00001.gguf").unlink()
    with pytest.raises(UnsupportedModelError, match=r"F16.gguf is what a model sees or hears with"):
        Experts.open(tmp_path)


def test_draft_layers_are_left_out(tmp_path):
    tensors, _ = experts(dict.fromkeys(PARTS, "MXFP4"), layers=2)
    file = write_gguf(tmp_path / "model.gguf", tensors, {"block_count": 2, "nextn_predict_layers": 1})
    assert open_reader(file).layers == (0,)


def test_a_model_in_several_files(tmp_path):
    tensors, (values,) = experts(dict.fromkeys(PARTS, "MXFP4"))
    files = [tmp_path / f"model-0000{n + 1}-of-00002.gguf" for n in range(2)]
    for n, file in enumerate(files):
        metadata = {"block_count": 1} if n == 0 else {}
        write_gguf(file, {name: tensors[name] for name in list(tensors)[n::2]}, {"split.tensors.count": 3} | metadata)
    for file in files:
        assert errors(Experts.open(file), values) == [0, 0, 0]
    files[0].rename(tmp_path / "elsewhere.gguf")
    with pytest.raises(CheckpointError, match=r"1 of the 2 files of this model are missing: model-00001-of-00002.gguf"):
        Experts.open(files[1])
    with pytest.raises(CheckpointError, match="2 tensors, the metadata says 3"):
        Experts.open(tmp_path / "elsewhere.gguf")


def test_reading_lets_go_of_memory(tmp_path):
    file, (values,) = write_experts(tmp_path / "model.gguf", "BF16")
    layer = open_reader(file).layer(0)
    before = layer.expert(1)
    layer.release(1)
    for part, weight in layer.expert(1).items():
        assert torch.equal(weight, before[part])
        assert torch.equal(weight.float(), values[part][1])


def test_experts_without_a_gate(tmp_path):
    tensors, (values,) = experts({"gate": "Q4_K", "up": "Q4_K", "down": "Q6_K"})
    with pytest.raises(CheckpointError, match=r"ffn_gate_exps\.weight': this version does not know what it is"):
        Experts.open(write_gguf(tmp_path / "gate.gguf", tensors, arch="nemotron_h_moe"))
    del tensors["blk.0.ffn_gate_exps.weight"], values["gate"]
    opened = Experts.open(write_gguf(tmp_path / "model.gguf", tensors, arch="nemotron_h_moe"))
    assert opened.format == "q4_k/q6_k" and opened.activation == Activation("relu2") and not opened.has_gate
    gate, *kept = opened.dequantize()
    assert gate is None and all(torch.equal(a, b) for a, b in zip(kept, values.values(), strict=True))


@pytest.mark.parametrize("length", [3, 4, 100, -1000])
def test_a_file_that_was_cut(tmp_path, length):
    file, _ = write_experts(tmp_path / "model.gguf", "MXFP4")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="model"):
        Experts.open(file)


def test_what_is_missing(tmp_path):
    tensors, _ = experts(dict.fromkeys(PARTS, "MXFP4"))
    with pytest.raises(MissingTensorError, match="no experts found; the names tried: blk"):
        Experts.open(write_gguf(tmp_path / "none.gguf", {"output.weight": (blocks("F32", (4, 64)), "F32")}))
    with pytest.raises(CheckpointError, match="no experts in layer 3; layers with experts: 0"):
        Experts.open(write_gguf(tmp_path / "model.gguf", tensors), layer=3)
    del tensors["blk.0.ffn_up_exps.weight"]
    with pytest.raises(MissingTensorError, match=r"no tensor blk.0.ffn_up_exps.weight; the names tried: blk.0.ffn_ga"):
        Experts.open(write_gguf(tmp_path / "part.gguf", tensors))


def test_what_does_not_fit(tmp_path):
    tensors, _ = experts(dict.fromkeys(PARTS, "MXFP4"))
    with pytest.raises(CheckpointError, match="3 experts, the metadata says 4"):
        Experts.open(write_gguf(tmp_path / "count.gguf", tensors, {"expert_count": 4}))
    with pytest.raises(UnsupportedModelError, match="architecture 'grok': this version does not know"):
        Experts.open(write_gguf(tmp_path / "grok.gguf", tensors, arch="grok"))
    bias = np.zeros((E, I), np.float32), "F32"
    with pytest.raises(CheckpointError, match="biases of up alone"):
        Experts.open(write_gguf(tmp_path / "bias.gguf", tensors | {"blk.0.ffn_up_exps.bias": bias}))
    with pytest.raises(CheckpointError, match="does not know what it is to experts"):
        Experts.open(write_gguf(tmp_path / "more.gguf", tensors | {"blk.0.ffn_up_exps.offset": bias}))
    tensors["blk.0.ffn_down_exps.weight"] = blocks("MXFP4", (E, H, H)), "MXFP4"
    with pytest.raises(CheckpointError, match=r"shape \[3, 256, 256\], expected \[3, 256, 512\]"):
        Experts.open(write_gguf(tmp_path / "shape.gguf", tensors))
    numbers = np.zeros((E, I, H), np.int32)
    with pytest.raises(CheckpointError, match="type I32, this version reads F32"):
        Experts.open(write_gguf(tmp_path / "type.gguf", tensors | {"blk.0.ffn_up_exps.weight": (numbers, "I32")}))


def test_without_the_package(tmp_path, monkeypatch):
    file, _ = write_experts(tmp_path / "model.gguf", "MXFP4")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=r"needs the gguf package: pip install 'coterie\[gguf\]'"):
        Experts.open(file)


def test_where_a_folder_is_expected(tmp_path):
    file, _ = write_experts(tmp_path / "model.gguf", "MXFP4")
    for call in (compare, dequantize):
        with pytest.raises(CheckpointError, match="is a GGUF file: expected a checkpoint folder"):
            call(file, tmp_path / "other")


def test_blocks_are_what_the_package_says():
    """The truth of these tests is not always zero."""
    for kind in TYPES:
        values = dense(blocks(kind, (4, 256)), kind)
        assert values.isfinite().all() and values.std() > 1e-5, kind
