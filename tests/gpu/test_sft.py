"""`coterie sft` on a device that stands in for a GPU, beside the same run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

for name in ("peft", "accelerate", "trl", "datasets"):
    pytest.importorskip(name)

from accelerate.state import AcceleratorState  # noqa: E402
from rich.console import Console  # noqa: E402
from sft_runs import OBJECTIVES, configure  # noqa: E402
from short_runs import SHORT  # noqa: E402

from coterie.errors import ArgumentError, DeviceError  # noqa: E402
from coterie.gpu import device as devices  # noqa: E402
from coterie.train import config as configs  # noqa: E402
from coterie.train import processes, run  # noqa: E402
from coterie.train.checks import check_all  # noqa: E402

PLACES = {"in RAM": {}, "all": {"gpu_experts": "all"}, "some": {"gpu_experts": 3}}
CLOSE = 0.02  # bfloat16 rounds otherwise where products are added in another order


@pytest.fixture
def device(pretend, monkeypatch) -> dict[str, str]:
    """What a file says to train on the device that stands in, which Trainer is told of."""
    monkeypatch.setattr(configs, "DEVICES", ("cpu", pretend.NAME))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(pretend.DEVICE))
    yield {"device": pretend.NAME}
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(config, **options):
    """The trainer of a run once it has trained. Nothing is saved: that takes tensors with storage."""
    trainer = run.load_trainer(config, check_all(config, Path()))
    trainer.args.save_strategy = "no"
    trainer.train(**options)
    return trainer


def losses(trainer, name="loss"):
    return [row[name] for row in trainer.state.log_history if name in row]


# The device that stands in has no histogram of integers, which the balancing loss of packed samples takes, and keeps
# the dtype of parameters whose data is replaced, as those trained in full are.
IN_FLOAT32 = {name: {"bf16": False} for name in ("reward", "steps", "unfrozen")}
WITHOUT = IN_FLOAT32 | {"packed": {"router_aux_loss_coef": 0.0}}
RUNS = [("supervised", place) for place in PLACES] + [(name, "some") for name in OBJECTIVES if name != "supervised"]


@pytest.mark.parametrize(("objective", "place"), RUNS)
def test_losses_are_those_of_the_cpu(objective, place, device, pretend, tmp_path):
    """And adapters of experts are where experts are: in RAM, or on the device as all else."""
    changes = {"max_steps": 2, "eval_steps": 2, **OBJECTIVES[objective], **WITHOUT.get(objective, {})}
    changes["test_datasets"] = few(changes.get("datasets", SHORT["datasets"]), tmp_path)
    expected = trained(configure(tmp_path / "cpu", **changes))
    found = trained(configure(tmp_path / "gpu", **changes, **PLACES[place], **device))
    for name, count in (("loss", 2), ("eval_loss", 1)):
        assert len(losses(expected, name)) == count
        assert losses(found, name) == pytest.approx(losses(expected, name), rel=CLOSE)
    for name, parameter in found.model.named_parameters():
        if "lora_" in name or "experts" not in name:
            in_ram = "experts" in name and place == "in RAM"
            assert parameter.device == (torch.device("cpu") if in_ram else pretend.DEVICE), name


def few(datasets, folder):
    """The first rows of a data set, to evaluate on."""
    file = folder / "few.jsonl"
    file.write_text("\n".join(Path(datasets[0]["path"]).read_text().splitlines()[:5]))
    return [{"path": str(file)}]


@pytest.mark.parametrize("place", PLACES)
def test_resumed(place, device, tmp_path):
    """A checkpoint of a run on the CPU goes on on the device."""
    options = {"max_steps": 4, "save_steps": 2}
    run.train(configure(tmp_path / "cpu", **options), Path(), Console(quiet=True))
    rows = map(json.loads, (tmp_path / "cpu" / "metrics.jsonl").read_text().splitlines())
    expected = [row["loss"] for row in rows if "loss" in row]
    checkpoint = str(tmp_path / "cpu" / "checkpoint-2")
    config = configure(tmp_path / "gpu", **options, **PLACES[place], **device)
    found = trained(config, resume_from_checkpoint=checkpoint)
    assert losses(found) == pytest.approx(expected, rel=CLOSE)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"gpu_experts": 17}, ArgumentError, r"gpu_experts: expected .* each layer's 16 experts, .* found 17"),
        ({"gpu_experts": 1.5}, ArgumentError, r"a fraction in \(0, 1\], .* found 1\.5"),
        ({"gpu_experts": "all"}, DeviceError, r"pretend:0 has compute capability 7\.5"),
        ({"vram": "900kB"}, DeviceError, r"all but the experts \(.*\) needs .* 0\.0009 GB are free: use device='cpu'"),
        ({"vram": "2MB", "gpu_experts": "all"}, DeviceError, "and the experts chosen by gpu_experts"),
    ],
    ids=str,
)
def test_refused_before_anything_is_packed(changes, error, message, device, tmp_path, monkeypatch):
    changes = dict(changes)
    if vram := changes.pop("vram", None):
        monkeypatch.setenv("COTERIE_VRAM", vram)
    elif error is DeviceError:
        monkeypatch.setattr(devices, "capability", lambda device: (7, 5))
    config = configure(tmp_path / "run", **changes, **device)
    with pytest.raises(error, match=message):
        check_all(config, tmp_path)


def test_no_cuda(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    with pytest.raises(DeviceError, match=r"device='cuda' cannot be used here: .*; leave it out, or use 'cpu'"):
        check_all(configure(tmp_path / "run", device="cuda", gpu_experts="all"), tmp_path)
    assert not (tmp_path / "run").exists()


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(processes, "usable", asked.append)
    processes.own_device("cuda")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for device in ("cuda", "cpu"):
        processes.own_device(device)
    assert asked == ["cuda", "cuda:1", "cpu"]
