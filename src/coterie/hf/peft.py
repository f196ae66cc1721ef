"""LoRA on packed experts: PEFT's `target_parameters`, computed by coterie's kernels.

PEFT wraps each targeted parameter in a `ParamWrapper` that adds the product of A and B to the weights before the module
runs. Packed weights cannot be added to, so around packed experts the wrappers hand their A and B to the experts
instead. Everything else, the adapter's names, shapes and files included, stays PEFT's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from coterie.errors import ArgumentError
from coterie.hf.experts import NAME, pack_module
from coterie.hf.layout import Layout, is_experts
from coterie.hf.modules import packed_module, packed_modules
from coterie.lora import ExpertLora

INITS = (True, False, "gaussian")

stock_inject_adapter = BaseTuner.inject_adapter
stock_init = ParamWrapper.__init__
stock_update_layer = ParamWrapper.update_layer
stock_forward = ParamWrapper.forward
stock_check_merge_allowed = LoraModel._check_merge_allowed


def computed_here(module: nn.Module) -> bool:
    """Whether `module` is an experts module that coterie computes."""
    return is_experts(module) and module.config._experts_implementation == NAME


def wrappers(outer: nn.Module) -> Iterator[ParamWrapper]:
    """The chain of wrappers around one module, from the outside in."""
    while isinstance(outer, ParamWrapper):
        yield outer
        outer = outer.base_layer


def factors(wrapper: ParamWrapper, adapter: str) -> tuple[Tensor, Tensor]:
    """(A [E, R, in], B [E, out, R]) of an adapter: views of PEFT's A [E*R, in] and B [out, R*E]."""
    a, b = wrapper.lora_A[adapter].weight, wrapper.lora_B[adapter].weight
    experts = wrapper.num_experts
    return a.view(experts, -1, a.shape[1]), b.view(b.shape[0], -1, experts).permute(2, 0, 1)


def active_factors(wrapper: ParamWrapper) -> tuple[Tensor, Tensor, float] | None:
    """(A, B, scaling) of the adapters that are active, stacked along the rank; None where there is none."""
    adapters = [name for name in wrapper.active_adapters if name in wrapper.lora_A]
    if wrapper.disable_adapters or not adapters:
        return None
    if len(adapters) == 1:
        return *factors(wrapper, adapters[0]), wrapper.scaling[adapters[0]]
    pairs = [factors(wrapper, name) for name in adapters]
    scaled = [b * wrapper.scaling[name] for (_, b), name in zip(pairs, adapters, strict=True)]
    return torch.cat([a for a, _ in pairs], dim=1), torch.cat(scaled, dim=2), 1.0


def expert_lora(outer: ParamWrapper, layout: Layout) -> ExpertLora | None:
    """What the wrappers around an experts module add to its projections; None if nothing."""
    found: dict[str, tuple[Tensor, Tensor, float]] = {}
    for wrapper in wrappers(outer):
        active = active_factors(wrapper)
        if active is None:
            continue
        a, b, scaling = active
        split = layout.split_lora_b(wrapper.parameter_name, b)
        found |= {projection: (a, part, scaling) for projection, part in split.items()}
    if not found:
        return None
    none = None, None, 1.0
    (gate_a, gate_b, gate), (up_a, up_b, up), (down_a, down_b, down) = (
        found.get(projection, none) for projection in ("gate", "up", "down")
    )
    return ExpertLora(gate_a, gate_b, up_a, up_b, down_a, down_b, (gate, up, down))


def check(module: nn.Module, parameter: str, config: LoraConfig) -> None:
    """Raises ArgumentError for a LoRA that cannot be computed beside packed experts."""
    where = f"{type(module).__name__}.{parameter}"
    weights = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
    if parameter not in weights:
        raise ArgumentError(f"LoRA on {where} is not supported: expected target_parameters {' or '.join(weights)}")
    refused = {
        "use_dora=True": config.use_dora,
        f"lora_dropout={config.lora_dropout}": config.lora_dropout,
        "lora_bias=True": config.lora_bias,
        f"init_lora_weights={config.init_lora_weights!r}": config.init_lora_weights not in INITS,
    }
    for option, given in refused.items():
        if given:
            raise ArgumentError(f"{option} is not supported for experts ({where}): leave it out")


@functools.wraps(stock_inject_adapter)
def inject_adapter(self: BaseTuner, model: nn.Module, *args, **kwargs) -> None:
    """Of any kind, on any module: the model is to compute the same whether its adapter is enabled or not."""
    for _, packed in packed_modules(model):
        packed.experts.adapt()
    stock_inject_adapter(self, model, *args, **kwargs)


@functools.wraps(stock_init)
def init(self, base_layer, adapter_name, parameter_name, config, *args, **kwargs) -> None:
    module = base_layer.get_base_layer() if isinstance(base_layer, ParamWrapper) else base_layer
    if computed_here(module):
        check(module, parameter_name, config)
    stock_init(self, base_layer, adapter_name, parameter_name, config, *args, **kwargs)


@functools.wraps(stock_update_layer)
def update_layer(self: ParamWrapper, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs) -> None:
    module = self.get_base_layer()
    if computed_here(module):
        check(module, self.parameter_name, config)
        if r < 1:
            raise ArgumentError(f"LoRA on {type(module).__name__}.{self.parameter_name}: expected r >= 1, found {r}")
    stock_update_layer(self, adapter_name, r, lora_alpha, config, **kwargs)


@functools.wraps(stock_forward)
def forward(self: ParamWrapper, x: Tensor, *args, **kwargs) -> Tensor:
    module = self.get_base_layer()
    if not computed_here(module):
        return stock_forward(self, x, *args, **kwargs)
    self._check_forward_args(x, *args, **kwargs)
    packed = packed_module(module) or pack_module(module)
    return module(x, *args, **kwargs, lora=expert_lora(self, packed.layout))


@functools.wraps(stock_check_merge_allowed)
def check_merge_allowed(self: LoraModel) -> None:
    for name, module in self.model.named_modules():
        if isinstance(module, ParamWrapper) and computed_here(module.get_base_layer()):
            raise ArgumentError(
                f"the experts of {name} are packed, and adding an adapter would quantise them a second time: keep the "
                "adapter beside them, or save it and write a merged checkpoint with `coterie adapter merge`"
            )
    stock_check_merge_allowed(self)


BaseTuner.inject_adapter = inject_adapter
ParamWrapper.__init__ = init
ParamWrapper.update_layer = update_layer
ParamWrapper.forward = forward
LoraModel._check_merge_allowed = check_merge_allowed
