"""Transformers models whose experts are in RAM and whose rest is on a device."""

from __future__ import annotations

import pytest
import tiny_models
import torch
from lora_models import PARAMETERS, adapt, relative
from packed_models import assert_same_bytes

import coterie
from coterie import memory
from coterie.errors import ArgumentError, DeviceError
from coterie.hf.weight import PackedWeight

OPTIONS = {"dtype": torch.float32, "attn_implementation": "eager"}  # other attention differs between devices


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The folder of a plain checkpoint of a family."""

    def get(family: str):
        folder = tmp_path_factory.getbasetemp() / family
        if not folder.exists():
            tiny_models.make(family).save_pretrained(folder)
        return folder

    return get


def loss_and_gradients(model, device):
    ids = tiny_models.prompt(2, 12).to(device)
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe", "gpt_oss", "deepseek_v3", "granitemoe"])
def test_a_model_computes_the_same(family, checkpoint, pretend):
    model = coterie.from_pretrained(checkpoint(family), "int4", pretend.NAME, **OPTIONS)
    plain = coterie.from_pretrained(checkpoint(family), "int4", **OPTIONS)
    for name, parameter in model.named_parameters():
        assert parameter.device.type == ("cpu" if isinstance(parameter, PackedWeight) else pretend.NAME), name
    assert model.device == pretend.DEVICE
    assert_same_bytes(model, plain)
    ids = tiny_models.prompt()
    with torch.no_grad():
        torch.testing.assert_close(model(ids.to(pretend.DEVICE)).logits.cpu(), plain(ids).logits)
    found = model.generate(ids.to(pretend.DEVICE), max_new_tokens=5, do_sample=False)
    assert torch.equal(found.cpu(), plain.generate(ids, max_new_tokens=5, do_sample=False))


@pytest.mark.parametrize("options", [{"device_map": "pretend"}, {"device_map": {"": "pretend:0"}}])
def test_packed_checkpoints(options, checkpoint, tmp_path, pretend):
    plain = coterie.from_pretrained(checkpoint("qwen3_moe"), "int8")
    plain.save_pretrained(tmp_path)
    model = coterie.from_pretrained(tmp_path, mmap=True, **options)
    assert model.device == pretend.DEVICE
    assert_same_bytes(model, plain)
    ids = tiny_models.prompt()
    with torch.no_grad():
        assert torch.equal(model.to("cpu")(ids).logits, plain(ids).logits)


def test_moved_after_loading(checkpoint, pretend):
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), "int8", **OPTIONS)
    ids = tiny_models.prompt()
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(model.to(pretend.DEVICE)(ids.to(pretend.DEVICE)).logits.cpu(), expected)
        assert torch.equal(model.to("cpu")(ids).logits, expected)


def test_dequantised(checkpoint, pretend):
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), "int8", pretend.NAME, **OPTIONS)
    model.dequantize()
    assert {parameter.device for parameter in model.parameters()} == {pretend.DEVICE}


@pytest.mark.parametrize("moved", [False, True], ids=["adapters in RAM", "adapters on the device"])
def test_training(moved, checkpoint, pretend):
    """PEFT puts the adapters of experts beside them, in RAM; moving the model, as Trainer does, takes them along."""
    path, options = checkpoint("qwen3_moe"), {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    plain = adapt(coterie.from_pretrained(path, "int4", **OPTIONS), **options)
    model = adapt(coterie.from_pretrained(path, "int4", pretend.NAME, **OPTIONS), **options)
    for name, parameter in [*plain.named_parameters(), *model.named_parameters()]:
        parameter.requires_grad_(parameter.requires_grad or name.endswith("gate.weight"))  # the router's
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                model.get_parameter(name).copy_(parameter)
    model = model.to(pretend.DEVICE) if moved else model
    in_ram = [name for name, p in model.named_parameters() if p.requires_grad and p.is_cpu]
    assert bool(in_ram) != moved and all("experts" in name for name in in_ram)

    loss, expected = loss_and_gradients(plain, "cpu")
    before, found = loss_and_gradients(model, pretend.DEVICE)
    assert before == pytest.approx(loss, rel=1e-5)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.device == model.get_parameter(name).device, name
        assert relative(gradient.cpu(), expected[name]) < 1e-3, name

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach=False)
    for _ in range(3):
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
        optimizer.step()
        after, _ = loss_and_gradients(model, pretend.DEVICE)
    assert after < before


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"device": "cuda:99"}, DeviceError, r"device='cuda:99' cannot be used here: .*; leave it out, or use 'cpu'"),
        ({"device_map": {"": "cuda:99"}}, DeviceError, "device='cuda:99'"),
        ({"device": "elsewhere"}, DeviceError, "device='elsewhere'"),
        ({"device": "meta"}, ArgumentError, "expected a device that holds values"),
        ({"device_map": {"model": "cpu", "lm_head": "cuda:0"}}, ArgumentError, "expected one device for all but"),
        ({"device_map": "balanced"}, ArgumentError, "device_map='balanced': expected one device"),
        ({"device_map": {"": "disk"}}, ArgumentError, "expected one device"),
        ({"device": "cuda", "device_map": "auto"}, ArgumentError, "expected device or device_map, found both"),
    ],
)
def test_refused_devices(options, error, message, checkpoint):
    with pytest.raises(error, match=message):
        coterie.from_pretrained(checkpoint("qwen3_moe"), **options)


def test_only_the_experts_need_ram(checkpoint, pretend, monkeypatch):
    path, asked = checkpoint("qwen3_moe"), []
    monkeypatch.setattr(memory, "require", lambda needed, what: asked.append(needed) if "experts in" in what else None)
    model = coterie.from_pretrained(path, "int8", pretend.NAME)
    coterie.from_pretrained(path, "int8")
    rest = sum(p.nbytes for p in model.parameters() if not isinstance(p, PackedWeight))
    assert asked[1] - asked[0] == rest and asked[0] > 0


PLACES = ["all", 3, 0.5, [[True, False] * 4, [False] * 8]]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("gpu_experts", [*PLACES[:3], "stream:0"], ids=str)
def test_experts_on_the_device(gpu_experts, family, checkpoint, pretend):
    options = OPTIONS | {"activations": "bf16"}
    model = coterie.from_pretrained(checkpoint(family), "int4", pretend.NAME, gpu_experts=gpu_experts, **options)
    plain = coterie.from_pretrained(checkpoint(family), "int4", **options)
    ids = tiny_models.prompt()
    with torch.no_grad():
        found, expected = model(ids.to(pretend.DEVICE)).logits.cpu(), plain(ids).logits
    errors = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.02, errors  # a token may choose another expert
    assert model.generate(ids.to(pretend.DEVICE), max_new_tokens=3, do_sample=False).shape == (2, 15)


@pytest.mark.parametrize("gpu_experts", [*PLACES, "stream:0"], ids=["all", "number", "fraction", "mask", "stream"])
def test_saved_and_opened_again(gpu_experts, checkpoint, tmp_path, pretend):
    plain = coterie.from_pretrained(checkpoint("qwen3_moe"), "int8")
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), "int8", pretend.NAME, gpu_experts=gpu_experts)
    model.to("cpu").save_pretrained(tmp_path)  # Transformers asks for storages, which the pretended device has not
    assert "gpu_experts" not in (tmp_path / "config.json").read_text()
    ids = tiny_models.prompt()
    again = coterie.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, plain(ids).logits)
        there = coterie.from_pretrained(tmp_path, device=pretend.NAME, gpu_experts=gpu_experts, mmap=True)
        found, expected = (m(ids.to(pretend.DEVICE)).logits.cpu() for m in (there, model.to(pretend.DEVICE)))
        assert torch.equal(found, expected)


def test_streamed_experts_decode_in_ram(checkpoint, pretend):
    """A prompt on the device, its twelve tokens being many, and each token that follows in RAM."""
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), "int4", pretend.NAME, gpu_experts="stream:12", **OPTIONS)
    ids = tiny_models.prompt().to(pretend.DEVICE)
    pretend.copied.clear()
    model.generate(ids[:1], max_new_tokens=4, do_sample=False)
    packed = [shape for place, shape, dtype in pretend.copied if (place, dtype) == ("device", torch.uint8)]
    expert = model.model.layers[0].mlp.experts.packed_module.experts.expert_nbytes
    assert [nbytes for _, nbytes in packed] == [expert] * 2  # layers
    tokens = [shape[0] for place, shape, _ in pretend.copied if place == "host" and shape[1:] == (64,)]
    assert tokens == [1] * 6


def test_moved_experts_refuse_the_cpu(checkpoint, pretend):
    path = checkpoint("qwen3_moe")
    model = coterie.from_pretrained(path, "int8", pretend.NAME, gpu_experts="all")
    with pytest.raises(ArgumentError, match="x: expected a tensor on pretend:0, found cpu"):
        model.to("cpu")(tiny_models.prompt())
    with pytest.raises(ArgumentError, match="gpu_experts needs a GPU"):
        coterie.from_pretrained(path, "int8", gpu_experts="all")
    with pytest.raises(ArgumentError, match="gpu_experts needs a GPU"):
        coterie.from_pretrained(path, "int8", gpu_experts="stream")
    with pytest.raises(ArgumentError, match='expected "stream", or "stream:256"'):
        coterie.from_pretrained(path, "int8", pretend.NAME, gpu_experts="stream:many")
    with pytest.raises(ArgumentError, match=r"gpu_experts: expected .* 2 layers by experts, found 9"):
        coterie.from_pretrained(path, "int8", pretend.NAME, gpu_experts=9)


@pytest.mark.parametrize("gpu_experts", [*PLACES, "stream:0"], ids=["all", "number", "fraction", "mask", "stream"])
@pytest.mark.parametrize("moved", [False, True], ids=["adapters in RAM", "adapters on the device"])
def test_training_experts_on_the_device(gpu_experts, moved, checkpoint, pretend):
    path, options = checkpoint("qwen3_moe"), {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    plain = adapt(coterie.from_pretrained(path, "int4", **OPTIONS), **options)
    model = adapt(coterie.from_pretrained(path, "int4", pretend.NAME, gpu_experts=gpu_experts, **OPTIONS), **options)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "lora_" in name:
                model.get_parameter(name).copy_(parameter)
    model = model.to(pretend.DEVICE) if moved else model
    loss, expected = loss_and_gradients(plain, "cpu")
    before, found = loss_and_gradients(model, pretend.DEVICE)
    assert before == pytest.approx(loss, rel=0.02)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.device == model.get_parameter(name).device, name
        assert relative(gradient.cpu(), expected[name]) < 0.1, name


def test_ram_for_experts_on_the_device(checkpoint, pretend, monkeypatch):
    """A layer is whole in RAM while it is packed."""
    path, asked = checkpoint("qwen3_moe"), []
    monkeypatch.setattr(memory, "require", lambda needed, what: asked.append(needed) if "experts in" in what else None)
    for gpu_experts in (None, 6, "all"):
        model = coterie.from_pretrained(path, "int8", pretend.NAME, gpu_experts=gpu_experts)
    whole = model.model.layers[0].mlp.experts.packed_module.experts.nbytes
    assert asked == [2 * whole, 2 * whole // 4 + whole, whole]
