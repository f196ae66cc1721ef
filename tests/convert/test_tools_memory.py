"""Memory of `compare`, `verify` and `merge` does not grow with the model."""

import subprocess
import sys

import pytest
import torch
from made_checkpoints import CONFIG, random_experts, separate, write_checkpoint

from coterie.convert import convert_cpu

CALLS = {
    "compare": "from coterie.convert.compare import compare\ncompare(source, source)",
    "merge": "from coterie.convert.merge import merge\nmerge([packed], out, source)",
    "verify": "from coterie.convert.verify import verify\nverify(packed, source)",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """12 MB of experts, and 100 MB of them, 0.5 MB a matrix; each packed too."""
    folder = tmp_path_factory.mktemp("memory")
    for name, layers in (("small", 1), ("large", 8)):
        tensors = {"model.embed_tokens.weight": torch.randn(5_000 * layers, 64).bfloat16()}
        for layer in range(layers):
            tensors |= separate(f"model.layers.{layer}.mlp.experts", random_experts(layer, sizes=(8, 512, 512)))
        write_checkpoint(folder / name, tensors, CONFIG | {"num_experts": 8, "num_hidden_layers": layers})
        convert_cpu(folder / name, folder / f"{name} packed", loose=True)
        convert_cpu(folder / name, folder / f"{name} packed whole")
    return folder


@pytest.mark.parametrize("tool", CALLS)
def test_memory(tmp_path, made, tool):
    script = f"""
import resource
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def run(name):
    source, out = {str(made)!r} + "/" + name, {str(tmp_path)!r} + "/" + name
    packed = source + (" packed whole" if {tool!r} == "verify" else " packed")
    exec({CALLS[tool]!r}, dict(source=source, packed=packed, out=out))
run("small")
before = peak()
run("large")
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(out) < 12_000, f"peak memory grew by {int(out) / 1024:.1f} MiB"
