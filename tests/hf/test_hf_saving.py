"""save_pretrained and state_dict: a packed model is saved whole or not at all, never at the cost of an older one."""

from __future__ import annotations

import errno
import os
import pickle
import resource
import shutil
import signal

import pytest
import tiny_models
import torch
from packed_models import assert_same_bytes, logits
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import coterie
from coterie.errors import ArgumentError, CheckpointError
from coterie.hf.inference.attention import attend_as_before
from coterie.hf.modules import packed_modules
from coterie.hf.weight import PackedWeight


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- over an older checkpoint ---


def test_over_a_plain_checkpoint(plain, checkpoint):
    """No plain weights are left that would be loaded in place of the packed ones; other files stay."""
    AutoModelForCausalLM.from_pretrained(plain).save_pretrained(plain, max_shard_size="100KB")
    (plain / "tokenizer.json").write_text("kept")
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4")
    model.save_pretrained(plain)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(plain)), logits(model))
    assert set(os.listdir(plain)) == {
        "config.json",
        "generation_config.json",
        "coterie.safetensors.index.json",
        "model-00001-of-00001.safetensors",
        "experts-00000.safetensors",
        "experts-00001.safetensors",
        "tokenizer.json",
    }


@pytest.mark.parametrize("mmap", [False, True])
def test_onto_the_folder_it_came_from(packed, mmap):
    model = coterie.from_pretrained(packed, mmap=mmap)
    expected, files = logits(model), contents(packed).keys()
    model.save_pretrained(packed)
    assert torch.equal(logits(model), expected)
    assert contents(packed).keys() == files
    again = coterie.from_pretrained(packed)
    assert torch.equal(logits(again), expected)
    assert_same_bytes(again, model)


def test_layers_that_the_older_checkpoint_had_more(checkpoint, tmp_path):
    tiny_models.make("qwen3_moe", num_hidden_layers=3).save_pretrained(tmp_path / "three")
    coterie.from_pretrained(tmp_path / "three").save_pretrained(tmp_path / "packed")
    assert (tmp_path / "packed" / "experts-00002.safetensors").exists()
    coterie.from_pretrained(checkpoint("qwen3_moe")).save_pretrained(tmp_path / "packed")
    assert not (tmp_path / "packed" / "experts-00002.safetensors").exists()


# --- interrupted ---


def test_interrupted(checkpoint, tmp_path, packed, monkeypatch):
    """A save that fails after the experts' files were written leaves a new folder away, and an old one as it was."""
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4")
    before = contents(packed)
    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", lambda *args, **kw: 1 / 0)
    for folder in (tmp_path / "new", packed):
        with pytest.raises(ZeroDivisionError):
            model.save_pretrained(folder)
    assert not (tmp_path / "new").exists() and contents(packed) == before


@pytest.mark.skipif(os.geteuid() == 0 and not os.path.isdir("/proc/1"), reason="needs a place that cannot be written")
def test_where_nothing_can_be_written(checkpoint):
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8")
    with pytest.raises(CheckpointError, match="cannot write"):
        model.save_pretrained("/proc/coterie")


@pytest.mark.parametrize("limit", [1, 20_000, 300_000], ids=["the config", "an experts' file", "the rest"])
def test_a_disk_that_fills_up(limit, tmp_path):
    """A limit on the size of one file stands in for a full disk. The folder is the only copy, and stays it."""
    tiny_models.make("qwen3_moe", vocab_size=4000).save_pretrained(tmp_path / "plain")
    coterie.from_pretrained(tmp_path / "plain", experts="int4").save_pretrained(tmp_path / "packed")
    model = coterie.from_pretrained(tmp_path / "packed", mmap=True)
    before, expected = contents(tmp_path / "packed"), logits(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        for folder in (tmp_path / "packed", tmp_path / "new"):
            with pytest.raises(CheckpointError, match=r"cannot write .*File too large"):
                model.save_pretrained(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(tmp_path / "packed") == before and not (tmp_path / "new").exists()
    assert torch.equal(logits(coterie.from_pretrained(tmp_path / "packed")), expected)
    assert torch.equal(logits(model), expected)


def test_a_disk_too_small(packed, monkeypatch):
    model, before = coterie.from_pretrained(packed), contents(packed)
    usage = shutil._ntuple_diskusage(100, 90, 10)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match="not enough space"):
        model.save_pretrained(packed)
    assert contents(packed) == before


@pytest.mark.parametrize("allowed", range(4))
def test_interrupted_while_files_change_places(packed, checkpoint, allowed, monkeypatch):
    """Then the folder says that it is not finished, and every new file is whole."""
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4")
    replace, done = os.replace, []

    def refuse(source, target):
        if "coterie-saving-" in str(source) and "coterie-saving-" not in str(target):
            if len(done) == allowed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", refuse)
        with pytest.raises(CheckpointError, match=r"The new files are whole: move those still in .*coterie-saving-"):
            model.save_pretrained(packed)
    if allowed:
        with pytest.raises(CheckpointError, match="was not finished"):
            coterie.from_pretrained(packed)
    new = next(packed.glob("coterie-saving-*"))
    for file in new.iterdir():
        file.rename(packed / file.name)
    (packed / "coterie-unfinished.json").unlink()
    assert torch.equal(logits(coterie.from_pretrained(packed)), logits(model))


def test_options(checkpoint, tmp_path):
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8")
    with pytest.raises(ArgumentError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "x", push_to_hub=True)
    assert not (tmp_path / "x").exists()


# --- state dicts ---


@pytest.fixture
def model(checkpoint):
    return coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int8")


def test_state_dict_holds_the_experts(model):
    state = model.state_dict()
    assert state.keys() == {name for name, _ in model.named_parameters()}
    assert sum(isinstance(tensor, PackedWeight) for tensor in state.values()) == 2 * len(list(packed_modules(model)))


@pytest.mark.parametrize(
    "save",
    [torch.save, lambda state, path: save_file(state, path), lambda state, path: path.write_bytes(pickle.dumps(state))],
    ids=["torch", "safetensors", "pickle"],
)
def test_state_dict_cannot_be_saved_without_the_experts(model, save, tmp_path):
    with pytest.raises(ArgumentError, match=r"save the model with save_pretrained"):
        save(model.state_dict(), tmp_path / "state")


def test_own_state_dict_loads_again(model):
    expected = logits(model)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert not any(model.load_state_dict(state))
    assert torch.equal(logits(model), expected)


def test_state_dict_of_the_rest_alone_misses_the_experts(model):
    state = {name: t for name, t in model.state_dict().items() if not isinstance(t, PackedWeight)}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and {name.rpartition(".")[2] for name in missing} == {"gate_up_proj", "down_proj"}


# --- back to plain, and in words ---


def test_dequantize_after_saving(model, tmp_path):
    """Saving turns config.dtype into a name."""
    model.save_pretrained(tmp_path / "packed")
    weight = model.model.layers[0].mlp.experts.down_proj
    expected = weight.dense()
    model.dequantize()
    assert torch.equal(model.model.layers[0].mlp.experts.down_proj, expected)
    assert model.config._experts_implementation != "coterie" and "packed" not in repr(model)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    attend_as_before(model)
    assert torch.equal(logits(again), logits(model))
    assert torch.equal(again.state_dict()["model.layers.0.mlp.experts.down_proj"], expected)


def test_print(checkpoint):
    model = coterie.from_pretrained(checkpoint("qwen3_moe"), experts="int4", zero_point=True)
    nbytes = sum(module.experts.nbytes for _, module in packed_modules(model))
    assert f"experts packed as int4 in groups of 32 with zero points: {nbytes / 1e6:,.1f} MB; the rest" in repr(model)
    assert "num_experts=8, hidden_size=64, intermediate_size=96, packed as int4" in repr(model)
