"""Imports of the package go one way only, those inside functions too."""

import ast
import graphlib
from pathlib import Path

import coterie

ROOT = Path(coterie.__file__).parent


def module_of(file):
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(ROOT.rglob("*.py"))}
NATIVE = "coterie._native"


def statements(tree):
    """All nodes below `tree` but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            assert not node.orelse
            continue
        yield node
        yield from statements(node)


def imported(source, package):
    """The modules of coterie that a module in `package` imports; not the packages that they lie in."""
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found = name if name in MODULES or name == NATIVE else base
                if found in MODULES:
                    yield found


def imports():
    return {
        name: set(imported(file.read_text(), name if file.name == "__init__.py" else name.rpartition(".")[0])) - {name}
        for name, file in MODULES.items()
    }


def circle(graph):
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return " -> ".join(reversed(error.args[1]))
    return ""


def folder_of(name):
    return ".".join(name.split(".")[:2])


def test_modules_import_one_way():
    graph = imports()
    assert "coterie.ops" in graph["coterie.experts"] and "coterie.hf" in graph["coterie"]
    assert circle(graph) == ""


def test_folders_import_one_way():
    folders = {}
    for name, targets in imports().items():
        folders.setdefault(folder_of(name), set()).update(map(folder_of, targets - {name}))
    assert circle({name: targets - {name} for name, targets in folders.items()}) == ""


def test_imports_are_found_wherever_they_stand():
    source = """
from typing import TYPE_CHECKING
import coterie.cpu
from .. import _native, memory
from . import anything
from ..hf.config import CoterieConfig
if TYPE_CHECKING:
    from coterie.experts import Experts
def late():
    with open("x"):
        from coterie import layer
        from coterie import Experts
"""
    found = ["coterie.cpu", "coterie.memory", "coterie.hf", "coterie.hf.config", "coterie.layer", "coterie"]
    assert list(imported(source, "coterie.hf")) == found
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) in ("a -> b -> c -> a", "b -> c -> a -> b", "c -> a -> b -> c")
