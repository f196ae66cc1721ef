"""What packing the linear layers outside the experts takes and saves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.formats import Format, resolve
from coterie.plan.anatomy import Anatomy

SENSIBLE = "int8"  # half of bf16's bytes, at an error that does not show
WORTH_IT = 0.1  # of the bytes that a token reads


@dataclass(frozen=True, slots=True)
class Dense:
    """Linear layers that are packed, `count` of them; bytes.

    nbytes: packed. saved: RAM, of what they take in bf16; a head that shares its weight with the embedding only adds to
    that. read: what a token reads of them, packed. read_saved: what it reads less than in bf16. prompt: by format, the
    parameters that every token of a prompt is multiplied with.
    """

    count: int
    nbytes: int
    saved: int
    read: int
    read_saved: int
    prompt: Mapping[Format, int]

    @property
    def prompt_parameters(self) -> int:
        """In all formats."""
        return sum(self.prompt.values())

    @property
    def described(self) -> str:
        return " and ".join(spec.described for spec in self.prompt)


def dense(anatomy: Anatomy, specs: Format | Mapping[str, Format], skip: Sequence[str] = ()) -> Dense:
    """The linear layers of a model packed in one format, or in those that they have by name, without those whose names
    match a regular expression in `skip`.

    Raises ArgumentError for columns that the group size does not divide.
    """
    count = nbytes = saved = read = read_saved = 0
    prompt = Counter[Format]()
    for layer in anatomy.linears:
        spec = specs if isinstance(specs, Format) else specs.get(layer.name)
        if spec is None or any(re.search(pattern, layer.name) for pattern in skip):
            continue
        spec.check_columns(layer.name, layer.columns)
        packed, plain = spec.matrix_nbytes(layer.rows, layer.columns), 2 * layer.rows * layer.columns
        count += 1
        nbytes += packed
        saved += (0 if layer.shared else plain) - packed
        read += packed if layer.read else 0
        read_saved += plain - packed if layer.read else 0
        prompt[spec] += layer.rows * layer.columns if layer.read and not layer.head else 0
    return Dense(count, nbytes, saved, read, read_saved, prompt)


def sensible(anatomy: Anatomy, formats: ModelFormats) -> Dense | None:
    """What is worth packing beside experts in these formats, on a CPU; None where it saves few of a token's bytes."""
    packed = dense(anatomy, resolve(SENSIBLE))
    read = anatomy.experts_read_nbytes(formats) + anatomy.rest_read_nbytes + anatomy.cache_nbytes
    return packed if packed.read_saved >= WORTH_IT * read else None
