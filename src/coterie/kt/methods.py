"""What the names of methods mean: the mode they belong to, the format of the weights, and whether LoRA is trained."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.errors import ArgumentError
from coterie.formats import Format, resolve

MODES = ("inference", "sft")
SKIP_LORA = "_SkipLoRA"


@dataclass(frozen=True, slots=True)
class Method:
    """A method by its name.

    Attributes:
        name: as the caller wrote it.
        spec: the format that weights are packed into. Codes of a checkpoint that have the same name of format, in
            groups of another size, are kept as they are.
        skips_lora: backward goes through the frozen weights alone.
        keeps: weights of a GGUF file, or of what was packed, are kept in their own formats, whatever those are.
    """

    name: str
    spec: Format
    skips_lora: bool = False
    keeps: bool = False


INFERENCE = {
    "AMXINT4": "int4",
    "AMXINT8": "int8",
    "RAWINT4": "int4",
    "FP8": "fp8_block",
    "BF16": "bf16",
    "FP8_PERCHANNEL": "fp8_channel",
    "GPTQ_INT4": "int4",
    "MXFP4": "mxfp4",
    "MXFP8": "mxfp8",
    "NVFP4": "nvfp4",
    "LLAMAFILE": "q4_k",
    "MOE_INT4": "int4",
    "MOE_INT8": "int8",
}
KEEPS = {"LLAMAFILE"}
# Format, whether its groups are `group_size` columns, whether it has zero points where `zero_point` allows them.
SFT = {
    "AMXBF16_SFT": ("bf16", False, False),
    "AMXINT8_SFT": ("int8", False, False),
    "AMXINT4_SFT": ("int4", False, False),
    "AMXINT4_1_SFT": ("int4", False, True),
    "AMXINT4_KGroup_SFT": ("int4", True, False),
    "AMXINT4_1KGroup_SFT": ("int4", True, True),
}
SFT |= {name + SKIP_LORA: row for name, row in SFT.items()}
SFT |= {
    "AMXFP8_SFT": ("fp8_block", False, False),
    "MXFP4_SFT": ("mxfp4", False, False),
    "INT8_SFT": ("int8", False, False),
    "RAWINT4_SFT": ("int4", False, False),
}


def find_method(mode: str, name: str, group_size: int = 128, zero_point: bool = True) -> Method:
    """The method of that mode and name; `group_size` is that of the KGroup methods.

    Raises ArgumentError for an unknown mode, a method that the mode does not have, and a group size that int4 does not
    have.
    """
    if mode not in MODES:
        raise ArgumentError(f"mode: expected 'inference' or 'sft', found {mode!r}")
    names = INFERENCE if mode == "inference" else SFT
    if name not in names:
        raise ArgumentError(f"method: expected one of mode {mode!r}, {', '.join(names)}; found {name!r}")
    if mode == "inference":
        return Method(name, resolve(INFERENCE[name]), keeps=name in KEEPS)
    spec, grouped, zeros = SFT[name]
    return Method(name, resolve(spec, group_size if grouped else None, zeros and zero_point), name.endswith(SKIP_LORA))
