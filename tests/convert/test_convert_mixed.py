"""Checkpoints whose modules are quantised in different ways: each is read by its own, none by its neighbour's."""

import re

import pytest
import torch
from made_checkpoints import write_checkpoint
from quantised_checkpoints import ATTENTION, AUTO_ROUND, COMPRESSED, METHODS, MODELOPT, STEM, E, quantised, stacks
from safetensors.torch import load_file

from coterie import Experts
from coterie.convert import convert_cpu
from coterie.convert.verify import verify
from coterie.errors import ArgumentError, CheckpointError


def mixed(folder, config, first, others):
    """A checkpoint quantised by `first`, but for the modules that match a pattern of `others`: {pattern: method, or
    None where they are plain}; and what its weights stand for."""
    tensors, settings, dense = quantised(first)
    for pattern, method in others.items():
        bases = [base for base in dense if re.search(pattern, base)]
        assert bases
        tensors = {name: t for name, t in tensors.items() if name.rpartition(".")[0] not in bases}
        if method is None:
            tensors |= {f"{base}.weight": dense[base].bfloat16() for base in bases}
            dense |= {base: dense[base].bfloat16().float() for base in bases}
            continue
        more, _, values = quantised(method)
        tensors |= {name: t for base in bases for name, t in more.items() if name.startswith(f"{base}.")}
        dense |= {base: values[base] for base in bases}
    return write_checkpoint(folder, tensors, settings | {"quantization_config": config}, shards=2), dense


MIXED_PRECISION = MODELOPT | {
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {
        f"{STEM.format(0)}.0.down_proj": {"quant_algo": "FP8"},
        f"{STEM.format(0)}.0.up_proj": {"quant_algo": "NVFP4", "group_size": 16},
    },
}
GROUPS = COMPRESSED | {
    "format": "mixed-precision",
    "config_groups": {
        "group_0": {"targets": ["re:.*experts.*"], "weights": {"num_bits": 4}, "format": "pack-quantized"},
        "group_1": {"targets": ["re:.*down_proj"], "weights": {"num_bits": 8}, "format": "pack-quantized"},
    },
}
EXTRA = AUTO_ROUND | {
    "extra_config": {ATTENTION: {"bits": 16}, f"{STEM.format(0)}.1.up_proj": {"bits": 16, "data_type": "fp"}}
}
MIXES = {
    "ModelOpt": (MIXED_PRECISION, "ModelOpt nvfp4", {r"down_proj": "ModelOpt fp8", "q_proj": "ModelOpt fp8"}),
    "ModelOpt, an expert": (MIXED_PRECISION, "ModelOpt nvfp4", {r"layers\.1.*\.2\.": "ModelOpt fp8"}),
    "compressed-tensors": (
        GROUPS, "compressed-tensors int4", {"down_proj": "compressed-tensors int8", "q_proj": "compressed-tensors int8"}
    ),
    "compressed-tensors, floats": (GROUPS, "compressed-tensors int4", {"up_proj": "compressed-tensors fp8 by rows"}),
    "AutoRound": (EXTRA, "AutoRound as GPTQ", {"q_proj": None, r"layers\.0.*experts\.1\.up_proj": None}),
}  # fmt: skip


# Where gate and up have one format, and down: of both layers.
KEPT = {"ModelOpt": "nvfp4/fp8_channel", "compressed-tensors": "int4/int8"}


@pytest.mark.parametrize("case", KEPT)
def test_down_in_a_format_of_its_own(tmp_path, case):
    folder, dense = mixed(tmp_path / "in", *MIXES[case])
    report = convert_cpu(folder, tmp_path / "out")
    assert report.kept and report.repacked == 0 and report.formats.name == KEPT[case]
    for layer in range(2):
        opened = Experts.open(folder, layer)
        for experts in (opened, Experts.open(tmp_path / "out", layer, mmap=True)):
            assert experts.format == KEPT[case] and experts.formats == report.formats[layer]
            for weights, expected in zip(experts.dequantize(), stacks(dense, layer).values(), strict=True):
                rtol = 2**-7 if "int8" in KEPT[case] else 0  # -127 for -128
                torch.testing.assert_close(weights, expected, rtol=rtol, atol=0)
    assert all(check.worst < 0.01 for check in verify(tmp_path / "out", folder))


@pytest.mark.parametrize("case", MIXES)
def test_each_matrix_is_read_by_its_own(tmp_path, case):
    """Those of the format that is asked for keep their codes; the others are packed anew from what theirs stand for."""
    config, first, others = MIXES[case]
    folder, dense = mixed(tmp_path / "in", config, first, others)
    if case not in KEPT:
        refused = r"layer \d: matrices of \w+ are quantised in different ways \(.*\): name one format for all"
        with pytest.raises(ArgumentError, match=refused):
            convert_cpu(folder, tmp_path / "out")
    spec = METHODS[first][2]
    report = convert_cpu(folder, tmp_path / "out", spec.name, spec.group_size)
    assert not report.kept
    for layer in range(2):
        experts = Experts.open(tmp_path / "out", layer)
        expected = Experts.pack(**stacks(dense, layer), format=spec.name, group_size=spec.group_size)
        whole = not any(re.search(p, b) for p in others for b in dense if f"layers.{layer}." in b and "experts" in b)
        opened = Experts.open(folder, layer).formats
        assert (opened.spec == spec) == whole
        for part, weights in stacks(dense, layer).items():
            for e in range(E):
                base = f"{STEM.format(layer)}.{e}.{part}_proj"
                found = experts.dequantize_projection(part, e)
                if any(re.search(pattern, base) for pattern in others):
                    assert torch.equal(found, expected.dequantize_projection(part, e))
                else:
                    assert torch.equal(found, weights[e])
    written = {k: v for file in (tmp_path / "out").glob("model-*.safetensors") for k, v in load_file(file).items()}
    assert torch.equal(written[f"{ATTENTION}.weight"], dense[ATTENTION].bfloat16())


def test_opened_without_a_format(tmp_path):
    """Gate and up in several formats are dequantised to bf16."""
    folder, dense = mixed(tmp_path / "in", *MIXES["compressed-tensors, floats"])
    assert Experts.open(folder).format == "bf16/int4"
    for found, weights in zip(Experts.open(folder).dequantize(), stacks(dense, 0).values(), strict=True):
        assert torch.equal(found, weights.bfloat16().float()) or torch.equal(found, weights)


NOT_UNDERSTOOD = {
    "ModelOpt, an algorithm of another kind": (
        MIXED_PRECISION,
        "ModelOpt nvfp4",
        {"weight": torch.zeros(128, 192, dtype=torch.uint8), "weight_scale": torch.ones(256, 6)},
    ),
    "compressed-tensors, 2 bits": (
        GROUPS,
        "compressed-tensors int4",
        {
            "weight_packed": torch.zeros(256, 12, dtype=torch.int32),
            "weight_scale": torch.ones(256, 6).bfloat16(),
            "weight_shape": torch.tensor([256, 192]),
        },
    ),
    "AutoRound, 2 bits": (
        EXTRA,
        "AutoRound as GPTQ",
        {
            "qweight": torch.zeros(12, 256, dtype=torch.int32),
            "qzeros": torch.zeros(3, 16, dtype=torch.int32),
            "scales": torch.ones(3, 256).half(),
        },
    ),
}


@pytest.mark.parametrize("module", [ATTENTION, f"{STEM.format(1)}.2.down_proj"], ids=["attention", "expert"])
@pytest.mark.parametrize("case", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_named(tmp_path, case, module):
    config, method, parts = NOT_UNDERSTOOD[case]
    tensors, settings, _ = quantised(method)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(f"{module}.")}
    tensors |= {f"{module}.{name}": tensor for name, tensor in parts.items()}
    folder = write_checkpoint(tmp_path / "in", tensors, settings | {"quantization_config": config})
    with pytest.raises(CheckpointError, match=rf"tensor.*'{re.escape(module)}\.\w+'"):
        convert_cpu(folder, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()
