"""Transformers models on a real GPU with their experts in RAM; what the two round differently is allowed for."""

from __future__ import annotations

import math

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

import tiny_models  # noqa: E402
from lora_models import PARAMETERS, adapt, relative  # noqa: E402
from packed_models import assert_same_bytes, logits  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

import coterie  # noqa: E402
from coterie.hf.weight import PackedWeight  # noqa: E402

CLOSE = 0.02  # activations are rounded to 8 or 16 bits: a value near a boundary goes either way


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3_moe")
    tiny_models.make("qwen3_moe").save_pretrained(path)
    return path


@pytest.fixture
def adapted(folder):
    """The model with an adapter, and its twin in RAM with the same."""
    options = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    plain = adapt(coterie.from_pretrained(folder, "int4", dtype=torch.float32), **options)
    model = adapt(coterie.from_pretrained(folder, "int4", "cuda", dtype=torch.float32), **options)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                model.get_parameter(name).copy_(parameter)
    return model, plain


def loss_and_gradients(model):
    ids = tiny_models.prompt(2, 12).to(model.device)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_computes_the_same(family, dtype, tmp_path):
    tiny_models.make(family).save_pretrained(tmp_path)
    plain = coterie.from_pretrained(tmp_path, "int4", dtype=torch.float32)
    model = coterie.from_pretrained(tmp_path, "int4", "cuda", dtype=dtype)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == ("cpu" if isinstance(parameter, PackedWeight) else "cuda"), name
    assert_same_bytes(model, plain)
    ids = tiny_models.prompt()
    written = model.generate(ids.cuda(), max_new_tokens=8, do_sample=False)
    assert written.is_cuda and written.shape == (2, 20)
    with torch.no_grad():
        found, expected = model(written).logits.float().cpu(), plain(written.cpu()).logits
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < (CLOSE if dtype == torch.float32 else 0.1), errors  # a token may choose another expert


@pytest.mark.parametrize("options", [{"device_map": "cuda"}, {"device_map": {"": 0}}, {"device_map": "auto"}])
def test_device_maps_and_saving(options, folder, tmp_path):
    plain = coterie.from_pretrained(folder, "int8")
    model = coterie.from_pretrained(folder, "int8", **options)
    assert model.device == torch.device("cuda", 0)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(plain))


def test_moved_there_and_back(folder):
    model = coterie.from_pretrained(folder, "int8", dtype=torch.float32)
    expected = logits(model)
    with torch.inference_mode():
        found = model.to("cuda")(tiny_models.prompt().cuda()).logits.cpu()
    assert relative(found, expected) < CLOSE
    assert torch.equal(logits(model.cpu()), expected)


@pytest.mark.parametrize("moved", [False, True], ids=["adapters in RAM", "adapters on the GPU"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(moved, checkpointing, adapted):
    model, plain = adapted
    model = model.to("cuda") if moved else model
    in_ram = [name for name, p in model.named_parameters() if p.requires_grad and p.is_cpu]
    assert bool(in_ram) != moved and all("experts" in name for name in in_ram)
    if checkpointing:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=coterie.checkpointing())
    loss, expected = loss_and_gradients(plain)
    before, found = loss_and_gradients(model)
    assert before == pytest.approx(loss, rel=CLOSE)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.device == model.get_parameter(name).device, name
        assert relative(gradient.cpu(), expected[name]) < 5 * CLOSE, name

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for _ in range(5):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        after, _ = loss_and_gradients(model)
    assert after < before


@pytest.mark.parametrize("gpu_experts", [None, 3])
@pytest.mark.parametrize("retain", [False, True])
def test_checkpointing_beside_shared_experts(gpu_experts, retain, tmp_path):
    """They and experts on the GPU are ready for their backward when the experts in RAM are."""
    tiny_models.make("qwen2_moe").save_pretrained(tmp_path)
    options = {"dtype": torch.float32, "gpu_experts": gpu_experts}
    model = coterie.from_pretrained(tmp_path, "int4", "cuda", **options).requires_grad_(False)
    model = adapt(model, target_modules=["q_proj"], target_parameters=PARAMETERS).to("cuda").train()
    loss, expected = loss_and_gradients(model)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=coterie.checkpointing(retain))
    for _ in range(5):
        again, found = loss_and_gradients(model)
        assert again == pytest.approx(loss, rel=CLOSE)
        for name, gradient in found.items():
            assert relative(gradient.cpu(), expected[name].cpu()) < 5 * CLOSE, name


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer(bf16, adapted, tmp_path):
    model, _ = adapted
    rows = [{"input_ids": row, "labels": row} for row in tiny_models.prompt(8, 12)]
    options = {"per_device_train_batch_size": 2, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-3}
    options |= {"bf16": bf16, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    before = {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer = Trainer(model, TrainingArguments(str(tmp_path), **options), train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    for name, value in before.items():
        assert not torch.equal(model.get_parameter(name).detach().cpu(), value), name
