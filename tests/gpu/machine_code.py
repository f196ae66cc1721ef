"""Compiles the kernels as layers of models launch them, for GPUs that need not be there; prints what they take as JSON.

In a process of its own, without Triton's interpreter: python tests/gpu/machine_code.py
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

from coterie import Activation
from coterie.bench.shapes import SHAPES, Shape
from coterie.formats import Format, resolve
from coterie.gpu.kernels import few, gram, rows, token
from coterie.gpu.kernels.dequantise import dequantise
from coterie.gpu.matrices import Matrices

CAPABILITIES = 80, 90, 100
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.uint8: "u8", torch.int16: "i16",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip
OPTIONS = "num_warps", "num_stages", "enable_fp_fusion"
BIN = Path(triton.__file__).parent / "backends/nvidia/bin"
launches: dict[tuple[str, str], tuple[JITFunction, dict[str, Any], dict[str, Any]]] = {}
label = ""


def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """In the place of a launch."""
    given = dict(zip(self.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in self.arg_names}
    name = self.__name__.strip("_") + (" gate" if given.get("HAS_GATE") else "")
    launches[name, label] = self, given, {k: v for k, v in kwargs.items() if k in OPTIONS}


def compiled(fn: JITFunction, given: dict[str, Any], options: dict[str, Any], capability: int) -> dict[str, Any]:
    """As the launcher specialises it: None and constants are compiled in, and what 16 divides is said to be so."""
    signature, constants, attributes = {}, {}, {}
    for position, (name, value) in enumerate(given.items()):
        if value is None or fn.params[position].is_constexpr:
            signature[name], constants[position,] = "constexpr", value
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "*" + TYPES[value.dtype] if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attributes)
    kernel = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
    taken = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": taken["REG"],
        "spilled": taken["STACK"] + taken["LOCAL"],
        "shared": kernel.metadata.shared,
        "tensor cores": next((name for name in ("tcgen05", "wgmma", "mma") if name in ptx), None),
    }


def matrices(spec: Format, count: int, height: int, cols: int) -> Matrices:
    def empty(*size: int, dtype: torch.dtype = torch.uint8) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    encoding = spec.encoding
    width = cols // 2 if encoding.bits == 4 else cols
    codes = empty(count, height, width, dtype=torch.bfloat16 if encoding.bits == 16 else torch.uint8)
    groups = -(-cols // spec.group_size) if spec.group_size else 0
    scales = -(-height // encoding.tile_rows), groups
    scale = empty(count, *scales, dtype=encoding.scales or torch.uint8) if groups else None
    row_scale = empty(count, height, dtype=torch.float32) if spec.row_scales else None
    return Matrices(spec, cols, codes, scale, None, row_scale, None)


def launch(shape: Shape, spec: Format) -> None:
    """Every kernel, as a layer of this shape does."""
    packed = {
        name: matrices(spec, shape.E, *((shape.H, shape.I) if name == "down" else (shape.I, shape.H)))
        for name in ("gate", "up", "down")
    }
    for tokens in (1, 64):
        x = torch.empty(tokens, shape.H, dtype=torch.bfloat16, device="meta")
        ids = torch.empty(tokens, shape.K, dtype=torch.int64, device="meta")
        few.forward(x, ids, torch.empty(ids.shape, device="meta"), packed, {}, Activation())
    count, rank = 1024, 32
    out = torch.empty(shape.E, shape.I, shape.H, dtype=torch.bfloat16, device="meta")
    dequantise(packed["up"], torch.empty(shape.E, dtype=torch.int64, device="meta"), out)
    before = torch.empty(count, 2 * shape.I, dtype=torch.bfloat16, device="meta")
    weights, back = torch.empty(count, device="meta"), before[:, : shape.I]
    rows.activate(Activation(), before, weights, True, rank)
    rows.slope(Activation(), before, back, weights, True, rank, True)
    low = torch.empty(count, rank, dtype=torch.bfloat16, device="meta")
    ends = torch.empty(shape.E, dtype=torch.int32, device="meta")
    index = torch.empty(count, dtype=torch.int64, device="meta")
    x = torch.empty(count, shape.H + rank, dtype=torch.bfloat16, device="meta")
    gram.gathered_gram(low, x, index, ends, shape.H)
    token.rms_norm(before[:1, None, : shape.I].contiguous(), before[0, : shape.I], 1e-6, True, False)
    token.choose(torch.empty(1, shape.E, dtype=torch.bfloat16, device="meta"), shape.K, True, torch.bfloat16)
    cache = torch.empty(1, 4, 8192, 128, dtype=torch.bfloat16, device="meta")
    mask = torch.empty(1, 1, 1, 8192, dtype=torch.bool, device="meta")
    token.attend(cache[:, :, :8].reshape(1, 32, 1, 128), cache, cache, mask, 0.1)


def main() -> None:
    global label
    JITFunction.run = record
    for label in ("int4", "int8", "bf16", "fp8_block", "mxfp4"):
        launch(SHAPES["qwen3-30b"], resolve(label))
    found: dict[str, Any] = {}
    for (name, spec), launched in launches.items():
        reads_codes = name.split()[0] in ("single", "together", "dequantise")
        for capability in CAPABILITIES:
            if spec == "int4" or (reads_codes and capability == 90):
                what = f"{name} {spec}" if reads_codes else name
                found[f"{what} sm_{capability}"] = compiled(*launched, capability)
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
