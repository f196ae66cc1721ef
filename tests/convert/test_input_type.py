"""--input-type: what the experts are said to be is what they are."""

import pytest
import torch
from made_checkpoints import two_layers, write_checkpoint
from quantised_checkpoints import quantised

from coterie.convert import convert_cpu
from coterie.errors import ArgumentError

QUANTISED = {
    "fp8 by blocks": ("fp8", "fp8_block"),
    "compressed-tensors fp8 by rows": ("compressed-tensors", "fp8", "fp8_channel"),
    "compressed-tensors int4": ("compressed-tensors", "int4"),
    "DeepSeek-V4": ("fp8", "mxfp4"),
    "ModelOpt nvfp4": ("modelopt", "nvfp4"),
    "GPTQ": ("gptq", "int4"),
    "AWQ": ("awq", "int4"),
}


@pytest.mark.parametrize("method", QUANTISED)
def test_quantised(tmp_path, method):
    tensors, config, _ = quantised(method)
    folder = write_checkpoint(tmp_path / "in", tensors, config)
    for number, name in enumerate(QUANTISED[method]):
        convert_cpu(folder, tmp_path / str(number), input_type=name, layers=[0])
    named = ", ".join(sorted(QUANTISED[method]))
    with pytest.raises(ArgumentError, match=f"--input-type is bf16: .*in holds experts in {named}; leave it out"):
        convert_cpu(folder, tmp_path / "out", input_type="bf16")
    assert not (tmp_path / "out").exists()


def test_plain(tmp_path):
    folder, _ = two_layers(tmp_path / "in", torch.float16)
    convert_cpu(folder, tmp_path / "fp16", input_type="fp16")
    for wrong, message in (("bf16", "holds experts in fp16"), ("gptq", "in fp16"), ("fp17", "'fp17': expected one of")):
        with pytest.raises(ArgumentError, match=message):
            convert_cpu(folder, tmp_path / "out", input_type=wrong)
