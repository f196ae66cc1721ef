"""Importing coterie is cheap, and registers with Transformers in either order of imports."""

from __future__ import annotations

import subprocess
import sys

import pytest

REGISTERED = """
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert "coterie" in ALL_EXPERTS_FUNCTIONS and "coterie" in AUTO_QUANTIZER_MAPPING
"""


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_import_leaves_transformers_alone():
    run("import sys, coterie; assert not any(name.partition('.')[0] == 'transformers' for name in sys.modules)")


@pytest.mark.parametrize(
    "imports",
    [
        "import coterie\nimport transformers.modeling_utils",
        "import transformers.modeling_utils\nimport coterie",
        "import coterie\nfrom transformers import PreTrainedModel",
        "import coterie\ncoterie.from_pretrained",
    ],
)
def test_registers(imports):
    run(imports + REGISTERED)


def test_upstream_source_can_still_be_inspected():
    run(
        "import coterie, inspect, transformers.modeling_utils as m\n"
        "assert 'class PreTrainedModel' in inspect.getsource(m)\n"
        "assert m.__spec__.loader.get_source('transformers.modeling_utils')"
    )


def test_warns_where_transformers_is_too_different():
    output = run("import sys, coterie\nsys.modules['coterie.hf'] = None\nimport transformers.modeling_utils")
    assert "coterie does not work with this version of transformers" in output


def test_unknown_name():
    output = run("import coterie\ntry:\n    coterie.nothing\nexcept AttributeError as error:\n    print(error)")
    assert "no attribute 'nothing'" in output
