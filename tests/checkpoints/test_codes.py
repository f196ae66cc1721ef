"""What codes stand for: as the kernels have it, to the last bit."""

import pytest
import torch
from quantised_checkpoints import e4m3, integers
from streams import random_records

from coterie import Experts
from coterie.checkpoints import Codes
from coterie.formats import resolve


def every_code(spec, rows, cols, random):
    if spec.encoding.bits < 8:
        return torch.arange(rows * cols).remainder(2**spec.encoding.bits).view(rows, cols).to(torch.uint8)
    return e4m3(random, rows, cols)


@pytest.mark.parametrize(
    ("name", "group_size"),
    [("fp8_block", 128), ("fp8_channel", 0), ("mxfp4", 32), ("mxfp8", 32), ("nvfp4", 16), ("int4", 32), ("int4", 0),
     ("q4_k", 256), ("q6_k", 256), ("q5_k", 256), ("q4_1", 32), ("q5_0", 32), ("q5_1", 32), ("iq4_xs", 256),
     ("q2_k", 256), ("q3_k", 256)],
)
def test_dequantised_as_the_kernels_do(name, group_size):
    spec, random, rows, cols = resolve(name, group_size), torch.Generator().manual_seed(0), 192, 256
    tiles, groups = -(-rows // spec.encoding.tile_rows), cols // group_size if group_size else 0
    scale = None
    if spec.encoding.record:
        scale = random_records(spec, rows, groups, random)
    elif groups and spec.encoding.scales == torch.uint8:
        scale = torch.arange(tiles * groups).remainder(140).view(tiles, groups).to(torch.uint8)  # 0 is 2^-127
    elif groups:
        scale = (integers(random, 100, tiles, groups) / 64).to(spec.encoding.scales)
    row_scale = torch.rand(rows, generator=random) if spec.row_scales else None
    codes = Codes(spec, every_code(spec, rows, cols, random), scale, row_scale)
    experts = Experts.empty(1, cols, rows, format=name, group_size=group_size, has_gate=False)
    assert experts.pack_stored("up", 0, codes) == 0
    expected = experts.dequantize_projection("up", 0)
    assert torch.equal(codes.dequantize(), expected)
    assert torch.equal(codes.rows(128, 192).dequantize(), expected[128:])
