"""Small checkpoints of random codes and scales, as each method stores them, and what they stand for in plain torch."""

from __future__ import annotations

from functools import partial

import torch
from made_checkpoints import CONFIG, QWEN
from torch import Tensor

from coterie.formats import resolve

E, H, I = 3, 256, 192  # noqa: E741
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def integers(random: torch.Generator, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=random)


def e4m3(random: torch.Generator, *shape: int) -> Tensor:
    codes = integers(random, 256, *shape)
    return torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8).view(torch.float8_e4m3fn)


def uniform(random: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(shape, generator=random) * 1e-3 + 1e-4


def by_blocks(scale: Tensor, rows: int, cols: int) -> Tensor:
    return scale.float().repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]


def by_groups(scale: Tensor, cols: int) -> Tensor:
    return scale.repeat_interleave(cols // scale.shape[1], 1)


def two_to_a_byte(codes: Tensor) -> Tensor:
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)


def fp8_block(random, rows, cols):
    weight, scale = e4m3(random, rows, cols), uniform(random, -(-rows // 128), -(-cols // 128))
    return {"weight": weight, "weight_scale_inv": scale}, weight.float() * by_blocks(scale, rows, cols)


def fp8_block_bf16(random, rows, cols):
    parts, _ = fp8_block(random, rows, cols)
    parts["weight_scale_inv"] = parts["weight_scale_inv"].bfloat16()
    return parts, parts["weight"].float() * by_blocks(parts["weight_scale_inv"], rows, cols)


def fp8_block_compressed(random, rows, cols):
    parts, dense = fp8_block(random, rows, cols)
    return {"weight": parts["weight"], "weight_scale": parts["weight_scale_inv"]}, dense


def fp8_block_ue8m0(random, rows, cols):
    parts, _ = fp8_block(random, rows, cols)
    scale = integers(random, 20, *parts["weight_scale_inv"].shape) + 110
    dense = parts["weight"].float() * by_blocks(torch.exp2(scale.double() - 127), rows, cols)
    return {"weight": parts["weight"], "scale": scale.to(torch.uint8).view(torch.float8_e8m0fnu)}, dense


def fp8_channel(random, rows, cols):
    weight, scale = e4m3(random, rows, cols), uniform(random, rows, 1).bfloat16()
    return {"weight": weight, "weight_scale": scale}, weight.float() * scale.float()


def fp8_tensor(random, rows, cols):
    weight, scale = e4m3(random, rows, cols), uniform(random, 1)[0]
    return {"weight": weight, "weight_scale": scale, "input_scale": torch.tensor(2.0)}, weight.float() * scale


def nvfp4(random, rows, cols):
    codes, scale = integers(random, 16, rows, cols), e4m3(random, rows, cols // 16).abs()
    whole = uniform(random, 1)[0]
    parts = {"weight": two_to_a_byte(codes), "weight_scale": scale, "weight_scale_2": whole}
    return parts | {"input_scale": torch.tensor(2.0)}, E2M1[codes] * by_groups(scale.float() * whole, cols)


def nvfp4_compressed(random, rows, cols):
    parts, _ = nvfp4(random, rows, cols)
    whole = 1 / uniform(random, 1)
    parts = {
        "weight_packed": parts["weight"],
        "weight_scale": parts["weight_scale"],
        "weight_global_scale": whole,
        "input_global_scale": torch.tensor([2.0]),
    }
    codes = torch.stack((parts["weight_packed"] & 15, parts["weight_packed"] >> 4), -1).flatten(1).long()
    return parts, E2M1[codes] * by_groups(parts["weight_scale"].float() / whole, cols)


def mxfp4(random, rows, cols):
    codes, scale = integers(random, 16, rows, cols), integers(random, 40, rows, cols // 32) + 100
    dense = E2M1[codes] * by_groups(torch.exp2(scale.double() - 127).float(), cols)
    return {"weight_packed": two_to_a_byte(codes), "weight_scale": scale.to(torch.uint8)}, dense


def mxfp8(random, rows, cols):
    weight, scale = e4m3(random, rows, cols), integers(random, 40, rows, cols // 32) + 90
    dense = weight.float() * by_groups(torch.exp2(scale.double() - 127).float(), cols)
    return {"weight": weight, "weight_scale": scale.to(torch.uint8)}, dense


def mxfp4_deepseek(random, rows, cols):
    parts, dense = mxfp4(random, rows, cols)
    scale = parts["weight_scale"].view(torch.float8_e8m0fnu)
    return {"weight": parts["weight_packed"].view(torch.int8), "scale": scale}, dense


def words(numbers: Tensor, bits: int = 4, order: list[int] | None = None) -> Tensor:
    """int32: the numbers of the last dimension packed, the first in the lowest bits, or in that order."""
    each = numbers.unflatten(-1, (-1, 32 // bits))
    if order is not None:
        each = each[..., order]
    return signed(sum(each[..., n] << bits * n for n in range(32 // bits)))


def signed(word: Tensor) -> Tensor:
    """int32 of the same 32 bits as whole numbers of any sign."""
    word = word % 2**32
    return torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def integer_parts(random, rows, cols, group, bits, symmetric, dtype=torch.float16):
    """(codes [rows, cols], zero points and scales [rows, groups]); all columns are a group if group is 0."""
    groups = cols // group if group else 1
    codes, zero = integers(random, 2**bits, rows, cols), integers(random, 2**bits, rows, groups)
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    return codes, zero, uniform(random, rows, groups).to(dtype)


def int4(random, rows, cols, group=32, bits=4, symmetric=True, dtype=torch.bfloat16):
    """compressed-tensors'."""
    codes, zero, scale = integer_parts(random, rows, cols, group, bits, symmetric, dtype)
    parts = {"weight_packed": words(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([rows, cols])}
    if not symmetric:
        parts["weight_zero_point"] = words(zero.T, bits).T
    return parts, (codes - by_groups(zero, cols)) * by_groups(scale.float(), cols)


def int8_row(random, rows, cols):
    codes, scale = integers(random, 256, rows, cols) - 128, uniform(random, rows, 1).bfloat16()
    return {"weight": codes.to(torch.int8), "weight_scale": scale}, codes * scale.float()


def gptq(random, rows, cols, group=64, bits=4, symmetric=True, less=1, scattered=False, dtype=torch.float16):
    codes, zero, scale = integer_parts(random, rows, cols, group, bits, symmetric, dtype)
    group_of = torch.arange(cols) // (group or cols)
    if scattered:
        group_of = group_of[torch.randperm(cols, generator=random)]
    ones = sum(1 << bits * n for n in range(32 // bits))
    parts = {
        "qweight": words(codes, bits).T,
        "qzeros": signed(words(zero.T, bits).long() - less * ones),
        "scales": scale.T,
        "g_idx": group_of.int(),
    }
    return parts, (codes - zero[:, group_of]) * scale.float()[:, group_of]


def auto_round(random, rows, cols, **options):
    """No groups of columns, and scales of the model's dtype."""
    parts, dense = gptq(random, rows, cols, dtype=torch.bfloat16, **options)
    return {name: parts[name] for name in ("qweight", "qzeros", "scales")}, dense


def awq(random, rows, cols, group=64, symmetric=False):
    codes, zero, scale = integer_parts(random, rows, cols, group, 4, symmetric)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {"qweight": words(codes.T, order=order), "qzeros": words(zero.T, order=order), "scales": scale.T}
    return parts, (codes - by_groups(zero, cols)) * by_groups(scale.float(), cols)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic", "fmt": "e4m3"}
COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {}}
MODELOPT = {"quant_method": "modelopt"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "checkpoint_format": "gptq"}
GPTQ_V2 = GPTQ | {"checkpoint_format": "gptq_v2"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}
# One row a way to store matrices: (how one is made, the quantization_config, the format that keeps it).
METHODS = {
    "fp8 by blocks": (fp8_block, FP8, resolve("fp8_block")),
    "fp8 by blocks, bf16 scales": (fp8_block_bf16, FP8, resolve("fp8_block")),
    "compressed-tensors fp8 by blocks": (fp8_block_compressed, COMPRESSED, resolve("fp8_block")),
    "compressed-tensors fp8 by rows": (fp8_channel, COMPRESSED, resolve("fp8_channel")),
    "ModelOpt fp8": (fp8_tensor, MODELOPT | {"quant_algo": "FP8"}, resolve("fp8_channel")),
    "ModelOpt nvfp4": (nvfp4, MODELOPT | {"quant_algo": "NVFP4"}, resolve("nvfp4")),
    "compressed-tensors nvfp4": (nvfp4_compressed, COMPRESSED, resolve("nvfp4")),
    "compressed-tensors mxfp4": (mxfp4, COMPRESSED, resolve("mxfp4")),
    "DeepSeek-V4": (mxfp4_deepseek, FP8 | {"scale_fmt": "ue8m0"}, resolve("mxfp4")),
    "DeepSeek-V4, not experts": (fp8_block_ue8m0, FP8, resolve("fp8_block")),
    "compressed-tensors mxfp8": (mxfp8, COMPRESSED, resolve("mxfp8")),
    "ModelOpt mxfp8": (mxfp8, MODELOPT | {"quant_algo": "MXFP8"}, resolve("mxfp8")),
    "compressed-tensors int4": (int4, COMPRESSED, resolve("int4", 32)),
    "compressed-tensors int4 by rows": (partial(int4, group=0), COMPRESSED, resolve("int4", 0)),
    "compressed-tensors int4, f16 scales": (partial(int4, dtype=torch.float16), COMPRESSED, resolve("int4", 32)),
    "compressed-tensors int4, zero points": (partial(int4, symmetric=False), COMPRESSED, resolve("int4", 32, True)),
    "compressed-tensors int8": (partial(int4, bits=8), COMPRESSED, resolve("int8", 32)),
    "compressed-tensors int8 by rows": (int8_row, COMPRESSED, resolve("int8", 0)),
    "GPTQ": (gptq, GPTQ, resolve("int4", 64)),
    "GPTQ, zero points": (partial(gptq, symmetric=False), GPTQ, resolve("int4", 64, True)),
    "GPTQ v2, zero points": (partial(gptq, symmetric=False, less=0), GPTQ_V2, resolve("int4", 64, True)),
    "GPTQ by rows": (partial(gptq, group=0), GPTQ, resolve("int4", 0)),
    "GPTQ by rows, zero points": (partial(gptq, group=0, symmetric=False), GPTQ, resolve("int4", 0, True)),
    "GPTQ, 8 bits": (partial(gptq, bits=8), GPTQ, resolve("int8", 64)),
    "AWQ": (awq, {"quant_method": "awq", "version": "gemm"}, resolve("int4", 64, True)),
    "AWQ, symmetric": (partial(awq, symmetric=True), {"quant_method": "awq"}, resolve("int4", 64)),
    "AutoRound as GPTQ": (auto_round, AUTO_ROUND, resolve("int4", 64)),
    "AutoRound, zero points": (
        partial(auto_round, symmetric=False, less=0), AUTO_ROUND | {"packing_format": "auto_round"},
        resolve("int4", 64, True),
    ),
    "AutoRound as AWQ": (awq, AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, resolve("int4", 64, True)),
}
# What the formats that keep them hold within rounding: f16 scales of groups become bf16, int8's -128 becomes -127.
FINER = {
    "compressed-tensors int4, f16 scales", "compressed-tensors int8",
    "compressed-tensors int8 by rows", "GPTQ", "GPTQ, zero points",
    "GPTQ v2, zero points", "GPTQ, 8 bits", "AWQ", "AWQ, symmetric", "AutoRound as AWQ",
}  # fmt: skip
ATTENTION = "model.layers.0.self_attn.q_proj"
STEM = "model.layers.{}.mlp.experts"


def quantised(method: str, layers: int = 2) -> tuple[dict[str, Tensor], dict, dict[str, Tensor]]:
    """(tensors, config.json, {weight name without ".weight": float32 values}) of a checkpoint quantised by `method`.

    A projection of the attention is quantised too; norms, router and embedding are not.
    """
    make, config, _ = METHODS[method]
    return quantised_as(make, config, layers)


def quantised_as(make, config: dict, layers: int = 2) -> tuple[dict[str, Tensor], dict, dict[str, Tensor]]:
    """The same of a method that is in no row."""
    random = torch.Generator().manual_seed(0)
    bases = {ATTENTION: (I, H)}
    for layer in range(layers):
        for expert in range(E):
            for part, leaf in QWEN.items():
                bases[f"{STEM.format(layer)}.{expert}.{leaf}"] = (H, I) if part == "down" else (I, H)
    tensors = {
        "model.embed_tokens.weight": torch.randn(50, H, generator=random).bfloat16(),
        "model.layers.0.input_layernorm.weight": torch.ones(H, dtype=torch.bfloat16),
        f"{ATTENTION}.bias": torch.randn(I, generator=random).bfloat16(),
    }
    dense = {}
    for base, size in bases.items():
        parts, dense[base] = make(random, *size)
        tensors |= {f"{base}.{name}": tensor.contiguous().clone() for name, tensor in parts.items()}
    return tensors, CONFIG | {"quantization_config": config}, dense


def stacks(dense: dict[str, Tensor], layer: int) -> dict[str, Tensor]:
    """gate, up and down of a layer, [E, rows, cols], out of what `quantised` gives."""
    stem = STEM.format(layer)
    return {part: torch.stack([dense[f"{stem}.{e}.{leaf}"] for e in range(E)]) for part, leaf in QWEN.items()}


def gpt_oss(layers: int = 1) -> tuple[dict[str, Tensor], dict, list[dict[str, Tensor]]]:
    """(tensors, config.json, {projection: float32 values} of each layer) as gpt-oss stores its experts, with biases."""
    random, tensors, dense = torch.Generator().manual_seed(0), {}, []
    for layer in range(layers):
        stem, values = STEM.format(layer), {}
        for leaf, rows, cols in (("gate_up_proj", 2 * I, H), ("down_proj", H, I)):
            made = [mxfp4(random, rows, cols) for _ in range(E)]
            blocks = torch.stack([parts["weight_packed"] for parts, _ in made])
            tensors |= {
                f"{stem}.{leaf}_blocks": blocks.unflatten(-1, (-1, 16)).contiguous(),
                f"{stem}.{leaf}_scales": torch.stack([parts["weight_scale"] for parts, _ in made]),
                f"{stem}.{leaf}_bias": torch.randn(E, rows, generator=random).bfloat16(),
            }
            values[leaf] = torch.stack([weights for _, weights in made])
        both = values["gate_up_proj"]
        dense.append({"gate": both[:, 0::2], "up": both[:, 1::2], "down": values["down_proj"]})
    config = CONFIG | {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}}
    return tensors, config, dense
