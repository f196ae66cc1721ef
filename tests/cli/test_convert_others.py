"""`coterie convert merge`, `dequantize`, `compare` and `verify` as they are typed: what they print, and exit codes."""

import pytest
from made_checkpoints import two_layers, write_checkpoint
from quantised_checkpoints import quantised


@pytest.fixture
def plain(tmp_path):
    return two_layers(tmp_path / "plain", shards=2)[0]


@pytest.fixture
def fp8(tmp_path):
    tensors, config, _ = quantised("fp8 by blocks")
    return write_checkpoint(tmp_path / "fp8", tensors, config, shards=2)


def test_layers_are_packed_apart_and_put_together(coterie, tmp_path, plain):
    for layer in (0, 1):
        packed = ("convert", "cpu", "-i", plain, "-o", tmp_path / str(layer), "--layers", layer)
        assert coterie(*packed, "--no-merge-safetensor").code == 0
    inputs = ("-i", tmp_path / "0", "-i", tmp_path / "1")
    alone = coterie("convert", "merge", *inputs, "-o", tmp_path / "experts")
    assert alone.code == 0 and "left out: give --original-path" in alone.out
    ran = coterie("convert", "merge", *inputs, "-o", tmp_path / "out", "--original-path", plain, "--max-tensors", "3")
    assert ran.code == 0 and "experts in int4 in groups of 32" in ran.out and "copied" in ran.out
    assert len(list((tmp_path / "out").glob("model-*"))) == 2
    assert coterie("convert", "cpu", "-i", plain, "-o", tmp_path / "whole").code == 0
    same = coterie("convert", "compare", tmp_path / "whole", tmp_path / "out")
    assert same.code == 0 and "The same." in same.out
    verified = coterie("convert", "verify", tmp_path / "out", plain, "--tokens", "3")
    assert verified.code == 0 and "All 2 layers are within 0.3." in verified.out


def test_dequantized(coterie, tmp_path, fp8):
    ran = coterie("convert", "dequantize", "-i", fp8, "-o", tmp_path / "out")
    assert ran.code == 0 and "19 weights" in ran.out
    assert [line.partition(":")[0] for line in ran.err.splitlines()] == ["file 1/2", "file 2/2"]
    names = sorted(path.name for path in fp8.glob("*.safetensors"))
    first = coterie("convert", "dequantize", "-i", fp8, "-o", tmp_path / "two", "--files", names[0])
    assert first.code == 0 and "1; others are still to be written" in first.out
    again = ("--files", ", ".join(names), "--overwrite")
    both = coterie("convert", "dequantize", "-i", fp8, "-o", tmp_path / "two", *again)
    assert both.code == 0 and "others" not in both.out
    assert coterie("convert", "compare", tmp_path / "out", tmp_path / "two").code == 0


def test_compared(coterie, tmp_path, fp8):
    coterie("convert", "dequantize", "-i", fp8, "-o", tmp_path / "out")
    near = coterie("convert", "compare", fp8, tmp_path / "out", "--tolerance", "0.01")
    assert near.code == 0 and "F32, BF16" in near.out and "19 within a relative error of 0.01, 0 beyond" in near.out
    apart = coterie("convert", "compare", fp8, tmp_path / "out")
    assert apart.code == 1 and "They differ." in apart.out and apart.out.count("_proj.weight") == 19
    assert coterie("convert", "compare", fp8, tmp_path / "out", "--all").out.count(" BF16 ") > 19


def test_compared_with_something_else(coterie, tmp_path, fp8, plain):
    ran = coterie("convert", "compare", fp8, plain)
    assert ran.code == 1 and "in " in ran.out and "alone" in ran.out and "of different shapes" in ran.out
    assert "model.embed_tokens.weight [50, 256], [50, 64]" in ran.out


def test_verified_against_something_else(coterie, tmp_path, plain):
    coterie("convert", "cpu", "-i", plain, "-o", tmp_path / "out")
    ran = coterie("convert", "verify", tmp_path / "out", plain, "--tolerance", "0.01", "--layers", "1")
    assert ran.code == 1 and f"Layers 1 are not what {plain} holds: beyond 0.01." in " ".join(ran.out.split())


OUT = object()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merge", "-i", "/nowhere", "-o", OUT], "/nowhere is no folder"),
        (["dequantize", "-i", "/nowhere", "-o", OUT], "/nowhere does not exist"),
        (["compare", "/nowhere", "/nowhere"], "/nowhere does not exist"),
        (["verify", "/nowhere", "/nowhere"], "/nowhere is no folder of packed layers"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(coterie, tmp_path, arguments, message):
    ran = coterie("convert", *(tmp_path / "made" if argument is OUT else argument for argument in arguments))
    assert ran.code == 2 and message in ran.err and ran.err.count("\n") == 1 and ran.err.startswith("coterie: ")
    assert not (tmp_path / "made").exists()
