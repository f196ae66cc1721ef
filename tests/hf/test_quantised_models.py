"""A model whose checkpoint is quantised computes, converted, what Transformers computes on the dequantised weights."""

import json
import re

import pytest
import torch
from quantised_checkpoints import METHODS, STEM, gpt_oss, mxfp4
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import coterie
from coterie.convert import convert_cpu

SIZES = {
    "hidden_size": 128, "intermediate_size": 192, "moe_intermediate_size": 192, "head_dim": 32, "vocab_size": 60,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2,
    "num_experts": 4, "num_local_experts": 4, "pad_token_id": 0,
}  # fmt: skip


def saved(folder, family):
    """A model's folder, its config.json and its tensors in float32."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES), dtype=torch.float32).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


def write(folder, config, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: t.contiguous().clone() for name, t in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def assert_computes_the_same(tmp_path, config, method, quantised, plain):
    """The quantised checkpoint, converted, beside Transformers' own experts on the plain one."""
    write(tmp_path / "quantised", config | {"quantization_config": method}, quantised)
    write(tmp_path / "plain", config, plain)
    convert_cpu(tmp_path / "quantised", tmp_path / "out")
    model = coterie.from_pretrained(tmp_path / "out", dtype=torch.float32, activations="bf16")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, experts_implementation="eager"
    )
    ids = torch.arange(1, 41).view(2, 20)
    with torch.no_grad():
        found, expected = model(ids).logits, stock(ids).logits
    assert (found - expected).norm() / expected.norm() < 0.01


def shrink(parts, dense, scale):
    """Scales and values times a power of two: as large as weights are, so that neither the attention nor a clamped
    activation is all or nothing."""
    exponent = -4 - dense.std().log2().round()
    e8m0 = parts[scale].dtype == torch.uint8
    small = (parts[scale] + exponent).to(torch.uint8) if e8m0 else parts[scale] * (2.0**exponent).to(parts[scale].dtype)
    return parts | {scale: small}, dense * 2.0**exponent


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        ("fp8 by blocks", "weight_scale_inv"),
        ("compressed-tensors fp8 by rows", "weight_scale"),
        ("ModelOpt nvfp4", "weight_scale_2"),
    ],
)
def test_experts_and_attention(tmp_path, method, scale):
    config, tensors = saved(tmp_path / "model", "qwen3_moe")
    make, quantization, _ = METHODS[method]
    random, quantised, plain = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in tensors.items():
        if not re.search(r"(experts\.\d+|self_attn)\.\w+_proj\.weight", name):
            quantised[name] = plain[name] = tensor
            continue
        parts, plain[name] = shrink(*make(random, *tensor.shape), scale)
        quantised |= {f"{name.removesuffix('.weight')}.{part}": value for part, value in parts.items()}
    assert_computes_the_same(tmp_path, config, quantization, quantised, plain)


def test_gpt_oss_is_dequantised_as_transformers_does():
    tensors, _, dense = gpt_oss()
    for leaf in ("gate_up_proj", "down_proj"):
        parts = (tensors[f"{STEM.format(0)}.{leaf}_{part}"] for part in ("blocks", "scales"))
        weights = convert_moe_packed_tensors(*parts, dtype=torch.float32).mT
        found = {"gate": weights[:, 0::2], "up": weights[:, 1::2]} if leaf == "gate_up_proj" else {"down": weights}
        assert all(torch.equal(found[part], dense[0][part]) for part in found)


def test_gpt_oss(tmp_path):
    config, tensors = saved(tmp_path / "model", "gpt_oss")
    random, quantised, plain = torch.Generator().manual_seed(0), {}, {}
    for name, tensor in tensors.items():
        if not re.search(r"experts\.\w+_proj$", name):
            quantised[name] = plain[name] = tensor
            continue
        made = [shrink(*mxfp4(random, *weight.T.shape), "weight_scale") for weight in tensor]
        blocks = torch.stack([parts["weight_packed"] for parts, _ in made]).unflatten(-1, (-1, 16))
        scales = torch.stack([parts["weight_scale"] for parts, _ in made])
        quantised |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = torch.stack([dense for _, dense in made]).mT
    assert_computes_the_same(tmp_path, config, {"quant_method": "mxfp4"}, quantised, plain)
