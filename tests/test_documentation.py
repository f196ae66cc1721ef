"""The tables of docs/checkpoints.md and of the README name what the tests try, and say what these check."""

from __future__ import annotations

import re
from pathlib import Path

import gguf_families
import gguf_models
import pytest
from convert.test_convert_mixed import KEPT, MIXES
from hf.tiny_models import FAMILIES, QUANTISED
from quantised_checkpoints import FINER, METHODS

from coterie.checkpoints.gguf_types import TYPES
from coterie.formats import FORMATS, resolve
from coterie.hf.gguf import families as gguf_read_here

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")]
DOCUMENTS += sorted((ROOT / "docs").glob("*.md"))
CHECKPOINTS = (ROOT / "docs" / "checkpoints.md").read_text()
README = (ROOT / "README.md").read_text()


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table whose first column has that heading."""
    _, found, rest = text.partition(f"\n| {heading} |")
    assert found, heading
    _, *lines = rest.partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines[1:]]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def named(table: list[list[str]]) -> dict[str, list[str]]:
    """{each name in the first column: the other cells}, each once."""
    pairs = [(name, cells) for first, *cells in table for name in code(first)]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def test_ways_to_quantise():
    found = named(rows(CHECKPOINTS, "as the tests name it (`tests/quantised_checkpoints.py`)"))
    specs = {method: spec for method, (_, _, spec) in METHODS.items()} | {"gpt-oss": resolve("mxfp4")}
    assert {name: packed for name, (_, packed, _) in found.items()} == {n: s.described for n, s in specs.items()}
    rounded = {name for name, (*_, lost) in found.items() if lost != "nothing"}
    assert rounded == FINER | {"compressed-tensors nvfp4"}
    clipped = {name for name, (*_, lost) in found.items() if "-128" in lost}
    assert clipped == {name for name, spec in specs.items() if spec.name == "int8"}


def test_mixed_precision():
    found = named(rows(CHECKPOINTS, "as `tests/convert/test_convert_mixed.py` names it"))
    assert {name: kept for name, (_, kept) in found.items()} == {name: KEPT.get(name, "name one") for name in MIXES}


def test_types_of_gguf():
    found = {kind: packed for kinds, packed, _ in rows(CHECKPOINTS, "type") for kind in kinds.split(", ")}

    def expected(name: str) -> str:
        if TYPES[name].spec is None:
            return "bf16, or as `experts=` says"
        return "the same name" if TYPES[name].codes else f"{TYPES[name].spec.name}, anew"

    assert found == {name: expected(name) for name in TYPES}
    assert all(kind.spec.name == name.lower() for name, kind in TYPES.items() if kind.codes)


def test_architectures_of_gguf_and_families():
    tried = {"minimax_m2": "minimax-m2", "gpt_oss": "gpt-oss", "qwen3_5_moe_text": "qwen35moe"}
    tried |= gguf_models.ARCHITECTURES | gguf_families.ARCHITECTURES | gguf_families.ALIASES
    assert gguf_read_here.FAMILIES.keys() <= {*tried.values(), *gguf_families.SEEING.values()}
    opens = named(rows(CHECKPOINTS, "architecture")).items()
    read = {(family, name) for name, (as_, _) in opens for family in code(as_)}
    assert read == {*tried.items(), *(("qwen3_moe", name) for name in gguf_families.SEEING.values())}
    families = named(rows(CHECKPOINTS, "`model_type`"))
    assert families.keys() == FAMILIES.keys()
    assert {family: code(gguf)[0] for family, (_, gguf) in families.items() if code(gguf)} == tried
    quantised = {family: methods for family, (methods, _) in families.items() if methods}
    assert quantised == QUANTISED | {"qwen3_moe": "every row above", "gpt_oss": "gpt-oss"}


def test_what_the_readme_names():
    assert {code(first)[0] for first, *_ in rows(README, "format")} == set(FORMATS)
    families, *_ = rows(README, "model family (`model_type`)")[0]
    assert set(code(families)) == {family.removesuffix("_text") for family in FAMILIES}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_tests_that_are_named_exist(document):
    text = document.read_text()
    for path in re.findall(r"`((?:tests|benchmarks|examples|scripts|docs)/[\w/.-]*\w)`", text):
        assert (ROOT / path).exists(), path
    for path, anchor in re.findall(r"\]\(([^):#]*)(#[^)]*)?\)", text):
        assert (document.parent / path).exists(), path
        target = document if not path else document.parent / path
        titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE) if anchor else ()
        assert not anchor or anchor[1:] in {title.lower().replace(" ", "-") for title in titles}, anchor
    sources = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", text):
        assert f"def {test}(" in sources, test
