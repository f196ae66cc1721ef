"""Transformers models that decode as CUDA graphs on a real GPU, wherever their experts are."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
pytest.importorskip("accelerate")

import tiny_models  # noqa: E402
from lora_models import PARAMETERS, adapt  # noqa: E402

import coterie  # noqa: E402
from coterie.hf.inference import graphs  # noqa: E402

TOKENS = 24


@pytest.fixture
def replayed(monkeypatch):
    """How often graphs were replayed."""
    counts, captured = [], graphs.captured

    def counting(device, call):
        replay, out = captured(device, call)
        return lambda: (counts.append(1), replay()), out

    monkeypatch.setattr(graphs, "captured", counting)
    return counts


def written(model, **options):
    options = {"max_new_tokens": TOKENS, "do_sample": False, "return_dict_in_generate": True} | options
    found = model.generate(tiny_models.prompt().cuda(), output_logits=True, **options)
    return found.sequences, torch.stack(found.logits).float()


def assert_same(found, expected):
    """Up to the first token that rounding chose otherwise."""
    same = (found[0] == expected[0]).all(0)
    length = int(same.int().cumprod(0).sum()) - tiny_models.prompt().shape[1]
    assert length > TOKENS // 3, length
    errors = (found[1] - expected[1])[: length + 1].norm(dim=-1) / expected[1][: length + 1].norm(dim=-1)
    assert errors.median() < 0.02, errors


@pytest.mark.parametrize("gpu_experts", [None, 3, "all", "stream"])
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "deepseek_v3", "mixtral", "glm4_moe"])
def test_as_without(family, gpu_experts, replayed, tmp_path):
    tiny_models.make(family).save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, "int4", "cuda", dtype=torch.float32, gpu_experts=gpu_experts)
    expected = written(model, cache_implementation="dynamic")
    assert not replayed
    assert_same(written(model), expected)
    assert len(replayed) == TOKENS - 2
    assert_same(written(model), expected)


def test_sliding_windows_are_computed(replayed, tmp_path):
    tiny_models.make("gpt_oss").save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, "int4", "cuda", dtype=torch.float32)
    assert_same(written(model), written(model, cache_implementation="dynamic"))
    assert not replayed


@pytest.mark.parametrize("gpu_experts", [None, "all"])
def test_adapters(gpu_experts, replayed, tmp_path):
    """As they are when an answer begins: another call has what they are then."""
    pytest.importorskip("peft")
    tiny_models.make("qwen3_moe").save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, "int4", "cuda", dtype=torch.float32, gpu_experts=gpu_experts)
    model = adapt(model, target_modules=["q_proj"], target_parameters=PARAMETERS).eval()
    if gpu_experts:
        model = model.to("cuda")
    for scale in (1.0, -3.0):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.mul_(scale)
        assert_same(written(model), written(model, cache_implementation="dynamic"))
    assert len(replayed) == 2 * (TOKENS - 2)


def test_what_cannot_be_captured(replayed, tmp_path):
    """Adapters in RAM of experts on the GPU are copied there from memory that a graph cannot read. All else goes on."""
    pytest.importorskip("peft")
    tiny_models.make("qwen3_moe").save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, "int4", "cuda", dtype=torch.float32, gpu_experts="all")
    model = adapt(model, target_modules=["q_proj"], target_parameters=PARAMETERS).eval()
    assert_same(written(model), written(model, cache_implementation="dynamic"))
    written(model, do_sample=True)
    assert not replayed and torch.randn(8, device="cuda").isfinite().all()
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
