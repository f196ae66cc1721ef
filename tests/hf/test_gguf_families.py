"""Architectures of GGUF that are read here, not by Transformers: the model that a file was written from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf_families import ARCHITECTURES, write_family
from tiny_models import ROPE, make, make_vision, prompt, strengthen
from transformers import DeepseekV3ForCausalLM, Glm4MoeForCausalLM, Qwen3MoeForCausalLM

import coterie
from coterie import plan
from coterie.checkpoints.gguf_file import GgufFile
from coterie.errors import CheckpointError, UnsupportedModelError
from coterie.hf.converting import convert
from coterie.hf.gguf.config import open_tokenizer, read_config

LENGTH = 40
YARN = ROPE | {
    "rope_type": "yarn", "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 16,
    "mscale": 0.707, "mscale_all_dim": 0.707,
}  # fmt: skip
IN_FILE = {
    "rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 16,
    "rope.scaling.yarn_log_multiplier": 0.0707,
}  # fmt: skip
# What the tiny models have not: a family, and what else it may have.
VARIANTS = {
    "shares of a sum": ("olmoe", {"norm_topk_prob": True}, {"expert_weights_norm": True}),
    "multipliers": (
        "granitemoe",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 3.0},
        {},
    ),
    "norms and biases of q and k": (
        "glm4_moe",
        {
            "use_qk_norm": True, "attention_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
        },
        {},
    ),
    "groups of experts": ("deepseek_v3", {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}, {}),
    "groups by their largest": (
        "deepseek_v2", {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}, {},
    ),
    "q in one piece": ("deepseek_v2", {"q_lora_rank": None}, {}),
    "scaled positions": ("deepseek_v3", {"rope_parameters": YARN}, IN_FILE),
    "scaled positions, V2": ("deepseek_v2", {"rope_parameters": YARN}, IN_FILE),
    "all of a head turned": ("qwen3_next", {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}}, {}),
    "biases of q, k and v": (
        "dots1", {"attention_bias": True, "norm_topk_prob": True, "routed_scaling_factor": 2.5}, {},
    ),
    "few tokens attended to": (
        "glm_moe_dsa",
        {"index_topk": 8, "indexer_types": ["full", "shared", "full"], "norm_topk_prob": True},
        {},
    ),
    "layers that choose are not named": (
        "glm_moe_dsa",
        {"index_topk": 8, "indexer_types": ["full", "shared", "full"]},
        {"attention.indexer.types": None},
    ),
    "a layer that drafts": (
        "exaone_moe", {"n_group": 4, "topk_group": 2}, {"block_count": 4, "nextn_predict_layers": 1},
    ),
    "scores that are scaled": ("afmoe", {"route_scale": 2.5}, {}),
    "multipliers of a hybrid": (
        "granitemoehybrid",
        {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.2, "logits_scaling": 3.0},
        {},
    ),
    "positions turned in a hybrid": ("granitemoehybrid", {"position_embedding_type": "rope"}, {}),
    "experts of narrower tokens": ("nemotron_h", {"moe_latent_size": 32, "routed_scaling_factor": 2.5}, {}),
    "values of their own": (
        "gemma4_text", {"attention_k_eq_v": False, "num_global_key_value_heads": None}, {"attention.head_count_kv": 2},
    ),
    "other positions, a head of its own": (
        "gemma4_text",
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "sliding_attention": ROPE | {"rope_theta": 5000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 2e5},
            },
        },
        {},
    ),
    "no cap": ("gemma4_text", {"final_logit_softcapping": None}, {"final_logit_softcapping": 0.0}),
}  # fmt: skip


WIDTHS = ["attention.key_length_swa", "attention.value_length_swa", "rope.dimension_count_swa"]


def made(family, **changes):
    model = make(family, torch.float32, **changes)
    for name, value in model.state_dict().items():
        if "correction_bias" in name or "expert_bias" in name:
            value.copy_(torch.linspace(-0.5, 0.5, value.numel()).view_as(value))
        elif name.endswith("layer_scalar"):
            value.fill_(0.5 + 0.1 * int(name.split(".")[2]))
        elif name.endswith("router.per_expert_scale"):
            value.copy_(torch.linspace(0.5, 2, value.numel()))
    return model


def assert_same(file, stock, kind=None):
    model = coterie.from_pretrained(file, dtype=torch.float32, experts="bf16")
    assert isinstance(model, kind or type(stock))
    ids = prompt(1, LENGTH)
    with torch.no_grad():
        found, expected = model(ids).logits, stock(ids).logits
    assert (found - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_logits(family, tmp_path, float32_products):
    stock = made(family)
    assert_same(write_family(tmp_path / "model.gguf", stock), stock)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, tmp_path, float32_products):
    family, changes, metadata = VARIANTS[variant]
    stock = made(family, **changes)
    assert_same(write_family(tmp_path / "model.gguf", stock, more=metadata), stock)


def test_keys_and_values_in_one_matrix(tmp_path, float32_products):
    """As files were written before they were taken apart, with other lengths of heads."""
    stock = made("deepseek_v3")
    before = {"attention.key_length": 24, "attention.value_length": 16, "attention.head_count_kv": 4}
    before |= {"attention.key_length_mla": None, "attention.value_length_mla": None}
    assert_same(write_family(tmp_path / "model.gguf", stock, split_latent=False, more=before), stock)
    stock = made("kimi_linear")
    assert_same(write_family(tmp_path / "kimi.gguf", stock, split_latent=False), stock)


@pytest.mark.parametrize("gating", [2, None])
def test_glm_flash(gating, tmp_path, float32_products):
    """GLM-4.7-Flash is a DeepSeek-V3, whose files do not say how scores are made."""
    stock = made("glm4_moe_lite", n_group=1, topk_group=1)
    file = write_family(tmp_path / "model.gguf", stock, more={"expert_gating_func": gating})
    assert_same(file, stock, DeepseekV3ForCausalLM)


def test_solar_open(tmp_path, float32_products):
    """Solar-Open is a GLM-4.5 without norms of queries and keys, that turns all of a head."""
    stock = made("solar_open", rope_parameters=ROPE)
    assert_same(write_family(tmp_path / "model.gguf", stock), stock, Glm4MoeForCausalLM)


def test_what_sees_opens_as_what_reads(tmp_path, float32_products):
    stock = make_vision("qwen3_vl_moe").float().eval()
    strengthen(stock)
    assert_same(write_family(tmp_path / "model.gguf", stock), stock, Qwen3MoeForCausalLM)


def test_ends_of_an_answer_are_all_read(tmp_path):
    """Files name the ends of an answer, of a turn and of a message apart; any of them ends what a model says."""
    more = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 2}
    file = write_family(tmp_path / "model.gguf", make("glm4_moe"), more=more)
    assert coterie.from_pretrained(file).generation_config.eos_token_id == [2, 5]
    assert read_config(GgufFile(file), eos_token_id=7)[0].eos_token_id == 7


@pytest.mark.parametrize(
    ("family", "count", "groups"),
    [("deepseek_v3", 256, (8, 4)), ("deepseek_v2", 160, (8, 3)), ("deepseek_v3", 384, (1, 1))],
)
def test_groups_that_older_files_do_not_name(family, count, groups, tmp_path):
    more = {"expert_count": count, "expert_group_count": None, "expert_group_used_count": None}
    config, _ = read_config(GgufFile(write_family(tmp_path / "model.gguf", make(family), more=more)))
    assert (config.n_group, config.topk_group) == groups
    assert getattr(config, "topk_method", None) in (None, "group_limited_greedy", "noaux_tc")


def test_heads_whose_width_is_not_named(tmp_path, float32_products):
    stock = made("hunyuan_v1_moe")
    assert_same(write_family(tmp_path / "model.gguf", stock, more={"attention.key_length": None}), stock)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_converted_planned_and_read(family, tmp_path):
    stock = make(family)
    file = write_family(tmp_path / "model.gguf", stock)
    model = coterie.from_pretrained(file, experts="int8")
    assert plan.open_source(str(file)).problem is None
    assert model.generate(prompt(1, 4), max_new_tokens=3, do_sample=False, eos_token_id=None).shape == (1, 7)
    convert(file, tmp_path / "converted", quant_method="int8")
    again = coterie.from_pretrained(tmp_path / "converted")
    with torch.no_grad():
        assert torch.equal(again(prompt()).logits, model(prompt()).logits)
    assert open_tokenizer(GgufFile(file)).convert_tokens_to_ids("ab") == stock.config.vocab_size - 1


@pytest.mark.parametrize(
    ("family", "more", "error", "message"),
    [
        (
            "deepseek_v3",
            {"attention.kv_lora_rank": None},
            CheckpointError,
            r"has no deepseek2\.attention\.kv_lora_rank",
        ),
        ("deepseek_v3", {"attention.kv_lora_rank": "many"}, CheckpointError, "no valid deepseek_v3 config"),
        ("mixtral", {"attention.sliding_window": 4096}, UnsupportedModelError, r"not read attention\.sliding_window"),
        ("deepseek_v3", {"attention.temperature_scale": 0.1}, UnsupportedModelError, r"attention\.temperature_scale"),
        ("deepseek_v2", {"expert_weights_norm": True}, UnsupportedModelError, "expert_weights_norm of deepseek2 where"),
        ("olmoe", {"expert_gating_func": 2}, UnsupportedModelError, "expert_gating_func of olmoe"),
        (
            "mixtral",
            {"rope.scaling.type": "longrope"},
            UnsupportedModelError,
            r"positions that are scaled \(longrope\)",
        ),
        (
            "glm4_moe",
            {"rope.scaling.type": "yarn", "rope.scaling.odd": 1},
            UnsupportedModelError,
            r"rope\.scaling\.odd",
        ),
        ("dots1", {"attention.sliding_window": 16}, UnsupportedModelError, r"attention\.sliding_window of dots1"),
        (
            "glm_moe_dsa",
            {"attention.indexer.types": None, "context_length": 1 << 20},
            CheckpointError,
            "every layer has an indexer: which of them choose",
        ),
        ("glm_moe_dsa", {"attention.indexer.top_k": None}, CheckpointError, r"no glm-dsa\.attention\.indexer\.top_k"),
        ("dots1", {"expert_gating_func": 1}, UnsupportedModelError, "expert_gating_func of dots1"),
        ("exaone_moe", {"attention.sliding_window_pattern": None}, CheckpointError, "no exaone-moe.attention.sliding"),
        (
            "exaone_moe",
            {"attention.sliding_window_pattern": [True, False]},
            CheckpointError,
            r"is \[True, False\], expected a value of each of 3 layers",
        ),
        ("afmoe", {"attention.sliding_window": None}, CheckpointError, r"no afmoe\.attention\.sliding_window"),
        ("afmoe", {"expert_weights_norm": False}, UnsupportedModelError, "expert_weights_norm of afmoe that is false"),
        ("afmoe", {"attention.sliding_window_pattern": [1, 0]}, CheckpointError, "no valid afmoe config"),
        ("jamba", {"attention.head_count_kv": [0, 2, 2, 0]}, CheckpointError, r"layers \[1, 2\] have attention or"),
        ("jamba", {"attention.head_count_kv": [0, 0, 0, 0]}, CheckpointError, r"layers \[\] have attention or experts"),
        ("kimi_linear", {"kda.head_dim": None}, CheckpointError, r"no kimi-linear\.kda\.head_dim"),
        ("kimi_linear", {"expert_gating_func": 1}, UnsupportedModelError, "expert_gating_func of kimi-linear"),
        ("lfm2_moe", {"attention.head_count_kv": 2}, CheckpointError, "head_count_kv is 2, expected a value of each"),
        ("lfm2_moe", {"expert_gating_func": 1}, UnsupportedModelError, "expert_gating_func of lfm2moe"),
        ("granitemoehybrid", {"rope.scaling.finetuned": None}, CheckpointError, r"no granitehybrid\.rope\.scaling"),
        ("granitemoehybrid", {"ssm.time_step_rank": 0}, CheckpointError, "no valid granitemoehybrid config"),
        ("nemotron_h", {"feed_forward_length": 96}, CheckpointError, "feed_forward_length is 96, expected a value of"),
        ("nemotron_h", {"attention.head_count_kv": ["a"] * 4}, CheckpointError, "no valid nemotron_h config"),
        *(
            ("gemma4_text", more, UnsupportedModelError, message)
            for more, message in (
                ({"attention.shared_kv_layers": 1}, r"attention\.shared_kv_layers of gemma4 with experts but as 0"),
                ({"embedding_length_per_layer_input": 8}, "embedding_length_per_layer_input of gemma4"),
                ({"attention.causal": False}, r"attention\.causal of gemma4 with experts but as True"),
                ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping of gemma4"),
                ({"expert_gating_func": 2}, "expert_gating_func of gemma4"),
                ({"rope.dimension_count_swa": 8}, r"rope\.dimension_count_swa is 8, this version reads what"),
                ({"attention.value_length": 16}, r"attention\.value_length is 16, .* attention\.key_length is, 32"),
                ({"attention.sliding_window_pattern": [False, True]}, "the last layer attends to a window"),
                ({"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0}, "positions of gemma4 that are scaled"),
                ({"attention.key_length": 64, "attention.value_length": 64, "rope.dimension_count": 64}, "32 factors"),
            )
        ),
        ("gemma4_text", {"attention.sliding_window_pattern": 2}, CheckpointError, "pattern is 2, expected a value of"),
        ("gemma4_text", {"attention.head_count_kv": [2]}, CheckpointError, r"head_count_kv is \[2\], expected a value"),
        ("gemma4_text", {"final_logit_softcapping": None}, CheckpointError, r"no gemma4\.final_logit_softcapping"),
        ("gemma4_text", {"rope.freq_base_swa": None}, CheckpointError, r"no gemma4\.rope\.freq_base_swa"),
        ("gemma4_text", {"attention.key_length_swa": None}, CheckpointError, r"no gemma4\.attention\.key_length_swa"),
        ("gemma4_text", {"feed_forward_length": [96, 192]}, CheckpointError, "no valid gemma4_text config"),
    ],
)
def test_metadata_that_is_missing_or_not_read(family, more, error, message, tmp_path):
    file = write_family(tmp_path / "model.gguf", make(family), more=more)
    with pytest.raises(error, match=message):
        read_config(GgufFile(file))


@pytest.mark.parametrize(
    "factors", [[1.0, 1e30, 1.0, *[1e30] * 13], [1.0] * 4 + [2.0] * 12, [1.0] * 8, [1.0] * 4 + [float("nan")] * 12]
)
def test_pairs_that_are_turned_otherwise(factors, tmp_path, monkeypatch):
    """Gemma 4's files have what frequencies are divided by, of which its model knows the first ones alone to be 1."""
    monkeypatch.setattr("gguf_families._factors", lambda config: np.array(factors, np.float32))
    file = write_family(tmp_path / "model.gguf", make("gemma4_text"))
    with pytest.raises(UnsupportedModelError, match=r"rope_freqs.weight: expected 16 factors, 1 of the first pairs"):
        read_config(GgufFile(file))


def test_layers_of_a_kind_with_other_heads(tmp_path):
    layers = ["sliding_attention", "full_attention", "full_attention"]
    stock = make("gemma4_text", num_hidden_layers=3, layer_types=layers)
    file = write_family(tmp_path / "model.gguf", stock, more={"attention.head_count_kv": [2, 1, 2]})
    with pytest.raises(CheckpointError, match=r"head_count_kv is \[2, 1, 2\], expected one number for a kind of layer"):
        read_config(GgufFile(file))


def test_scales_of_a_router_are_not_its_experts(tmp_path):
    """Gemma 4's files have them where others have what experts are multiplied by."""
    stock = made("gemma4_text")
    file = write_family(tmp_path / "model.gguf", stock)
    own, layer = stock.model.layers[0], coterie.Experts.open(file, 0)
    assert torch.equal(layer.dequantize()[2].bfloat16(), own.experts.down_proj.bfloat16())
    model = coterie.from_pretrained(file, dtype=torch.float32)
    assert torch.equal(model.model.layers[0].router.per_expert_scale, own.router.per_expert_scale)
    file.write_bytes(file.read_bytes().replace(b"ffn_down_exps.scale", b"ffn_down_expr.scale"))
    with pytest.raises(CheckpointError, match=r"ffn_down_expr.scale': Transformers does not multiply by it"):
        coterie.from_pretrained(file)


@pytest.mark.parametrize("name", ["blk.x.attn_norm.weight", "blk.0_attn_norm_weight"])
def test_tensors_of_no_layer(name, tmp_path):
    file = write_family(tmp_path / "model.gguf", make("dots1"))
    file.write_bytes(file.read_bytes().replace(b"blk.0.attn_norm.weight", name.encode()))
    with pytest.raises(CheckpointError, match=f"{name}': Transformers does not know what it is to"):
        coterie.from_pretrained(file)


def test_a_model_that_transformers_does_not_know(tmp_path, monkeypatch):
    file = write_family(tmp_path / "model.gguf", make("dots1"))
    monkeypatch.setattr("coterie.hf.gguf.config.CONFIG_MAPPING", {})
    with pytest.raises(UnsupportedModelError, match=r"'dots1' opens as dots1, which Transformers .* does not know"):
        read_config(GgufFile(file))


@pytest.mark.parametrize(
    ("family", "more"),
    [
        ("qwen3_next", {"ssm.group_count": 3}),
        ("mixtral", {"attention.head_count": 3}),
        ("nemotron_h", {"ssm.group_count": 4}),
        ("nemotron_h", {"moe_latent_size": 32}),
        ("granitemoehybrid", {"ssm.state_size": 8}),
        ("granitemoehybrid", {"attention.head_count_kv": [2, 0]}),
        ("granitemoeshared", {"expert_shared_feed_forward_length": 64}),
        ("jamba", {"ssm.time_step_rank": 16}),
        ("jamba", {"attention.head_count_kv": [0, 2, 0, 0]}),
        ("kimi_linear", {"kda.head_dim": 8}),
        ("glm_moe_dsa", {"attention.indexer.key_length": 8}),
        ("glm_moe_dsa", {"attention.indexer.types": [True, False, True]}),
        ("kimi_linear", {"ssm.conv_kernel": 3}),
        ("kimi_linear", {"attention.head_count_kv": [1, 0, 0]}),
        ("lfm2_moe", {"shortconv.l_cache": 4}),
        ("lfm2_moe", {"attention.head_count_kv": [2, 0, 0]}),
        ("exaone_moe", {"leading_dense_block_count": 2}),
        ("gemma4_text", {"attention.head_count_kv": 2}),
        ("gemma4_text", dict.fromkeys(WIDTHS, 8)),
        ("gemma4_text", {"attention.sliding_window_pattern": [False, False]}),
        ("gemma4_text", {"feed_forward_length": 64}),
    ],
)
def test_shapes_that_do_not_go_with_the_metadata(family, more, tmp_path):
    file = write_family(tmp_path / "model.gguf", make(family), more=more)
    with pytest.raises(CheckpointError, match=r"does not go with|no valid|, expected |has no tensor|not know what"):
        coterie.from_pretrained(file)
