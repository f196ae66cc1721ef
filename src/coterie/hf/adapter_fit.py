"""Whether a saved adapter belongs to a model, said before any of it is loaded.

PEFT loads what has a place and only warns of what is missing, so that an adapter of a model with more or fewer layers,
or with other names, would be half applied or not at all. And it takes A and B of stacked experts as they come, though
what the two are changed with PEFT 0.19.1. What it saves of a head under LoRA, the head's own weights, is left out where
they are packed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from peft import peft_model
from peft.config import PeftConfigMixin
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.save_and_load import get_peft_model_state_dict
from torch import Tensor, nn

from coterie.errors import ArgumentError
from coterie.hf.peft import computed_here, wrappers
from coterie.hf.weight import PackedWeight

SINCE = Version("0.19.1")  # A is [rank * E, in] and B [out, rank * E] from then on, the other way round before
UNKNOWN = "unknown"  # the version of an adapter that does not say it, which those since PEFT 0.18 do

logger = logging.getLogger(__name__)
stock_set_state = peft_model.set_peft_model_state_dict
stock_get_state = peft_model.get_peft_model_state_dict
stock_read = PeftConfigMixin.from_json_file.__func__


def check_adapter(
    model: nn.Module, adapter: str, stored: Mapping[str, Tensor], name: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """The parameters of a PeftModel's adapter, each with its tensor of `stored`, by the name that PEFT saves it under.

    Raises ArgumentError unless `stored` is all of an adapter, and nothing else. name: what the model is called there.
    """
    # Not at the top: this module is imported while PEFT itself still is.
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    config = model.peft_config[adapter]
    try:
        stored = convert_peft_adapter_state_dict_for_transformers(model, config, dict(stored), adapter)
    except (ValueError, RuntimeError) as error:
        raise ArgumentError(f"the adapter does not fit {name}: {' '.join(str(error).split())[:300]}") from error
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own = get_peft_model_state_dict(model, parameters, adapter, save_embedding_layers=False)
    expected = {key: tuple(tensor.shape) for key, tensor in own.items()}
    found = {key: tuple(tensor.shape) for key, tensor in stored.items()}
    check_version(model, config.peft_version, found, name)
    advice = f"; load it into the model it was trained on ({config.base_model_name_or_path or 'which it does not say'})"
    for key in expected:
        if key in found and expected[key] != found[key]:
            raise ArgumentError(
                f"the adapter does not fit {name}: {key}: expected shape {list(expected[key])}, found "
                f"{list(found[key])}{advice}"
            )
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(found.keys() - expected.keys() - parameters.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {what}, {names[0]} for one"
            for names, what in ((missing, "are missing"), (unexpected, "have no place in it"))
            if names
        ]
        raise ArgumentError(
            f"the adapter does not fit {name}: expected {len(expected)} tensors, found {len(found)}: "
            f"{'; '.join(parts)}{advice}"
        )
    return {key: (parameter, stored[key]) for key, parameter in own.items()}


def check_version(model: nn.Module, version: str, found: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raises ArgumentError for LoRA of stacked experts whose A and B are the other way round.

    version: of the PEFT that saved it. Where that is not known the shapes may tell; where they do not it warns.
    """
    try:
        known = Version(version.partition("@")[0])
    except InvalidVersion:
        known = None
    if known is not None and known >= SINCE:
        return
    advice = f"coterie adapter convert --from peft-0.19.0 lays it out as PEFT has it since {SINCE}"
    for module_name, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or module_name.endswith("base_layer"):
            continue
        for depth, wrapper in enumerate(wrappers(module)):
            stem = f"{module_name}.{'base_layer.' * depth}lora_"
            a, b = found.get(f"{stem}A.weight"), found.get(f"{stem}B.weight")
            if a is None or b is None or wrapper.get_param().ndim != 3:
                continue
            if not other_way_round(known, getattr(wrapper.get_base_layer(), "is_transposed", False)):
                continue
            if known is not None:
                raise ArgumentError(
                    f"the adapter was saved by PEFT {version}, whose LoRA of experts has input and output the other "
                    f"way round ({stem}A.weight): {advice}"
                )
            if a[-1] != b[0] and (a[-1], b[0]) == (wrapper.out_features, wrapper.in_features):
                raise ArgumentError(
                    f"the adapter does not fit {name}: {stem}A.weight has {a[-1]} columns, expected "
                    f"{wrapper.in_features}: input and output are the other way round, as PEFT before {SINCE} saved "
                    f"them: {advice}"
                )
            logger.warning(
                "the adapter does not say which PEFT saved it: if that was older than %s, its LoRA of experts has "
                "input and output the other way round and computes nonsense here: %s",
                SINCE,
                advice,
            )
            return


def other_way_round(version: Version | None, transposed: bool) -> bool:
    """Whether the PEFT of that version (None: not known, so an old one) had the input and the output of stacked experts
    the other way round. transposed: the model stores them [E, in, out], which only 0.19.0 did not take as it is."""
    if version is not None and version >= SINCE:
        return False
    return not transposed or (version is not None and version.release == (0, 19, 0))


@functools.wraps(stock_set_state)
def set_state(model: nn.Module, peft_model_state_dict: dict, adapter_name: str = "default", *args, **kwargs) -> Any:
    ours = isinstance(model, peft_model.PeftModel) and any(computed_here(module) for module in model.modules())
    if ours and not kwargs.get("ignore_mismatched_sizes"):
        check_adapter(model, adapter_name, peft_model_state_dict, type(model.get_base_model()).__name__)
    return stock_set_state(model, peft_model_state_dict, adapter_name, *args, **kwargs)


@functools.wraps(stock_get_state)
def get_state(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    found = stock_get_state(*args, **kwargs)
    return {name: value for name, value in found.items() if not isinstance(value, PackedWeight)}


@functools.wraps(stock_read)
def read_json(cls: type, path_json_file: str, **kwargs) -> dict:
    """PEFT takes its own version for that of an adapter that has none; this keeps that it is not known."""
    found = stock_read(cls, path_json_file, **kwargs)
    if found.get("peft_type") == "LORA" and found.get("peft_version") is None:
        found["peft_version"] = UNKNOWN
    return found


peft_model.set_peft_model_state_dict = set_state
peft_model.get_peft_model_state_dict = get_state
PeftConfigMixin.from_json_file = classmethod(read_json)
