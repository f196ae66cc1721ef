"""What a user may say about packed weights in vLLM: `--additional-config '{"coterie": {"mmap": true}}'`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from coterie.errors import ArgumentError


@dataclass(frozen=True, slots=True)
class Options:
    """mmap: use the pages of the files, which workers share, instead of copying them into huge pages.
    activations: what int8 and int4 experts compute with, "auto", "bf16" or "int8"; see `Experts`.
    """

    mmap: bool
    activations: str = "auto"

    @classmethod
    def of(cls, given: Mapping[str, Any], workers: int) -> Options:
        """Those given, else a copy for one worker, the files' own pages for several.

        Raises ArgumentError for an option that does not exist, or a value that it cannot have.
        """
        known = [field.name for field in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ArgumentError(f"additional_config: no option {unknown[0]!r} of coterie, expected {', '.join(known)}")
        options = cls(**{"mmap": workers > 1, **given})
        if not isinstance(options.mmap, bool):
            raise ArgumentError(f"additional_config: mmap is {options.mmap!r}, expected true or false")
        if workers > 1 and not options.mmap:
            raise ArgumentError(f"additional_config: mmap is false, expected true for {workers} workers")
        return options
