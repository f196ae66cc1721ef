"""Whole runs of a few steps on the bundled model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from safetensors.torch import load_file

import coterie
from coterie import tiny
from coterie.errors import ArgumentError, CheckpointError
from coterie.train import run
from coterie.train.checks import check_all
from coterie.train.config import EXPERT_PARAMETERS
from coterie.train.example import DATA

PREFERENCES = [{"path": str(DATA / "preferences.jsonl")}]
STEPS = [{"path": str(DATA / "steps.jsonl")}]
IDS = torch.arange(20, 60)[None]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_supervised(configure, train, tmp_path):
    """Chats, packed, with evaluation: the loss falls, and the adapter, metrics and curve are left behind."""
    few = (DATA / "train.jsonl").read_text().splitlines()[:8]
    (tmp_path / "few.jsonl").write_text("\n".join(few))
    config = configure(
        datasets=[{"path": str(tmp_path / "few.jsonl")}],
        sample_packing=True,
        max_steps=12,
        eval_steps=6,
        test_datasets=[{"path": str(DATA / "heldout.jsonl")}],
        gradient_checkpointing="retain_experts",
        profiler_steps=1,
        profiler_steps_start=2,
    )
    rows = train(config)
    losses = [row["loss"] for row in rows]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    output = tmp_path / "output"
    assert '"eval_loss"' in (output / "metrics.jsonl").read_text()
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (output / "README.md").read_text()
    assert f"Base model: `{tiny.PATH}`" in card and f"Trained on: `{tmp_path / 'few.jsonl'}`" in card
    assert "traceEvents" in (output / "trace.json").read_text()
    base = coterie.from_pretrained(tiny.PATH, "int8").requires_grad_(False)
    before = logits(base)
    assert not torch.equal(logits(PeftModel.from_pretrained(base, output)), before)


@pytest.mark.parametrize(
    "changes",
    [
        {"rl": "dpo", "datasets": PREFERENCES},
        {"reward_model": True, "datasets": PREFERENCES},
        {"process_reward_model": True, "datasets": STEPS},
        {
            "adapter": "qlora",
            "experts": "int4",
            "zero_point": True,
            "peft_use_rslora": True,
            "router_aux_loss_coef": 0.0,
        },
    ],
    ids=["dpo", "reward", "process reward", "qlora"],
)
def test_other_trainings(changes, configure, train, tmp_path):
    rows = train(configure(**changes))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    tensors = load_file(tmp_path / "output" / "adapter_model.safetensors")
    assert any(value.any() for name, value in tensors.items() if "experts" in name and "lora_B" in name)
    assert any("score" in name for name in tensors) == ("reward" in str(changes))


def test_router_auxiliary_loss(configure, train, tmp_path):
    """It is part of the loss, by its weight, and its gradient reaches the adapters of the layers before."""
    runs = {}
    for weight in (0.0, 1.0):
        output = tmp_path / str(weight)
        rows = train(configure(router_aux_loss_coef=weight, max_steps=1, output_dir=str(output)))
        runs[weight] = rows[0]["loss"], load_file(output / "adapter_model.safetensors")
    assert runs[1.0][0] - runs[0.0][0] > 1  # balanced routing has a loss of 1 or more
    first = next(name for name in runs[0.0][1] if "layers.0.mlp.experts" in name and "lora_B" in name)
    assert not torch.equal(runs[0.0][1][first], runs[1.0][1][first])


def test_resumed_run_is_the_run_without_a_stop(configure, train, tmp_path):
    whole = train(configure(max_steps=6, save_steps=3, output_dir=str(tmp_path / "whole")))
    options = {"max_steps": 6, "save_steps": 3, "output_dir": str(tmp_path / "resumed")}
    resumed = train(configure(**options, resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3")))
    assert [row["step"] for row in resumed] == [4, 5, 6]
    assert [row["loss"] for row in resumed] == [row["loss"] for row in whole[3:]]
    adapters = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed")]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_resumes_from_the_last_checkpoint(configure, train, tmp_path):
    options = {"max_steps": 4, "save_steps": 2, "auto_resume_from_checkpoints": True}
    whole = train(configure(**options))
    shutil.rmtree(tmp_path / "output" / "checkpoint-4")
    again = train(configure(**options))
    assert [(row["step"], row["loss"]) for row in again] == [(row["step"], row["loss"]) for row in whole]

    last = tmp_path / "output" / "checkpoint-4"
    damaged = last / "adapter_model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged"):
        train(configure(**options))
    damaged.unlink()
    with pytest.raises(CheckpointError, match="has no weights"):
        train(configure(**options))
    (last / "trainer_state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"trainer_state.json is damaged"):
        train(configure(**options))
    (last / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match=r"optimizer.pt missing"):
        train(configure(**options))


def test_unfrozen_beside_an_adapter(configure, train, tmp_path):
    train(configure(unfrozen_parameters=[r"^model\.norm", r"layers\.1\.mlp\.gate"], max_steps=2, learning_rate=0.1))
    tensors = load_file(tmp_path / "output" / "adapter_model.safetensors")
    full = sorted(name for name in tensors if "lora_" not in name)
    assert full == ["base_model.model.model.layers.1.mlp.gate.weight", "base_model.model.model.norm.weight"]
    assert not torch.equal(tensors[full[1]], load_file(tiny.PATH / "model.safetensors")["model.norm.weight"])


def test_unfrozen_alone(configure, train, tmp_path):
    """Without an adapter a whole packed checkpoint is saved."""
    train(configure(adapter=None, unfrozen_parameters=[r"norm"], max_steps=2, learning_rate=0.1))
    model = coterie.from_pretrained(tmp_path / "output")
    base = coterie.from_pretrained(tiny.PATH, "int8")
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, base.get_parameter(name))}
    assert changed and all("norm" in name for name in changed)


@pytest.mark.parametrize("adapter", ["lora", None])
def test_unfrozen_in_float32(adapter, configure, train, tmp_path):
    """Steps smaller than bfloat16 can tell are kept, whatever is recomputed, and over a stop."""
    patterns = [r"^model\.norm", r"layers\.1\.mlp\.gate", r"embed_tokens"]
    options = {"adapter": adapter, "unfrozen_parameters": patterns, "learning_rate": 1e-5, "save_steps": 2}
    names = ["model.norm.weight", "model.layers.1.mlp.gate.weight"]

    def tuned(name: str, **changes) -> dict[str, torch.Tensor]:
        train(configure(**options, **changes, output_dir=str(tmp_path / name)))
        (file,) = (tmp_path / name).glob("*model*.safetensors")
        tensors = load_file(file)
        return {name: tensors[("base_model.model." if adapter else "") + name] for name in names}

    kept = [tuned(str(kind), gradient_checkpointing=kind) for kind in (False, True, "retain_experts")]
    kept.append(tuned("resumed", resume_from_checkpoint=str(tmp_path / "False" / "checkpoint-2")))
    base = load_file(tiny.PATH / "model.safetensors")
    for name, tensor in kept[0].items():
        assert tensor.dtype == torch.float32
        moved = (tensor - base[name].float()).abs()
        assert 0 < moved.max() < 1e-4
        assert all(torch.equal(tensor, other[name]) for other in kept[1:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unfrozen_parameters": ["zebra"]}, "'zebra' matches no parameter of Qwen3MoeForCausalLM"),
        ({"unfrozen_parameters": ["("]}, "is not a regular expression"),
        ({"unfrozen_parameters": ["mlp"]}, "packed weights are frozen"),
        ({"lora_target_modules": ["nothing"], "lora_target_parameters": []}, "nothing matches no linear layer"),
        ({"lora_target_modules": ["q_proj", "w_proj"]}, "w_proj matches no linear layer of .*did you mean .*q_proj"),
        ({"lora_target_parameters": ["experts.up_proj"]}, "experts.up_proj matches no parameter"),
        ({"lora_model_dir": "nowhere"}, "nowhere has no adapter_config.json"),
        ({"optimizer": "zebra"}, "the trainer refuses these settings.*zebra"),
        ({"chat_template": "no.jinja"}, "found no file"),
    ],
)
def test_refused_before_anything_is_written(changes, message, configure, train, tmp_path):
    with pytest.raises(ArgumentError, match=message):
        train(configure(**changes))
    assert not (tmp_path / "output").exists()


def test_goes_on_from_an_adapter(configure, train, tmp_path):
    train(configure(output_dir=str(tmp_path / "first")))
    train(configure(lora_model_dir=str(tmp_path / "first"), learning_rate=1e-12, max_steps=1))
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("first", "output"))
    assert all(torch.allclose(first[name], second[name], atol=1e-6) for name in first)
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "first", other)
    config = (other / "adapter_config.json").read_text().replace('"r": 4', '"r": 5')
    (other / "adapter_config.json").write_text(config)
    with pytest.raises(ArgumentError, match="does not fit the model"):
        train(configure(lora_model_dir=str(other), lora_r=None, output_dir=str(tmp_path / "new")))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    """An adapter of rank 3 on attention and experts of the bundled model."""
    folder = tmp_path_factory.mktemp("adapter")
    lora = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=EXPERT_PARAMETERS,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    get_peft_model(coterie.from_pretrained(tiny.PATH, "int8"), lora).save_pretrained(folder)
    return folder


NOT_GIVEN = {"lora_r": None, "max_steps": 1, "learning_rate": 0.01}


@pytest.mark.parametrize("kind", [{}, {"reward_model": True, "datasets": PREFERENCES}], ids=["supervised", "reward"])
def test_unfrozen_beside_an_adapter_to_go_on_from(kind, adapter, configure, train, tmp_path):
    """It is trained too, and so is the head of another task than the adapter's."""
    train(configure(**NOT_GIVEN, **kind, lora_model_dir=str(adapter), unfrozen_parameters=[r"model\.norm"]))
    before, after = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "output"))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    full = sorted(after.keys() - before.keys())
    head = ["base_model.model.score.weight"] if kind else []
    assert full == ["base_model.model.model.norm.weight", *head]
    assert not torch.equal(after[full[0]], load_file(tiny.PATH / "model.safetensors")["model.norm.weight"].float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 16}, "lora_r: 16, but the adapter in lora_model_dir .* has 3"),
        ({"lora_alpha": 32}, "lora_alpha: 32, but .* has 6"),
        ({"peft_use_rslora": True}, "peft_use_rslora: True, but .* has False"),
        ({"lora_target_modules": ["q_proj", "v_proj"]}, r"lora_target_modules: \['q_proj', 'v_proj'\], but"),
        ({"lora_target_parameters": []}, r"lora_target_parameters: \[\], but .* has \['experts.*leave"),
    ],
    ids=str,
)
def test_an_adapter_other_than_the_file_says(changes, message, adapter, configure, monkeypatch):
    """Refused before the model is loaded; what the file does not say, or says alike, is the adapter's."""
    monkeypatch.setattr(run, "load_model", None)
    config = configure(**{**NOT_GIVEN, **changes}, lora_model_dir=str(adapter))
    for check in (check_all, lambda *given: run.train(*given, Console(quiet=True))):
        with pytest.raises(ArgumentError, match=message):
            check(config, Path())
    same = {"lora_r": 3, "lora_target_modules": ["q_proj"], "lora_target_parameters": EXPERT_PARAMETERS[::-1]}
    assert check_all(configure(**same, lora_model_dir=str(adapter)), Path()).train.num_rows == 248


def test_what_is_no_lora_is_no_adapter_to_go_on_from(configure, tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING"}')
    with pytest.raises(ArgumentError, match="is PROMPT_TUNING; expected a LoRA"):
        check_all(configure(lora_model_dir=str(tmp_path)), Path())


@pytest.mark.parametrize(("limit", "steps"), [("max_steps", 1), ("num_epochs", 2)])
def test_a_checkpoint_that_is_the_last_step(limit, steps, configure, train, tmp_path):
    """Trainer would train one more: refused before anything is loaded, and the way on that it names goes on."""
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join((DATA / "train.jsonl").read_text().splitlines()[:2]))
    options = {"datasets": [{"path": str(few)}], "save_steps": 1, "max_steps": -1}
    train(configure(**{**options, limit: steps}))
    last = tmp_path / "output" / f"checkpoint-{steps}"
    again = {**options, "resume_from_checkpoint": str(last), "output_dir": str(tmp_path / "again")}
    for check in (check_all, lambda *given: run.train(*given, Console(quiet=True))):
        with pytest.raises(ArgumentError, match=rf"checkpoint-{steps} is where this run ends.*raise {limit} \({steps}"):
            check(configure(**{**again, limit: steps}), Path())
    assert not (tmp_path / "again").exists()
    assert [row["step"] for row in train(configure(**{**again, limit: steps + 1}))] == [steps + 1]
