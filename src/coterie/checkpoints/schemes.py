"""How checkpoints store a matrix: one row a way. And which of them a matrix is stored in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coterie.checkpoints.folder import Folder
from coterie.checkpoints.scheme import Part, Scheme
from coterie.checkpoints.tensorfile import PLAIN_DTYPES, shown
from coterie.errors import CheckpointError
from coterie.formats import ENCODINGS, Format, resolve

E4M3, U8, I32 = ("F8_E4M3",), ("U8",), ("I32",)
# Integers of a 32-bit element, by groups or by rows; int8 has no zero points to hold.
INTEGERS = tuple(
    Format(name, group_size, zero_point=encoding.zero_points)
    for name, encoding in ENCODINGS.items()
    if name in ("int4", "int8")
    for group_size in encoding.group_sizes
)
PLAIN = (Scheme(codes=Part(".weight", PLAIN_DTYPES)),)
PLAIN_STACKS = (Scheme(codes=Part("", PLAIN_DTYPES)),)
QUANTISED = (
    # DeepSeek-V3, Qwen3 and MiniMax-M2 in FP8; compressed-tensors by blocks; what is not experts in DeepSeek-V4
    *(
        Scheme(spec=resolve("fp8_block"), codes=Part(".weight", E4M3), scale=scale, ignored=(".input_scale",))
        for scale in (
            Part(".weight_scale_inv", ("F32", "BF16")),
            Part(".weight_scale", ("F32", "BF16")),
            Part(".scale", ("F8_E8M0",)),
        )
    ),
    # compressed-tensors and ModelOpt, by rows or with one scale for the matrix
    Scheme(
        spec=resolve("fp8_channel"),
        codes=Part(".weight", E4M3),
        row_scale=Part(".weight_scale", PLAIN_DTYPES),
        ignored=(".input_scale",),
    ),
    # ModelOpt, and the same in compressed-tensors
    Scheme(
        spec=resolve("nvfp4"),
        codes=Part(".weight", U8, 2),
        scale=Part(".weight_scale", E4M3),
        row_scale=Part(".weight_scale_2", ("F32",)),
        ignored=(".input_scale",),
    ),
    Scheme(
        spec=resolve("nvfp4"),
        codes=Part(".weight_packed", U8, 2),
        scale=Part(".weight_scale", E4M3),
        row_scale=Part(".weight_global_scale", ("F32",)),
        divides=True,
        ignored=(".input_global_scale",),
    ),
    # ModelOpt and compressed-tensors
    Scheme(spec=resolve("mxfp8"), codes=Part(".weight", E4M3), scale=Part(".weight_scale", U8)),
    # DeepSeek-V4's experts; compressed-tensors
    Scheme(spec=resolve("mxfp4"), codes=Part(".weight", ("I8",), 2), scale=Part(".scale", ("F8_E8M0",))),
    Scheme(spec=resolve("mxfp4"), codes=Part(".weight_packed", U8, 2), scale=Part(".weight_scale", U8)),
    # compressed-tensors' int8, a byte each
    Scheme(
        spec=resolve("int8", 0),
        codes=Part(".weight", ("I8",)),
        signed=True,
        row_scale=Part(".weight_scale", PLAIN_DTYPES),
        ignored=(".input_scale", ".input_zero_point"),
    ),
    # compressed-tensors (Kimi K2) by groups, or by rows; with zero points where it is not symmetric
    *(
        Scheme(
            spec=spec,
            codes=Part(".weight_packed", I32, 32 // spec.encoding.bits),
            scale=Part(".weight_scale", PLAIN_DTYPES) if spec.group_size else None,
            row_scale=None if spec.group_size else Part(".weight_scale", PLAIN_DTYPES),
            zero=zero,
            group_of=Part(".weight_g_idx", I32),
            stated=".weight_shape",
        )
        for spec, zero in (
            *((spec, Part(".weight_zero_point", I32, 32 // spec.encoding.bits, along=-2)) for spec in INTEGERS),
            *((replace(spec, zero_point=False), None) for spec in INTEGERS),
        )
    ),
)


def gptq(zero_less: int) -> tuple[Scheme, ...]:
    """GPTQ's way to store integers, whose zero points are stored less `zero_less`."""
    return tuple(
        Scheme(
            spec=spec,
            codes=Part(".qweight", I32, 32 // spec.encoding.bits, along=-2),
            transposed=True,
            scale=Part(".scales", PLAIN_DTYPES) if spec.group_size else None,
            row_scale=None if spec.group_size else Part(".scales", PLAIN_DTYPES),
            zero=Part(".qzeros", I32, 32 // spec.encoding.bits),
            zero_less=zero_less,
            group_of=Part(".g_idx", I32),
        )
        for spec in INTEGERS
    )


AWQ = tuple(
    Scheme(
        spec=spec,
        codes=Part(".qweight", I32, 8),
        transposed=True,
        halves=True,
        scale=Part(".scales", PLAIN_DTYPES) if spec.group_size else None,
        row_scale=None if spec.group_size else Part(".scales", PLAIN_DTYPES),
        zero=Part(".qzeros", I32, 8),
    )
    for spec in INTEGERS
    if spec.name == "int4"
)
QUANTISED_STACKS = (
    # gpt-oss
    Scheme(spec=resolve("mxfp4"), codes=Part("_blocks", U8, 2), blocks=True, scale=Part("_scales", U8)),
)


def choose(schemes: Sequence[Scheme], folder: Folder, base: str, stacked: bool = False) -> Scheme:
    """The scheme of matrix `base`, or of that stack: the only one, or else the one that its tensors' names, dtypes and
    shapes fit. Raises CheckpointError where none does."""
    if len(schemes) == 1 and schemes[0].spec is None:
        return schemes[0]  # its own checks say best what does not fit
    fitting = [scheme for scheme in schemes if scheme.fits(folder, base)]
    if len(fitting) == 1:
        return fitting[0]
    for scheme in fitting:
        try:
            scheme.check(folder, base, scheme.size(folder, base, stacked))
        except CheckpointError:
            continue
        return scheme
    entries = [folder.file_of(name).entry(name) for name in folder.shard_of if name.startswith(base)]
    found = ", ".join(f"{shown(e.name)} {e.dtype} {list(e.shape)}" for e in entries)
    names = "; ".join(dict.fromkeys(_describe(scheme) for scheme in fitting or schemes))
    expected = f"shapes of one of its bits and group sizes in {names}" if fitting else f"names that end in: {names}"
    raise CheckpointError(
        f"{folder.path}: these tensors are in no quantised format that this version reads: {found or shown(base)}. "
        f"Expected {expected}"
    )


def choose_all(
    first: Scheme, schemes: Sequence[Scheme], folder: Folder, sizes: dict[str, tuple[int, ...]]
) -> dict[str, Scheme]:
    """The scheme of each matrix, by what begins the names of its tensors, of a layer with these sizes: one for all
    where one fits all, `first` if it can be. Raises CheckpointError, saying why it cannot, where none fits a matrix."""
    chosen = {base: _choose_like(first, schemes, folder, base, size) for base, size in sizes.items()}
    several = dict.fromkeys(chosen.values())
    for scheme in several if len(several) > 1 else ():  # a row of 128 columns is also a group of 128
        if all(_problem(scheme, folder, base, size) is None for base, size in sizes.items()):
            return dict.fromkeys(sizes, scheme)
    return chosen


def _choose_like(
    first: Scheme, schemes: Sequence[Scheme], folder: Folder, base: str, size: tuple[int, ...]
) -> Scheme:
    problem = _problem(first, folder, base, size)
    if problem is None:
        return first
    for scheme in schemes:
        if _problem(scheme, folder, base, size) is None:
            return scheme
    raise problem


def _problem(scheme: Scheme, folder: Folder, base: str, size: tuple[int, ...]) -> CheckpointError | None:
    """Why matrix `base`, which is of that size, is not stored by a scheme; None where it is."""
    try:
        scheme.check(folder, base, size)
    except CheckpointError as error:
        return error
    return None


def _describe(scheme: Scheme) -> str:
    return " with ".join(f"{part.suffix} ({' or '.join(part.dtypes)})" for part in scheme.parts)
