"""What coterie relies on in Transformers and PEFT. A test that fails here says that upstream has moved, and where."""

from __future__ import annotations

import inspect

import peft.tuners.lora.layer
import peft.utils.transformers_weight_conversion
import pytest
import tiny_models
import torch
import transformers
from packaging.version import Version
from transformers import PreTrainedModel, core_model_loading, modeling_utils
from transformers.integrations import moe
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from coterie.hf.layout import FLAGS, is_experts


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_version_is_in_the_tested_range():
    assert Version("5.18") <= Version(transformers.__version__) < Version("6")


def test_experts_interface():
    assert parameters(moe.grouped_mm_experts_forward) == ["self", "hidden_states", "top_k_index", "top_k_weights"]
    assert moe.ALL_EXPERTS_FUNCTIONS["coterie"].__module__ == "coterie.hf.experts"
    # Looked up on each call, so that set_experts_implementation works at any time.
    assert "self.config._experts_implementation" in inspect.getsource(moe.use_experts_implementation)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_family_has_two_experts_modules_with_flags(family):
    with torch.device("meta"):
        model = tiny_models.make(family)
    modules = [module for module in model.modules() if is_experts(module)]
    assert len(modules) == 2
    for module in modules:
        assert all(isinstance(getattr(module, flag), bool) for flag in FLAGS)
        if Version(transformers.__version__) >= Version("5.20"):
            assert module.has_post_expert_norm is False
        assert module.config is not None


def test_quantizer_hooks():
    assert auto.AUTO_QUANTIZER_MAPPING["coterie"].__module__ == "coterie.hf.quantizer"
    assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["coterie"].__module__ == "coterie.hf.config"
    assert parameters(HfQuantizer.update_weight_conversions)[:2] == ["self", "weight_conversions"]
    assert parameters(HfQuantizer._process_model_before_weight_loading)[:2] == ["self", "model"]
    assert parameters(HfQuantizer._process_model_after_weight_loading)[:2] == ["self", "model"]
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    # The same list of files is shown to the quantizer and loaded from, so what the quantizer takes off is not loaded.
    assert "checkpoint_files=checkpoint_files" in source
    assert "model, state_dict, checkpoint_files, load_config" in source
    order = ["preprocess_model(", "get_model_conversion_mapping(", "_load_pretrained_model(", "postprocess_model("]
    positions = [source.index(step) for step in order]
    assert positions == sorted(positions)


def test_a_packed_index_is_found_by_the_name_that_the_quantizer_gives():
    """The quantizer sees the config before files are looked for, and the name is not saved."""
    source = inspect.getsource(auto.get_hf_quantizer)
    assert "config = hf_quantizer.update_attn_implementation(config)" in source
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    named = source.index('transformers_explicit_filename=getattr(config, "transformers_weights", None)')
    assert source.index("config.distributed_config = distributed_config") < source.index("get_hf_quantizer(") < named
    assert 'delattr(self, "transformers_weights")' in inspect.getsource(transformers.PretrainedConfig.save_pretrained)


def test_options_of_opening_reach_a_packed_checkpoint():
    source = inspect.getsource(auto.AutoHfQuantizer.merge_quantization_configs)
    assert "isinstance(quantization_config, LOADING_ATTRIBUTES_CONFIG_TYPES)" in source
    assert "quantization_config_from_args.get_loading_attributes()" in source


def test_trainer_goes_on_from_checkpoints_by_these_methods():
    assert parameters(transformers.Trainer._load_from_checkpoint) == ["self", "resume_from_checkpoint", "model"]
    assert parameters(transformers.Trainer._load_best_model) == ["self"]


def test_loading_ignores_what_is_not_in_the_state_dict():
    source = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert "missing_keys=set(meta_model_state_dict.keys())" in source
    assert "_keys_to_ignore_on_load_unexpected" in inspect.getsource(
        PreTrainedModel._adjust_missing_and_unexpected_keys
    )


def test_conversion_names():
    assert parameters(core_model_loading.rename_source_key)[:5] == [
        "source_key",
        "weight_renamings",
        "weight_converters",
        "base_model_prefix",
        "meta_state_dict",
    ]
    assert core_model_loading.MergeModulelist(dim=0).dim == 0
    assert core_model_loading.Concatenate(dim=1).dim == 1


def test_saving():
    source = inspect.getsource(PreTrainedModel.save_pretrained)
    assert parameters(PreTrainedModel.save_pretrained)[:3] == ["self", "save_directory", "is_main_process"]
    assert "_hf_peft_config_loaded" in source
    assert "state_dict, metadata = hf_quantizer.get_state_dict_and_metadata(self)" in source
    assert modeling_utils.SAFE_WEIGHTS_NAME == "model.safetensors"
    assert modeling_utils.SAFE_WEIGHTS_INDEX_NAME == "model.safetensors.index.json"


def test_peft_wrapper():
    wrapper = peft.tuners.lora.layer.ParamWrapper
    assert {"get_param", "get_delta_weight", "update_layer", "forward"} <= set(dir(wrapper))


def test_names_of_checkpoints_by_turning_conversions_around():
    """Numbers go where weights would: Mixtral's stacked experts to each expert's w1 and w3."""
    assert parameters(core_model_loading.revert_weight_conversion)[:2] == ["model", "state_dict"]
    with torch.device("meta"):
        model = tiny_models.make("mixtral")
    numbers = torch.arange(8 * 6 * 5.0).view(8, 6, 5)
    stored = core_model_loading.revert_weight_conversion(model, {"model.layers.0.mlp.experts.gate_up_proj": numbers})
    assert torch.equal(stored["model.layers.0.block_sparse_moe.experts.7.w3.weight"], numbers[7, 3:])


def test_adapters_are_loaded_through_these_functions():
    assert parameters(peft.utils.save_and_load.get_peft_model_state_dict) == [
        "model",
        "state_dict",
        "adapter_name",
        "unwrap_compiled",
        "save_embedding_layers",
    ]
    convert = peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers
    assert parameters(convert) == ["model", "peft_config", "adapter_state_dict", "adapter_name"]
    assert parameters(peft.config.PeftConfigMixin.from_json_file) == ["path_json_file", "kwargs"]
    assert "set_peft_model_state_dict(" in inspect.getsource(peft.PeftModel.load_adapter)
    assert "cls.from_json_file(" in inspect.getsource(peft.config.PeftConfigMixin.from_pretrained)
