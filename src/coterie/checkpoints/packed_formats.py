"""The formats of packed experts, as metadata and config.json say them: one, or several by projection and layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from coterie.checkpoints.reader import spans
from coterie.checkpoints.tensorfile import shown
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import FORMATS, Format, Formats, resolve

MIXED = "mixed"  # in place of the name of a format
NONE = "none"  # said of linear layers in commands: they keep the model's dtype
OWN = "own"  # of linear layers: each in a format of its own, as a quantised checkpoint has it
PARTS = ("gate_up", "down")


def stored_formats(formats: Formats) -> dict[str, dict[str, Any]]:
    """Formats as JSON has them, by part."""
    return {
        part: {"format": spec.name, "group_size": spec.group_size, "zero_point": spec.zero_point}
        for part, spec in zip(PARTS, (formats.gate_up, formats.down), strict=True)
    }


def read_formats(found: Any) -> Formats:
    """The inverse of `stored_formats`. Raises ArgumentError for what it does not give."""
    if not isinstance(found, dict) or found.keys() != set(PARTS):
        raise ArgumentError(f"expected an object of {' and '.join(PARTS)}, found {shown(found)}")
    return Formats(*(_read_format(found[part]) for part in PARTS))


def _read_format(found: Any) -> Format:
    kinds = {"format": str, "group_size": int, "zero_point": bool}
    if not isinstance(found, dict) or {key: type(value) for key, value in found.items()} != kinds:
        raise ArgumentError(f"expected a format as an object of {', '.join(kinds)}, found {shown(found)}")
    if found["format"] not in FORMATS:
        raise ArgumentError(f"expected one of {', '.join(FORMATS)}, found {shown(found['format'])}")
    return resolve(found["format"], found["group_size"], found["zero_point"])


@dataclass(frozen=True, slots=True)
class ModelFormats:
    """The formats of a model's experts: `spec` for all of them, or, where it is None, those of `layers`, by number."""

    spec: Format | None
    layers: Mapping[int, Formats] = field(default_factory=dict)

    @classmethod
    def of(cls, layers: Mapping[int, Formats]) -> ModelFormats:
        """Those of all layers, of which there is one."""
        found = set(layers.values())
        spec = next(iter(found)).spec if len(found) == 1 else None
        return cls(None, dict(layers)) if spec is None else cls(spec)

    def __getitem__(self, layer: int) -> Formats:
        """Those of a layer. Raises CheckpointError where nothing is said of it."""
        if self.spec is not None:
            return Formats.of(self.spec)
        if layer not in self.layers:
            known = spans(tuple(sorted(self.layers)))
            raise CheckpointError(f"config.json: formats say nothing of layer {layer}, only of {known}")
        return self.layers[layer]

    @property
    def each(self) -> dict[Formats, tuple[int, ...]]:
        """Each that there is, with the layers that have it, () for all of them."""
        if self.spec is not None:
            return {Formats.of(self.spec): ()}
        found: dict[Formats, tuple[int, ...]] = {}
        for layer, formats in sorted(self.layers.items()):
            found[formats] = *found.get(formats, ()), layer
        return found

    @property
    def name(self) -> str:
        """The names of all, each once: ``q4_k/q6_k``."""
        return "/".join(dict.fromkeys(spec.name for each in self.each for spec in (each.gate_up, each.down)))

    @property
    def described(self) -> str:
        """The formats in words, for people to read."""
        if len(self.each) == 1:
            return next(iter(self.each)).described
        return "; ".join(
            f"{formats.described} ({'layers' if len(layers) > 1 else 'layer'} {spans(layers)})"
            for formats, layers in self.each.items()
        )

    def stored(self) -> dict[str, Any]:
        """What config.json says of them."""
        if self.spec is not None:
            spec = self.spec
            return {"experts": spec.name, "group_size": spec.group_size, "zero_point": spec.zero_point}
        return {"experts": MIXED, "formats": {spans(n): stored_formats(formats) for formats, n in self.each.items()}}


def read_layers(found: Any) -> dict[int, Formats]:
    """The formats by layer out of config.json's `formats`. Raises ArgumentError, which says what is wrong there."""
    if not isinstance(found, dict) or not found:
        raise ArgumentError("formats: expected an object that has the formats of layers")
    layers: dict[int, Formats] = {}
    for numbers, formats in found.items():
        if not re.fullmatch(r"\d{1,6}(-\d{1,6})?(, \d{1,6}(-\d{1,6})?)*", str(numbers)):
            raise ArgumentError(f'formats: expected numbers of layers such as "0-3, 5", found {shown(numbers)}')
        try:
            one = read_formats(formats)
        except ArgumentError as error:
            raise ArgumentError(f"formats of layers {numbers}: {error}") from error
        for part in str(numbers).split(", "):
            first, _, last = part.partition("-")
            layers |= dict.fromkeys(range(int(first), int(last or first) + 1), one)
    return layers
