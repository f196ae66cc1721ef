"""The experts implementation "coterie" on models that are loaded already, and what a packed model can do."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from engine_cases import BF16_ACTIVATIONS
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig

import coterie
from coterie.errors import ArgumentError, UnsupportedModelError
from coterie.hf.inference.attention import attend_as_before
from coterie.hf.layout import is_experts
from coterie.hf.modules import packed_modules
from coterie.hf.weight import PackedWeight


def logits(model) -> torch.Tensor:
    with torch.inference_mode():
        return model(tiny_models.prompt()).logits.float()


def relative(found, expected) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def experts_of(model) -> nn.Module:
    return next(module for module in model.modules() if is_experts(module))


@pytest.fixture
def packed(checkpoint):
    return coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8", dtype=torch.float32)


# --- a model loaded by Transformers alone ---


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_packs_on_first_use(family, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.set_experts_implementation("coterie")
    assert not list(packed_modules(model))
    found = logits(model)
    assert len(list(packed_modules(model))) == 2
    loaded = coterie.from_pretrained(checkpoint(family), experts="bf16")
    attend_as_before(loaded)
    assert torch.equal(found, logits(loaded))
    # The dense parameters are gone, their values are not.
    assert all(isinstance(p, PackedWeight) for p in experts_of(model).parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_saves_as_it_was(family, checkpoint, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), experts_implementation="coterie")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint(family)).state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in again.state_dict().items())
    again.set_experts_implementation("coterie")
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("other", ["eager", "grouped_mm", "batched_mm"])
def test_other_implementations_go_on_working(other, checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("gpt_oss"), dtype=torch.float32)
    model.set_experts_implementation("coterie")
    found = logits(model)
    model.set_experts_implementation(other)
    rounds = coterie.cpu.current_isa() in BF16_ACTIVATIONS
    assert 0 < relative(logits(model), found) < (5e-3 if rounds else 1e-5)


def test_warns_when_packing_rounds(checkpoint, caplog):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), dtype=torch.float32)
    model.set_experts_implementation("coterie")
    logits(model)
    assert "packing Qwen3MoeExperts rounds its float32 weights to bfloat16" in caplog.text


def test_refuses_to_train_dense_weights(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), experts_implementation="coterie").train()
    with pytest.raises(ArgumentError, match="the weights of Qwen3MoeExperts are being trained"):
        model(tiny_models.prompt())
    model.requires_grad_(False)
    assert model(tiny_models.prompt()).logits.isfinite().all()


@pytest.mark.parametrize("evaluating", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_refuses_to_train_what_an_evaluation_packed(evaluating, checkpoint):
    """Packed by an evaluation before training, the experts would not learn, and nobody would be told."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), experts_implementation="coterie").eval()
    for _ in range(2):
        with evaluating():
            model(tiny_models.prompt())
    model.train()
    with pytest.raises(ArgumentError, match="the weights of Qwen3MoeExperts are being trained"):
        model(tiny_models.prompt())
    with torch.no_grad():
        model(tiny_models.prompt())
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).train()  # freezes all but itself
    adapted(tiny_models.prompt()).logits.sum().backward()
    assert any(p.grad is not None for name, p in adapted.named_parameters() if "lora_" in name)


def test_refuses_meta_weights():
    with torch.device("meta"):
        module = experts_of(tiny_models.make("qwen3_moe"))
    module.config._experts_implementation = "coterie"
    with pytest.raises(ArgumentError, match="on meta"):
        module(torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))


def test_refuses_what_no_kernel_computes():
    model = tiny_models.make("qwen3_moe", hidden_act="tanh")
    model.set_experts_implementation("coterie")
    with pytest.raises(UnsupportedModelError, match="Qwen3MoeExperts is not supported"):
        logits(model)


def test_refuses_expert_parallelism(packed):
    module = experts_of(packed)
    module._is_expert_parallel = True
    with pytest.raises(UnsupportedModelError, match="Qwen3MoeExperts is under expert parallelism"):
        logits(packed)


# --- a packed model ---


@torch.inference_mode()
def test_compile(packed):
    prompt = tiny_models.prompt()
    expected = packed(prompt).logits
    torch._dynamo.reset()
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    assert relative(compiled(prompt).logits, expected) < 1e-5
    assert relative(compiled(prompt[:, :7]).logits, packed(prompt[:, :7]).logits) < 1e-5


@torch.inference_mode()
def test_compiled_generate(packed):
    prompt = tiny_models.prompt()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = packed.generate(prompt, **options)
    compile_config = CompileConfig(backend="aot_eager", mode=None)
    compile_config._compile_all_devices = True
    torch._dynamo.reset()
    found = packed.generate(prompt, **options, cache_implementation="static", compile_config=compile_config)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert torch.equal(found, expected)


def test_copies_share_the_packed_bytes(packed):
    twin = copy.deepcopy(packed)
    assert torch.equal(logits(twin), logits(packed))
    for (_, a), (_, b) in zip(packed_modules(packed), packed_modules(twin), strict=True):
        assert a.experts is b.experts
    del packed
    assert logits(twin).isfinite().all()


@pytest.mark.parametrize("cast", ["half", "float", "bfloat16"])
def test_casts(cast, packed, checkpoint):
    """The packed bytes stay as they are: the same bits as from a model that was loaded in that dtype."""
    same, dtype = getattr(packed, cast)(), getattr(torch, cast)
    assert same is packed
    assert {p.dtype for p in packed.parameters()} == {dtype}
    loaded = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8", dtype=dtype)
    loaded.model.rotary_emb.to(dtype)  # its frequencies are float32 when loaded, and cast with the model
    with torch.inference_mode():
        found, expected = packed(tiny_models.prompt()).logits, loaded(tiny_models.prompt()).logits
    assert found.dtype == dtype and torch.equal(found, expected)


def test_to(packed):
    before = logits(packed)
    packed.to("cpu").to(torch.float32).cpu().eval().requires_grad_(False)
    packed.to(device="cpu", dtype=torch.float32)
    assert torch.equal(logits(packed), before)
    assert all(isinstance(p, PackedWeight) for p in experts_of(packed).parameters())


def test_state_dict_misses_nothing_in_silence(packed):
    state = packed.state_dict()
    assert packed.load_state_dict(state).missing_keys == []
    broken = {name: value for name, value in state.items() if "q_proj" not in name}
    with pytest.raises(RuntimeError, match="q_proj"):
        packed.load_state_dict(broken)


def test_counts(packed, checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), dtype=torch.float32)
    assert packed.num_parameters() == plain.num_parameters()
    assert [n for n, _ in packed.named_parameters()] == [n for n, _ in plain.named_parameters()]
    experts = sum(module.experts.nbytes for _, module in packed_modules(packed))
    dense = sum(p.nbytes for n, p in plain.named_parameters() if ".experts." in n)
    assert packed.get_memory_footprint() == plain.get_memory_footprint() - dense + experts


def test_dequantize(packed, checkpoint, tmp_path):
    expected = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"), dtype=torch.float32)
    expected.set_experts_implementation("eager")
    for name, module in packed_modules(packed):
        gate, up, down = module.experts.dequantize()
        expected.get_submodule(name).gate_up_proj.data = torch.cat([gate, up], dim=1)
        expected.get_submodule(name).down_proj.data = down
        module.experts.activations = "bf16"
    before = logits(packed)
    plain = packed.dequantize(torch.float32)
    plain.set_experts_implementation("eager")
    assert not list(packed_modules(plain))
    assert torch.equal(logits(plain), logits(expected))
    assert relative(before, logits(plain)) < 2**-8  # weights, and on some CPUs activations, rounded to bf16
    plain.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert torch.equal(logits(again), logits(plain))


def test_dynamic_class_is_the_model_class(packed, checkpoint):
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("qwen3_moe"))
    assert isinstance(packed, type(plain))
    assert (type(packed).__name__, type(packed).__module__) == (type(plain).__name__, type(plain).__module__)


def test_peft_finds_the_parameters(packed, tmp_path):
    """PEFT targets the storage-less parameters: gate_up inside, down outside, shapes as on the plain model."""
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = get_peft_model(packed, config)
    names = [name for name, p in model.named_parameters() if p.requires_grad and "layers.0.mlp" in name]
    shapes = {name.partition("experts.")[2]: tuple(model.get_parameter(name).shape) for name in names}
    assert shapes == {
        "base_layer.lora_A.default.weight": (32, 64),
        "base_layer.lora_B.default.weight": (192, 32),
        "lora_A.default.weight": (32, 96),
        "lora_B.default.weight": (64, 32),
    }
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_freed_with_the_model(checkpoint):
    """No cycle keeps a packed model alive once it is dropped."""
    import gc
    import weakref

    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8")
    experts = weakref.ref(experts_of(model).packed_module.experts)
    gc.collect()
    gc.disable()
    try:
        del model
        assert experts() is None
    finally:
        gc.enable()
