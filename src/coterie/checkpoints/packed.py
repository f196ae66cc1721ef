"""The packed format (docs/format.md): what a layer's file is called, what it holds, what its metadata says."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from coterie.activations import Activation
from coterie.checkpoints.packed_formats import MIXED, read_formats, stored_formats
from coterie.checkpoints.tensorfile import TensorFile, shown
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import FORMATS, Format, Formats, resolve

VERSION = "2.0"
FORMATS_KEY = "coterie.formats"  # where there are several
# A folder that holds this file is a conversion still running, or one that was killed.
UNFINISHED = "coterie-unfinished.json"
FILE_NAME = re.compile(r"experts-(\d{5,})\.safetensors")


def layer_file(path: str | os.PathLike, layer: int) -> Path:
    """Where the packed experts of a layer are: `path` itself if a .safetensors file, else a file in that folder."""
    path = Path(path)
    return path if path.suffix == ".safetensors" else path / f"experts-{layer:05d}.safetensors"


def packed_layers(folder: Path) -> list[int]:
    """The layers that have a packed file in a folder, ascending."""
    return sorted(int(match[1]) for file in folder.iterdir() if (match := FILE_NAME.fullmatch(file.name)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedLayer:
    """What a packed layer is: all that its metadata says, and from which every tensor's name and size follow.

    biased: those of gate, up, down that have biases. source: where the weights came from, for people to read.
    """

    layer: int
    num_experts: int
    hidden_size: int
    intermediate_size: int
    formats: Formats
    has_gate: bool
    activation: Activation
    biased: tuple[str, ...] = ()
    source: str = ""

    @property
    def projections(self) -> tuple[str, ...]:
        return ("gate", "up", "down") if self.has_gate else ("up", "down")

    def matrix(self, projection: str) -> tuple[int, int]:
        """Rows and columns of one expert's matrix."""
        sizes = (self.intermediate_size, self.hidden_size)
        return sizes[::-1] if projection == "down" else sizes

    def expert_name(self, expert: int) -> str:
        return f"blk.{self.layer}.ffn_exps.{expert}"

    def bias_name(self, projection: str) -> str:
        return f"blk.{self.layer}.ffn_{projection}_exps.bias"

    def tensors(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """(name, dtype, shape) of every tensor in file order: all experts, all biases.

        Experts come first, and their sizes are multiples of a page, so that each of them begins on one.
        """
        for expert in range(self.num_experts):
            yield self.expert_name(expert), "U8", (self.expert_nbytes,)
        for projection in self.biased:
            yield self.bias_name(projection), "F32", (self.num_experts, self.matrix(projection)[0])

    @property
    def expert_nbytes(self) -> int:
        return self.formats.expert_nbytes(self.hidden_size, self.intermediate_size, self.has_gate)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        biases = sum(4 * self.num_experts * self.matrix(projection)[0] for projection in self.biased)
        return biases + self.num_experts * self.expert_nbytes

    def metadata(self) -> dict[str, str]:
        return {
            "format": "pt",
            "coterie.version": VERSION,
            **self._formats(),
            "coterie.num_experts": str(self.num_experts),
            "coterie.hidden_size": str(self.hidden_size),
            "coterie.intermediate_size": str(self.intermediate_size),
            "coterie.layer": str(self.layer),
            "coterie.has_gate": str(self.has_gate).lower(),
            "coterie.activation": json.dumps(asdict(self.activation)),
            "coterie.source": self.source.encode("utf-8", "replace").decode(),
        }

    def _formats(self) -> dict[str, str]:
        if (spec := self.formats.spec) is not None:
            return format_metadata("coterie.experts", spec)
        return {"coterie.experts": MIXED, FORMATS_KEY: json.dumps(stored_formats(self.formats))}


def format_metadata(key: str, spec: Format) -> dict[str, str]:
    """The metadata of one format, its name under `key`."""
    return {
        key: spec.name,
        "coterie.group_size": str(spec.group_size),
        "coterie.zero_point": str(spec.zero_point).lower(),
    }


def is_packed(file: TensorFile) -> bool:
    """Whether a safetensors file says it is in the packed format, of whatever version."""
    return "coterie.version" in file.metadata


def read_layout(file: TensorFile) -> PackedLayer:
    """The layer that a file holds, after checking that it holds exactly that. Raises CheckpointError."""
    get = Metadata(file, "a packed layer")
    check_version(get)
    layout = PackedLayer(
        layer=get.number("coterie.layer", 0),
        num_experts=get.number("coterie.num_experts", 1),
        hidden_size=get.number("coterie.hidden_size", 1),
        intermediate_size=get.number("coterie.intermediate_size", 1),
        formats=get.formats(),
        has_gate=get.flag("coterie.has_gate"),
        activation=get.activation(),
        source=file.metadata.get("coterie.source", ""),
    )
    try:
        layout.formats.check_columns(layout.hidden_size, layout.intermediate_size)
    except ArgumentError as error:
        raise CheckpointError(f"{file.path}: {error}") from error
    biased = tuple(p for p in layout.projections if layout.bias_name(p) in file.entries)
    found = len(file.entries) - len(biased)
    if found != layout.num_experts:
        raise CheckpointError(
            f"{file.path}: {found} tensors, expected one for each of {layout.num_experts} experts"
        )
    layout = replace(layout, biased=biased)
    check_tensors(file, layout.tensors())
    return layout


def check_tensors(file: TensorFile, expected: Iterable[tuple[str, str, tuple[int, ...]]]) -> None:
    """Raises CheckpointError where a tensor (name, dtype, shape) is missing, or another than expected."""
    for name, dtype, shape in expected:
        entry = file.entry(name)
        if (entry.dtype, entry.shape) != (dtype, shape):
            raise CheckpointError(
                f"{file.path}, tensor {shown(name)}: expected {dtype} {list(shape)}, "
                f"found {entry.dtype} {shown(list(entry.shape))}"
            )


def check_version(get: Metadata) -> None:
    """Raises CheckpointError where a file is of another major version of the format."""
    version = get.text("coterie.version")
    if not re.fullmatch(r"2\.\d{1,9}", version):
        raise CheckpointError(
            f"{get.file.path}: packed format version {shown(version)}, this coterie reads 2.x; "
            "update coterie, or convert the original checkpoint again"
        )


class Metadata:
    """The metadata of a file, which is to be `what`, each value checked as it is taken."""

    def __init__(self, file: TensorFile, what: str):
        self.file, self._what = file, what

    def text(self, key: str) -> str:
        if key not in self.file.metadata:
            raise CheckpointError(f"{self.file.path} is not {self._what}: its metadata has no {key}")
        return self.file.metadata[key]

    def bad(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {key} is {shown(self.text(key))}, expected {expected}")

    def number(self, key: str, least: int) -> int:
        text = self.text(key)
        if not re.fullmatch(r"[0-9]{1,9}", text) or int(text) < least:
            raise self.bad(key, f"a whole number from {least} to 999999999")
        return int(text)

    def flag(self, key: str) -> bool:
        text = self.text(key)
        if text not in ("true", "false"):
            raise self.bad(key, "true or false")
        return text == "true"

    def spec(self, key: str) -> Format:
        name, group_size = self.text(key), self.number("coterie.group_size", 0)
        if name not in FORMATS:
            raise self.bad(key, f"one of {', '.join(FORMATS)}")
        try:
            return resolve(name, group_size, self.flag("coterie.zero_point"))
        except ArgumentError as error:
            raise CheckpointError(f"{self.file.path}: {error}") from error

    def formats(self) -> Formats:
        if self.text("coterie.experts") != MIXED:
            return Formats.of(self.spec("coterie.experts"))
        text = self.text(FORMATS_KEY)
        try:
            return read_formats(json.loads(text))
        except ArgumentError as error:
            raise CheckpointError(f"{self.file.path}, {FORMATS_KEY}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise self.bad(FORMATS_KEY, "JSON") from error

    def activation(self) -> Activation:
        key = "coterie.activation"
        try:
            found = json.loads(self.text(key))
            expected = asdict(Activation())
            if not isinstance(found, dict) or found.keys() != expected.keys():
                raise self.bad(key, f"an object of {', '.join(expected)}")
            numbers = {name: float(found[name]) for name in expected if name != "kind"}
            if not all(math.isfinite(number) for number in numbers.values()):
                raise self.bad(key, "finite numbers")
            return Activation(found["kind"], **numbers)
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise self.bad(key, f"an activation as JSON ({shown(str(error))})") from error
