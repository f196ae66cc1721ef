"""One script for two engines: a training step of a layer of experts, and its errors against plain torch.

    python examples/kt_wrapper.py                      # coterie
    python examples/kt_wrapper.py --engine kt_kernel   # kt-kernel, where it is installed and runs on this CPU
"""

from __future__ import annotations

import argparse
import importlib

import torch
from torch import Tensor

E, K, H, I, R, T = 16, 4, 512, 256, 8, 32  # noqa: E741
SCALING = 2.0
PROJECTIONS = {"gate": (H, I), "up": (H, I), "down": (I, H)}


def plain(x: Tensor, ids: Tensor, weights: Tensor, dense: dict[str, Tensor], lora: dict[str, Tensor]) -> Tensor:
    """The layer in float32."""
    out = torch.zeros(x.shape)
    for e in ids.unique().tolist():
        t, k = (ids == e).nonzero(as_tuple=True)

        def project(v: Tensor, name: str, e: int = e) -> Tensor:
            low = v @ lora[f"{name}_lora_a"][e].T
            return v @ dense[name][e].float().T + SCALING * low @ lora[f"{name}_lora_b"][e].T

        hidden = torch.nn.functional.silu(project(x[t], "gate")) * project(x[t], "up")
        out = out.index_add(0, t, project(hidden, "down") * weights[t, k, None])
    return out


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def errors(engine: str, method: str) -> dict[str, float]:
    """Relative errors of the output and of every gradient."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    dense = {n: (draw(E, rows, cols) / cols**0.5).bfloat16() for n, (cols, rows) in PROJECTIONS.items()}
    lora = {}
    for name, (cols, rows) in PROJECTIONS.items():
        lora[f"{name}_lora_a"] = (draw(E, R, cols) / cols**0.5).bfloat16()
        lora[f"{name}_lora_b"] = (draw(E, rows, R) / 10).bfloat16()
    grads = {f"grad_{name}": torch.zeros_like(factor) for name, factor in lora.items()}
    x, grad = draw(T, H).bfloat16(), draw(T, H).bfloat16()
    ids = torch.stack([torch.randperm(E, generator=random)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=random)

    moe = importlib.import_module(engine).KTMoEWrapper(
        layer_idx=0, num_experts=E, num_experts_per_tok=K, hidden_size=H, moe_intermediate_size=I,
        gpu_experts_mask=None, cpuinfer_threads=2, threadpool_count=1, weight_path=None, chunked_prefill_size=512,
        mode="sft", method=method, lora_rank=R, lora_alpha=SCALING * R,
    )  # fmt: skip
    moe.init_lora_weights(**lora, **grads)
    moe.load_weights_from_tensors(*(dense[name].clone() for name in PROJECTIONS), torch.arange(E))
    y = moe.forward(x, ids, weights, save_for_backward=True)
    grad_x, grad_weights = moe.backward(grad)

    inputs = {"x": x.float(), "weights": weights, **{name: factor.float() for name, factor in lora.items()}}
    for tensor in inputs.values():
        tensor.requires_grad_()
    truth = plain(inputs["x"], ids, inputs["weights"], dense, {name: inputs[name] for name in lora})
    wanted = dict(zip(inputs, torch.autograd.grad(truth, list(inputs.values()), grad.float()), strict=True))
    found = {"x": grad_x, "weights": grad_weights, **{name: grads[f"grad_{name}"] for name in lora}}
    return {"output": error(y, truth.detach()), **{name: error(found[name], wanted[name]) for name in found}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", default="coterie.kt", choices=("coterie.kt", "kt_kernel"))
    parser.add_argument("--method", default="AMXBF16_SFT")
    arguments = parser.parse_args()
    for name, value in errors(arguments.engine, arguments.method).items():
        print(f"{name:12} {value:.4f}")


if __name__ == "__main__":
    main()
