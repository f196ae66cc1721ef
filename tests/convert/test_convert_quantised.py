"""Quantised checkpoints: codes and scales are kept to the last bit, or dequantised and packed anew."""

import dataclasses
import json
from functools import partial

import pytest
import quantised_checkpoints
import torch
from made_checkpoints import CONFIG, write_checkpoint
from quantised_checkpoints import (
    ATTENTION,
    FINER,
    GPTQ,
    METHODS,
    STEM,
    E,
    auto_round,
    awq,
    gpt_oss,
    gptq,
    int4,
    quantised,
    quantised_as,
    stacks,
)
from safetensors.torch import load_file

from coterie import Experts
from coterie.checkpoints.folder import PACKED_INDEX
from coterie.convert import convert_cpu
from coterie.errors import CheckpointError
from coterie.formats import resolve

BLOCKS = "fp8 by blocks"


def made(folder, method):
    tensors, config, dense = quantised(method)
    return write_checkpoint(folder, tensors, config, shards=2), dense


def tolerance(method):
    """compressed-tensors divides by the matrix's scale; its reciprocal is rounded to float32 to be stored."""
    return 2**-22 if method == "compressed-tensors nvfp4" else 0


def assert_same(found, expected, method):
    rtol = 2**-8 if method in FINER else tolerance(method)
    if "int8" in method or "8 bits" in method:
        rtol += 2**-7  # -127 for -128
    for part, weights in zip(expected, found, strict=True):
        torch.testing.assert_close(weights, expected[part], rtol=rtol, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_codes_are_kept(tmp_path, method):
    folder, dense = made(tmp_path / "in", method)
    spec = METHODS[method][2]
    report = convert_cpu(folder, tmp_path / "out")
    assert report.formats.spec == spec
    assert report.kept and report.repacked == 0
    for layer in range(2):
        converted, opened = Experts.open(tmp_path / "out", layer), Experts.open(folder, layer)
        assert converted.spec == opened.spec == spec
        assert all(torch.equal(converted.packed(e), opened.packed(e)) for e in range(E))
        assert_same(opened.dequantize(), stacks(dense, layer), method)
    if method not in FINER:
        assert all(error.worst == 0 for error in report.errors.values())


@pytest.mark.parametrize("method", sorted(FINER))
def test_what_rounding_costs_is_told(tmp_path, method):
    folder, dense = made(tmp_path / "in", method)
    report = convert_cpu(folder, tmp_path / "out")
    for part, error in report.errors.items():
        costs = []
        for layer in range(2):
            expected = stacks(dense, layer)
            found = dict(zip(expected, Experts.open(tmp_path / "out", layer).dequantize(), strict=True))
            costs += [((f - w).norm() / w.norm()).item() for f, w in zip(found[part], expected[part], strict=True)]
        assert 2e-4 < error.worst < 4e-3
        assert error.worst == pytest.approx(max(costs), rel=1e-3)
        assert error.mean == pytest.approx(sum(costs) / len(costs), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_another_format_is_packed_anew(tmp_path, method):
    folder, dense = made(tmp_path / "in", method)
    report = convert_cpu(folder, tmp_path / "out", "int8", group_size=64)
    expected = Experts.pack(**stacks(dense, 1), format="int8", group_size=64)
    found = Experts.open(tmp_path / "out", 1)
    assert found.spec == expected.spec and report.kept == (METHODS[method][2] == expected.spec)
    if tolerance(method) == 0 and not report.kept:
        assert all(torch.equal(found.packed(e), expected.packed(e)) for e in range(E))
    assert all(0 < error.worst < 0.02 for error in report.errors.values())


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("method", METHODS)
def test_the_rest_is_dequantised(tmp_path, method, dtype):
    tensors, config, dense = quantised(method)
    config |= {"torch_dtype": dtype} if dtype else {}
    folder = write_checkpoint(tmp_path / "in", tensors, config, shards=2)
    (folder / "hf_quant_config.json").write_text("{}")
    report = convert_cpu(folder, tmp_path / "out")
    found = {k: v for file in (tmp_path / "out").glob("model-*.safetensors") for k, v in load_file(file).items()}
    kept = {name for name in tensors if ".experts." not in name and not name.startswith(ATTENTION)}
    assert found.keys() == kept | {f"{ATTENTION}.weight", f"{ATTENTION}.bias"}
    assert all(torch.equal(found[name], tensors[name]) for name in [*kept, f"{ATTENTION}.bias"])
    expected = dense[ATTENTION].to(torch.float32 if dtype else torch.bfloat16)
    torch.testing.assert_close(found[f"{ATTENTION}.weight"], expected, rtol=max(tolerance(method), 0), atol=0)
    assert report.rest_bytes == sum(tensor.nbytes for tensor in found.values())
    index = json.loads((tmp_path / "out" / PACKED_INDEX).read_text())
    assert {name for name in index["weight_map"] if "ffn_exps" not in name} == found.keys()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["quant_method"] == "coterie"
    assert written == {key: value for key, value in config.items() if key != "quantization_config"}
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()


@pytest.mark.parametrize(
    ("method", "make"),
    [
        ("GPTQ", gptq),
        ("GPTQ, 8 bits", partial(gptq, bits=8)),
        ("AWQ", awq),
        ("AutoRound as GPTQ", auto_round),
        ("compressed-tensors int4", int4),
    ],
)
def test_groups_of_128(tmp_path, monkeypatch, method, make):
    monkeypatch.setattr(quantised_checkpoints, "I", 384)
    tensors, config, dense = quantised_as(partial(make, group=128), METHODS[method][1])
    report = convert_cpu(write_checkpoint(tmp_path / "in", tensors, config), tmp_path / "out")
    assert report.kept and report.formats.spec == dataclasses.replace(METHODS[method][2], group_size=128)
    assert_same(Experts.open(tmp_path / "out").dequantize(), stacks(dense, 0), method)


NOT_HELD = {
    "act-order": (partial(gptq, scattered=True), GPTQ, resolve("int4", 64)),
    "act-order, zero points": (partial(gptq, scattered=True, symmetric=False), GPTQ, resolve("int4", 64, True)),
    "8 bits, zero points": (partial(gptq, bits=8, symmetric=False), GPTQ, resolve("int8", 64)),
}


@pytest.mark.parametrize("case", NOT_HELD)
def test_codes_that_no_format_holds(tmp_path, case):
    """They are dequantised and packed anew as the same bits and groups."""
    make, config, spec = NOT_HELD[case]
    tensors, config, dense = quantised_as(make, config)
    folder = write_checkpoint(tmp_path / "in", tensors, config)
    report = convert_cpu(folder, tmp_path / "out")
    assert report.formats.spec == spec
    assert report.repacked == 2 * 3 * E and not report.kept
    for layer in range(2):
        with pytest.warns(UserWarning, match="codes that no format holds .* packed anew"):
            opened = Experts.open(folder, layer)
        expected = Experts.pack(**stacks(dense, layer), format=spec.name, group_size=64, zero_point=spec.zero_point)
        for e in range(E):
            assert torch.equal(opened.packed(e), expected.packed(e))
            assert torch.equal(Experts.open(tmp_path / "out", layer).packed(e), expected.packed(e))
    written = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    assert torch.equal(written[f"{ATTENTION}.weight"], dense[ATTENTION].bfloat16())


def test_zero_points_of_one_matrix(tmp_path):
    """Then all matrices of the layer have them; the next layer has none."""
    tensors, config, dense = quantised("AWQ, symmetric")
    other, _, values = quantised("AWQ")
    base = f"{STEM.format(0)}.1.up_proj"
    tensors |= {name: tensor for name, tensor in other.items() if name.startswith(base)}
    dense[base] = values[base]
    folder = write_checkpoint(tmp_path / "in", tensors, config)
    for layer, zero_point in enumerate((True, False)):
        experts = Experts.open(folder, layer)
        assert experts.spec == resolve("int4", 64, zero_point)
        assert_same(experts.dequantize(), stacks(dense, layer), "AWQ")


def test_only_modelopts_file_says_it(tmp_path):
    tensors, _, dense = quantised("ModelOpt nvfp4")
    folder = write_checkpoint(tmp_path / "in", tensors)
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    convert_cpu(folder, tmp_path / "out")
    assert_same(Experts.open(tmp_path / "out").dequantize(), stacks(dense, 0), "")


def test_a_matrix_larger_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("coterie.convert.tensors.CHUNK", 1 << 10)  # 128 rows at a time
    folder, dense = made(tmp_path / "in", BLOCKS)
    convert_cpu(folder, tmp_path / "out")
    found = {k: v for file in (tmp_path / "out").glob("model-*.safetensors") for k, v in load_file(file).items()}
    assert torch.equal(found[f"{ATTENTION}.weight"], dense[ATTENTION].bfloat16())


def test_config_of_multimodal_models(tmp_path):
    tensors, config, _ = quantised(BLOCKS)
    folder = write_checkpoint(tmp_path / "in", tensors, {"text_config": config, "model_type": "x"})
    convert_cpu(folder, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written.pop("quantization_config")["experts"] == "fp8_block"
    assert written == {"text_config": CONFIG, "model_type": "x"}


def test_layers_of_two_formats(tmp_path):
    """Kept in both; where one is asked for, in the layer that has it, and packed anew in the other."""
    first, config, dense = quantised("compressed-tensors fp8 by rows")
    second, _, other = quantised("compressed-tensors nvfp4")
    tensors = {k: v for k, v in first.items() if ".layers.1." not in k}
    tensors |= {k: v for k, v in second.items() if ".layers.1." in k}
    folder = write_checkpoint(tmp_path / "in", tensors, config)
    report = convert_cpu(folder, tmp_path / "kept")
    assert report.kept and report.formats.described == "fp8_channel (layer 0); nvfp4 in groups of 16 (layer 1)"
    for layer, values in enumerate((dense, other)):
        found = Experts.open(tmp_path / "kept", layer).dequantize()
        assert_same(found, stacks(values, layer), "compressed-tensors nvfp4")
    convert_cpu(folder, tmp_path / "out", "fp8_channel")
    assert_same(Experts.open(tmp_path / "out", 0).dequantize(), stacks(dense, 0), "")
    expected = Experts.open(folder, 1).dequantize()
    assert Experts.open(folder, 1).format == "nvfp4"
    for found, weights in zip(Experts.open(tmp_path / "out", 1).dequantize(), expected, strict=True):
        assert 0 < (found - weights).norm() / weights.norm() < 0.05


REFUSED = {
    "a block of another size": (
        BLOCKS,
        lambda tensors, config: config["quantization_config"].update(weight_block_size=[64, 64]),
        r"quantised by fp8 with weight_block_size \[64, 64\], which this version does not read",
    ),
    "rotated weights": (
        "compressed-tensors fp8 by rows",
        lambda tensors, config: config["quantization_config"].update(transform_config={"config_groups": {"u": 1}}),
        "quantised by compressed-tensors with transform_config",
    ),
    "sparse weights": (
        "compressed-tensors fp8 by rows",
        lambda tensors, config: config["quantization_config"].update(sparsity_config={"format": "sparse-24-bitmask"}),
        "quantised by compressed-tensors with sparsity_config",
    ),
    "a scale too few": (
        BLOCKS,
        lambda tensors, config: tensors.update({f"{EXPERT}.weight_scale_inv": torch.ones(2, 1)}),
        r"model-0000\d.*, tensor '.*0.down_proj.weight_scale_inv': shape \[2, 1\], expected \[2, 2\]",
    ),
    "no scale": (
        BLOCKS,
        lambda tensors, config: tensors.pop("model.layers.1.mlp.experts.2.down_proj.weight_scale_inv"),
        "no tensor 'model.layers.1.mlp.experts.2.down_proj.weight_scale_inv'",
    ),
    "a scale of NaN": (
        BLOCKS,
        lambda tensors, config: tensors[f"{EXPERT}.weight_scale_inv"].fill_(torch.nan),
        "tensor '.*0.down_proj.weight_scale_inv': expected scales of which weights are finite",
    ),
    "a global scale of 0": (
        "compressed-tensors nvfp4",
        lambda tensors, config: tensors[f"{EXPERT}.weight_global_scale"].zero_(),
        "tensor '.*0.down_proj.weight_global_scale': expected scales .* a division by 0",
    ),
    "a code of NaN": (
        BLOCKS,
        lambda tensors, config: tensors[f"{EXPERT}.weight"].view(torch.uint8).fill_(0x7F),
        "layer 0, expert 0, down: .*a code or a scale is NaN",
    ),
    "8-bit attention in int4's dtypes": (
        "compressed-tensors int4",
        lambda tensors, config: tensors.update({f"{ATTENTION}.weight_shape": torch.tensor([192, 128])}),
        rf"no quantised format .*'{ATTENTION}.weight_packed' I32 .*Expected shapes of one of its bits and group sizes",
    ),
    "scaled inputs": (
        "ModelOpt nvfp4",
        lambda tensors, config: tensors.update({f"{EXPERT}.pre_quant_scale": torch.ones(1)}),
        "tensor '.*0.down_proj.pre_quant_scale': this version does not know what it does to weights",
    ),
    "scaled inputs of the attention": (
        "ModelOpt nvfp4",
        lambda tensors, config: tensors.update({f"{ATTENTION}.pre_quant_scale": torch.ones(1)}),
        f"tensor '{ATTENTION}.pre_quant_scale' .F32.: this version does not know what it is",
    ),
    "attention in another format": (
        BLOCKS,
        lambda tensors, config: tensors.update({f"{ATTENTION}.weight": torch.zeros(4, 4).to(torch.float8_e5m2)}),
        f"in no quantised format that this version reads: .*'{ATTENTION}.weight' F8_E5M2",
    ),
    "plain experts with scales": (
        BLOCKS,
        lambda tensors, config: [
            tensors.update({name: tensor.bfloat16()} if tensor.dtype == torch.float8_e4m3fn else {})
            for name, tensor in list(tensors.items())
        ],
        "weight_scale_inv': this version does not know what it does to weights that are stored as .weight; expected",
    ),
    "three bits": (
        "GPTQ",
        lambda tensors, config: [
            tensors.update({name: tensor[: len(tensor) * 3 // 4].clone()})
            for name, tensor in list(tensors.items())
            if name.endswith("qweight")
        ],
        "no quantised format .*up_proj.qweight' I32.*Expected shapes of one of its bits and group sizes",
    ),
    "groups of another size": (
        "GPTQ",
        lambda tensors, config: tensors.update({f"{EXPERT}.g_idx": torch.arange(192).div(2).int()}),
        "tensor '.*0.down_proj.g_idx': expected 64 columns in each group from 0 to 2",
    ),
    "GPTQ in another layout": (
        "GPTQ",
        lambda tensors, config: config["quantization_config"].update(checkpoint_format="marlin"),
        "quantised by gptq with checkpoint_format 'marlin', which this version does not read",
    ),
    "GPTQ, a module in another layout": (
        "GPTQ",
        lambda tensors, config: config["quantization_config"].update(
            dynamic={"-:.*gate$": {}, "+:.*down_proj": {"bits": 4, "format": "gptq_v2"}}
        ),
        "quantised by gptq with dynamic .*'format': 'gptq_v2'.*, which this version does not read",
    ),
    "AWQ in another layout": (
        "AWQ",
        lambda tensors, config: config["quantization_config"].update(version="gemv"),
        "quantised by awq with version 'gemv', which this version does not read",
    ),
    "AutoRound in another layout": (
        "AutoRound as GPTQ",
        lambda tensors, config: config["quantization_config"].pop("packing_format"),
        "quantised by auto-round with packing_format None, which this version does not read",
    ),
    "scaled inputs of AWQ": (
        "AWQ",
        lambda tensors, config: tensors.update({f"{EXPERT}.act_scale": torch.ones(1)}),
        "tensor '.*0.down_proj.act_scale': this version does not know what it does to weights",
    ),
}
EXPERT = "model.layers.0.mlp.experts.0.down_proj"


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(tmp_path, case):
    method, change, message = REFUSED[case]
    tensors, config, _ = quantised(method)
    config["quantization_config"] = dict(config["quantization_config"])
    change(tensors, config)
    folder = write_checkpoint(tmp_path / "in", tensors, config, shards=2)
    with pytest.raises(CheckpointError, match=message):
        convert_cpu(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_gpt_oss(tmp_path):
    tensors, config, dense = gpt_oss(layers=2)
    folder = write_checkpoint(tmp_path / "in", tensors | {"model.norm.weight": torch.ones(4)}, config, shards=2)
    report = convert_cpu(folder, tmp_path / "out")
    assert report.formats.name == "mxfp4"
    for layer, expected in enumerate(dense):
        experts = Experts.open(tmp_path / "out", layer)
        assert_same(experts.dequantize(), expected, "")
        assert experts.activation.up_offset == 1.0 and experts.activation.limit == 7.0
        bias = tensors[f"model.layers.{layer}.mlp.experts.gate_up_proj_bias"].float()
        assert torch.equal(experts.biases()["gate"], bias[:, 0::2]) and torch.equal(
            experts.biases()["up"], bias[:, 1::2]
        )
    convert_cpu(folder, tmp_path / "int8", "int8")
    expected = Experts.pack(**dense[0], format="int8")
    assert all(torch.equal(Experts.open(tmp_path / "int8").packed(e), expected.packed(e)) for e in range(E))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("down_proj_scales", torch.zeros(3, 256, 5, dtype=torch.uint8), r"shape \[3, 256, 5\], expected \[3, 256, 6\]"),
        ("down_proj_blocks", torch.zeros(3, 256, 12, 8, dtype=torch.uint8), r"expected \[3, 256, 6, 16\]"),
        ("down_proj_blocks", torch.zeros(3, 192, 8, 16, dtype=torch.uint8), r"expected \[E, 2I, H\] and \[E, H, I\]$"),
        ("gate_up_proj_scales", torch.zeros(3, 384, 8), "no quantised format .*gate_up_proj_scales' F32"),
        ("down_proj_scale_2", torch.zeros(3), "down_proj_scale_2': this version does not know"),
    ],
)
def test_gpt_oss_that_is_broken(tmp_path, name, tensor, message):
    tensors, config, _ = gpt_oss()
    tensors[f"model.layers.0.mlp.experts.{name}"] = tensor
    folder = write_checkpoint(tmp_path / "in", tensors, config)
    with pytest.raises(CheckpointError, match=message):
        convert_cpu(folder, tmp_path / "out")
