"""`coterie sft` on a real GPU, beside the same run on the CPU."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
for name in ("peft", "accelerate", "trl", "datasets"):
    pytest.importorskip(name)

from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from sft_runs import OBJECTIVES, configure, losses  # noqa: E402
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: E402

import coterie  # noqa: E402
from coterie import tiny  # noqa: E402
from coterie.adapters.merge import merge_adapter  # noqa: E402
from coterie.train.checks import check_all  # noqa: E402
from coterie.train.example import DATA  # noqa: E402
from coterie.train.run import load_trainer  # noqa: E402

CLOSE = 0.02  # bfloat16 rounds otherwise where products are added in another order
CLOSE_DIFFERENCES = 0.05  # of log-probabilities of two answers and two models
NEW_HEADS = "reward", "steps"  # which the GPU's own generator of random numbers draws
PLACES = {"in RAM": {}, "all": {"gpu_experts": "all"}, "some": {"gpu_experts": 3}, "half": {"gpu_experts": 0.5}}
places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)


@places
@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name not in NEW_HEADS])
def test_losses_are_those_of_the_cpu(objective, place, tmp_path):
    changes = OBJECTIVES[objective]
    expected = losses(configure(tmp_path / "cpu", **changes))
    found = losses(configure(tmp_path / "gpu", **changes, **place, device="cuda"))
    assert found[0] == pytest.approx(expected[0], rel=1e-3)  # nothing is trained yet
    close = CLOSE_DIFFERENCES if objective == "dpo" else CLOSE
    assert len(found) == 4 and found == pytest.approx(expected, rel=close)


@pytest.mark.parametrize("objective", NEW_HEADS)
def test_new_heads_are_trained(objective, tmp_path):
    found = losses(configure(tmp_path / "gpu", **OBJECTIVES[objective], gpu_experts="all", device="cuda"))
    assert len(found) == 4 and found[-1] < found[0]


@places
@pytest.mark.parametrize("bf16", [True, False])
def test_where_parameters_are_and_what_they_are(bf16, place, tmp_path):
    config = configure(tmp_path / "run", bf16=bf16, **place, device="cuda")
    trainer = load_trainer(config, check_all(config, tmp_path))
    trainer.train()
    assert trainer.args.n_gpu == 1
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name:
            in_ram = "experts" in name and not place
            assert (parameter.device.type, parameter.dtype) == ("cpu" if in_ram else "cuda", torch.float32), name
        elif "experts" not in name:
            assert parameter.is_cuda and parameter.dtype == (torch.bfloat16 if bf16 else torch.float32), name


@places
def test_evaluation(place, tmp_path):
    changes = {"test_datasets": [{"path": str(DATA / "heldout.jsonl")}], "eval_steps": 2}
    expected = losses(configure(tmp_path / "cpu", **changes), "eval_loss")
    found = losses(configure(tmp_path / "gpu", **changes, **place, device="cuda"), "eval_loss")
    assert len(found) == 2 and found == pytest.approx(expected, rel=CLOSE)


@places
def test_resumed(place, tmp_path):
    options = {"max_steps": 6, "save_steps": 3, "device": "cuda", **place}
    whole = losses(configure(tmp_path / "whole", **options))
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    resumed = losses(configure(tmp_path / "resumed", **options, resume_from_checkpoint=str(checkpoint)))
    assert resumed == pytest.approx(whole[3:], rel=CLOSE)
    on_the_cpu = configure(tmp_path / "cpu", max_steps=6, save_steps=3, resume_from_checkpoint=str(checkpoint))
    assert losses(on_the_cpu) == pytest.approx(whole[3:], rel=CLOSE)


@places
def test_adapters_load_and_merge_as_others(place, tmp_path):
    losses(configure(tmp_path / "run", **place, device="cuda", learning_rate=0.01))
    losses(configure(tmp_path / "cpu", learning_rate=0.01))
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("run", "cpu"))
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    merge_adapter(tmp_path / "run", tmp_path / "merged", str(tiny.PATH))
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny.PATH), tmp_path / "run")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        one, two = (model.float()(ids).logits for model in (adapted, merged))
    assert (one - two).norm() / one.norm() < CLOSE


def test_workers_that_fork(tmp_path):
    """They read rows, and leave the GPU alone."""
    model = coterie.from_pretrained(tiny.PATH, "int8", "cuda", gpu_experts=3)
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 200, (8, 12)).tolist()]
    options = {"per_device_train_batch_size": 2, "max_steps": 4, "report_to": "none", "save_strategy": "no"}
    args = TrainingArguments(str(tmp_path), dataloader_num_workers=2, disable_tqdm=True, **options)
    assert Trainer(model, args, train_dataset=rows).train().global_step == 4
