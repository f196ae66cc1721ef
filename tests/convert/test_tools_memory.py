"""The tools' memory does not grow with the model: 12 MB of experts and 60 MB of them take the same, a few matrices of
0.5 MB. Packed in int4 they are 3 and 17 MB."""

import pytest
import torch
from made_checkpoints import CONFIG, random_experts, separate, write_checkpoint
from peaks import growth, needs_peaks

from coterie.convert import convert_cpu
from coterie.convert.compare import compare
from coterie.convert.dequantize import dequantize
from coterie.convert.merge import merge
from coterie.convert.verify import verify

SIZES = (8, 512, 512)
LAYERS = {"small": 1, "large": 5}
FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}


def plain(layers):
    tensors = {"model.embed_tokens.weight": torch.randn(100, 64).bfloat16()}
    for layer in range(layers):
        tensors |= separate(f"model.layers.{layer}.mlp.experts", random_experts(layer, sizes=SIZES))
    return tensors


def quantised(tensors):
    for name, tensor in tensors.items():
        if "experts" not in name:
            yield name, tensor
        else:
            yield name, tensor.to(torch.float8_e4m3fn)
            yield f"{name}_scale_inv", torch.ones(4, 4)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a folder a kind of checkpoint, and in each a "small" and a "large" one."""
    folder = tmp_path_factory.mktemp("memory")
    for name, layers in LAYERS.items():
        tensors, config = plain(layers), CONFIG | {"num_experts": SIZES[0], "num_hidden_layers": layers}
        source = write_checkpoint(folder / "plain" / name, tensors, config)
        write_checkpoint(folder / "fp8" / name, dict(quantised(tensors)), config | FP8)
        convert_cpu(source, folder / "packed" / name)
        convert_cpu(source, folder / "loose" / name, loose=True)
    return folder


@needs_peaks
@pytest.mark.parametrize(
    "tool",
    [
        pytest.param(lambda made, size, out: convert_cpu(made / "plain" / size, out), id="convert"),
        pytest.param(lambda made, size, out: dequantize(made / "fp8" / size, out), id="dequantize"),
        pytest.param(lambda made, size, _: compare(made / "plain" / size, made / "plain" / size), id="compare"),
        pytest.param(lambda made, size, _: verify(made / "packed" / size, made / "plain" / size), id="verify"),
        pytest.param(lambda made, size, out: merge([made / "loose" / size], out, made / "plain" / size), id="merge"),
    ],
)
def test_memory(tmp_path, made, tool):
    assert growth(lambda size, out: tool(made, size, tmp_path / out)) < 8 << 20
