"""A packed checkpoint against its source: errors against plain torch, and what is not right is seen."""

import shutil

import pytest
import torch
from made_checkpoints import E, two_layers, write_checkpoint
from quantised_checkpoints import gpt_oss, quantised

from coterie import Experts, reference
from coterie.convert import convert_cpu
from coterie.convert import verify as verifying
from coterie.convert.verify import verify
from coterie.errors import ArgumentError, CheckpointError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    source, layers = two_layers(folder / "in")
    report = convert_cpu(source, folder / "packed", "int4")
    return source, layers, folder / "packed", report


def test_errors_are_those_of_packing(made):
    source, _, packed, report = made
    steps = []
    checks = verify(packed, source, progress=lambda *step: steps.append(step))
    assert [check.layer for check in checks] == [0, 1] and len(steps) == 2 * E
    for name, error in report.errors.items():
        worst = max((check.errors[name] for check in checks), key=lambda error: error.worst)
        assert worst.worst == pytest.approx(error.worst, rel=1e-4)
        assert (worst.worst_layer, worst.worst_expert) == (error.worst_layer, error.worst_expert)
        assert sum(check.errors[name].mean for check in checks) / 2 == pytest.approx(error.mean, rel=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_output_error(made, layer, monkeypatch):
    """That of all experts at once, in float32."""
    source, layers, packed, _ = made
    tokens = []
    given = verifying._tokens
    monkeypatch.setattr(verifying, "_tokens", lambda *args: tokens.append(given(*args)) or tokens[-1])
    (check,) = verify(packed, source, layers=[layer], tokens=5)
    ((x, ids, weights),) = tokens
    assert x.shape == (5, 64) and ids.shape == (5, E) and torch.equal(ids.sort().values, torch.arange(E).expand(5, E))
    expected = reference.forward(x, ids, weights, **layers[layer])
    found = Experts.open(packed, layer, activations="bf16")(x, ids, weights)
    assert check.output_error == pytest.approx(((expected - found).norm() / expected.norm()).item(), rel=1e-3)
    assert 0.05 < check.output_error < 0.25


def test_nothing_is_lost_in_the_own_format(tmp_path):
    for name, (tensors, config, _) in (("blocks", quantised("fp8 by blocks")), ("stacks", gpt_oss(layers=2))):
        source = write_checkpoint(tmp_path / name, tensors | {"model.norm.weight": torch.ones(4)}, config)
        convert_cpu(source, tmp_path / f"{name} packed")
        for check in verify(tmp_path / f"{name} packed", source):
            assert all(error.worst == 0 for error in check.errors.values())
            assert check.output_error < 0.003


def test_other_weights_are_seen(tmp_path, made):
    source, _, packed, _ = made
    spoiled = shutil.copytree(packed, tmp_path / "spoiled")
    with (spoiled / "experts-00001.safetensors").open("r+b") as file:
        file.seek(-6000, 2)
        file.write(b"\x55" * 500)
    good, bad = verify(spoiled, source)
    assert good.worst < 0.2
    assert bad.worst > 0.3
    other, _ = two_layers(tmp_path / "other", torch.float16)
    assert all(check.worst < 0.2 for check in verify(packed, other))  # the same numbers in another dtype


def test_mistakes(tmp_path, made):
    source, _, packed, _ = made
    convert_cpu(source, tmp_path / "one", layers=[1])
    tensors, config, _ = gpt_oss(layers=2)
    larger = write_checkpoint(tmp_path / "larger", tensors, config)
    for arguments, message, error in (
        ((source, source), "in is no folder of packed layers", ArgumentError),
        ((packed / "experts-00000.safetensors", source), "is no folder of packed layers", ArgumentError),
        ((packed, packed), "is packed already", ArgumentError),
        ((packed, tmp_path / "nowhere"), "does not exist", CheckpointError),
        ((tmp_path / "one", source), "layers 0 are not in both .*; those that are: 1", ArgumentError),
        ((packed, source, [0, 7]), "layers 7 are not in both .*; those that are: 0-1", ArgumentError),
        ((packed, larger), "experts-00000.safetensors: hidden_size is 64, that of the source is 256", CheckpointError),
        ((packed, source, None, 0), "--tokens is 0", ArgumentError),
    ):
        with pytest.raises(error, match=message):
            verify(*arguments)
