"""Run by torchrun: two processes train an adapter, each on half of a batch; the first compares with the whole batch.

Usage: two_ranks.py FOLDER; writes results.json and the adapter of the sharded model there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from lora_models import adapt, packed, relative
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import coterie
from coterie import tiny
from coterie.errors import ArgumentError
from coterie.hf import packed_parameters

BATCHES = torch.randint(3, 200, (4, 4, 16), generator=torch.Generator().manual_seed(1))


def make(checkpointing: bool = False):
    model = adapt(packed(tiny.PATH, "int8"), target_modules=["q_proj"])
    if checkpointing:
        model.train()
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=coterie.checkpointing())
    return model


def shard(model, **options):
    """FSDP2 over both processes."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.base_model.model.model.layers:
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def train(model, share: slice) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of all steps, gradients of the first."""
    losses, gradients = [], {}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    for batch in BATCHES:
        loss = model(batch[share], labels=batch[share]).loss
        loss.backward()
        if not gradients:
            named = model.named_parameters()
            gradients = {name.removeprefix("module."): whole(p.grad) for name, p in named if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), gradients


def main(folder: Path) -> None:
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    share = slice(2 * rank, 2 * rank + 2)
    results = {}

    def compare(name: str, model, ours) -> None:
        packed_before = packed_parameters(ours)
        losses, gradients = train(model, share)
        dist.all_reduce(losses)
        assert packed_parameters(ours) == packed_before and len(packed_before) == 8
        error, worst = max((relative(gradients[key], expected[1][key]), key) for key in expected[1])
        results[name] = {
            "losses": (losses / 2).tolist(),
            "expected": expected[0].tolist(),
            "gradient error": error,
            "of": worst,
        }

    expected = train(make(), slice(None))
    model = make()
    compare("ddp", DistributedDataParallel(model), model)
    model = make()
    try:
        shard(model)
    except ArgumentError as error:
        results["error"] = str(error)
    model = make()
    shard(model, ignored_params=packed_parameters(model))
    compare("fsdp", model, model)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    if rank == 0:
        model.save_pretrained(folder / "adapter", state_dict=state)
        torch.save({name: t for name, t in state.items() if "lora_" in name}, folder / "lora.pt")
    model = make(checkpointing=True)
    compare("fsdp, checkpointing", shard(model, ignored_params=packed_parameters(model)), model)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # Gloo's threads let go of tensors after a collective has returned, for which they need a Python that is not ending,
    # and caches of the sharded models keep the group, and so the threads, past destroy_process_group.
    os._exit(0)
