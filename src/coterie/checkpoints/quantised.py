"""Checkpoints that another method quantised: told apart, described, never read as if their numbers were plain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from coterie.checkpoints.folder import Folder, read_json
from coterie.checkpoints.scheme import Scheme
from coterie.checkpoints.schemes import AWQ, QUANTISED, gptq
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError

# What ends the names of tensors that only quantised weights have -> the methods that name them so.
MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8, NVFP4 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    "_proj_blocks": "MXFP4",
    "_proj_scales": "MXFP4",
    ".weight.absmax": "bitsandbytes",
}
# Formats that a quantization_config names without giving their bits: scales included, a weight.
BITS = {
    "mxfp4": 4 + 8 / 32,
    "mxfp8": 8 + 8 / 32,
    "nvfp4": 4 + 8 / 16,
    "fp4": 4 + 8 / 32,  # DeepSeek-V4's expert_dtype
    "fp8": 8.0,
}


CONFIG_KEYS = ("quantization_config", "compression_config")
MODELOPT_FILE = "hf_quant_config.json"
Options = Mapping[str, Any]


class Method(NamedTuple):
    """A method whose checkpoints are read.

    schemes: how they store matrices, by their options in config.json. reads: options, with the values under which their
    tensors say the rest: each module's own bits and group size, and whether it is quantised at all.
    """

    schemes: Callable[[Options], tuple[Scheme, ...]]
    reads: dict[str, Callable[[Any], bool]]


def _gptq_format(options: Options) -> Any:
    return options.get("format") or options.get("checkpoint_format") or "gptq"


# AutoRound's names for the ways of others, the second of which it has from GPTQ without the difference in zero points.
AUTO_ROUND = {
    "auto_round:auto_gptq": gptq(zero_less=1),
    "auto_round:gptqmodel": gptq(zero_less=0),
    "auto_round": gptq(zero_less=0),
    "auto_round:auto_awq": AWQ,
}
METHODS = {
    "fp8": Method(lambda options: QUANTISED, {"weight_block_size": lambda block: block == [128, 128]}),
    "mxfp4": Method(lambda options: QUANTISED, {}),
    "compressed-tensors": Method(
        lambda options: QUANTISED,
        {
            "transform_config": lambda found: not found,
            "sparsity_config": lambda found: not found or (isinstance(found, dict) and found.get("format") == "dense"),
        },
    ),
    "modelopt": Method(lambda options: QUANTISED, {}),
    "gptq": Method(
        lambda options: gptq(zero_less=1 if _gptq_format(options) == "gptq" else 0),
        {
            "format": lambda found: found in (None, "gptq", "gptq_v2"),
            "checkpoint_format": lambda found: found in (None, "gptq", "gptq_v2"),
            "pack_dtype": lambda found: found in (None, "int32"),
            "dynamic": lambda found: not found or not any("format" in (entry or ()) for entry in found.values()),
        },
    ),
    "awq": Method(
        lambda options: AWQ,
        dict.fromkeys(("version", "format", "checkpoint_format"), lambda found: str(found).lower() in ("none", "gemm")),
    ),
    "auto-round": Method(
        lambda options: AUTO_ROUND[options["packing_format"]],
        {
            "packing_format": lambda found: found in AUTO_ROUND,
            "act_bits": lambda found: found is None or found >= 16,
        },
    ),
}


@dataclass(frozen=True, slots=True)
class Quantised:
    """`method` as config.json spells it, `name` of the format for people, `bits` of an expert's weight if known."""

    method: str
    name: str
    bits: float | None


def read_quantised(config: dict) -> Quantised | None:
    """How the weights of a model with this config.json are quantised; None where it does not say that they are."""
    found = quantisation_of(config)
    if found is None:
        return None
    if not isinstance(found, dict):
        return Quantised("an unnamed method", "unnamed", None)
    method = str(found.get("quant_method") or "an unnamed method")
    expert_dtype = next((part["expert_dtype"] for part in _parts(config) if part.get("expert_dtype")), None)
    if isinstance(expert_dtype, str):
        return Quantised(method, expert_dtype, BITS.get(expert_dtype))
    if method == "compressed-tensors":
        return _compressed_tensors(method, found)
    if method == "modelopt":
        algorithm = str(found.get("quant_algo", "unnamed")).lower()
        return Quantised(method, algorithm, BITS.get(algorithm))
    if method == "fp8":
        block = found.get("weight_block_size")
        sides = block if isinstance(block, list) and all(_positive(side) for side in block) else []
        scales = 32 / (sides[0] * sides[1]) if len(sides) == 2 else 0.0
        return Quantised(method, "fp8", 8 + scales)
    if method in BITS:
        return Quantised(method, method, BITS[method])
    return Quantised(method, *_integers(found.get("bits"), found.get("group_size"), zeros=found.get("sym") is not True))


def _parts(config: dict) -> list[dict]:
    """The config and, of multimodal models, that of the language model."""
    text = config.get("text_config")
    return [config, text] if isinstance(text, dict) else [config]


def quantisation_of(config: dict) -> Any:
    """What a config.json says of quantisation, None where it says nothing."""
    return next((part[key] for part in _parts(config) for key in CONFIG_KEYS if part.get(key)), None)


def says_quantised(root: Path) -> bool:
    """Whether config.json, or ModelOpt's file, of a checkpoint's folder says that its weights are quantised."""
    config = root / "config.json"
    return (root / MODELOPT_FILE).exists() or (config.exists() and quantisation_of(read_json(config)) is not None)


def without_quantisation(config: dict) -> dict:
    """A copy of a config.json that says nothing of quantisation."""
    kept = {key: value for key, value in config.items() if key not in CONFIG_KEYS}
    if isinstance(text := config.get("text_config"), dict):
        kept["text_config"] = without_quantisation(text)
    return kept


def check_quantised(folder: Folder) -> tuple[Scheme, ...]:
    """How a checkpoint that is quantised by one of METHODS, as its config says, may store matrices; () for a plain one.

    Raises CheckpointError, naming the method, for another method, for options that change what the codes mean, and for
    tensors of quantised weights that no config describes.
    """
    found = method_of(folder)
    if found is None:
        return ()
    method, options = found
    if method == "coterie":
        raise CheckpointError(
            f"{folder.path} says that coterie packed it, but holds no packed layers; convert the original again"
        )
    if problem := unread(method, options):
        raise CheckpointError(f"{folder.path} is quantised by {problem}; use the original checkpoint")
    return METHODS[method].schemes(options)


def unread(method: str, options: Any) -> str | None:
    """What of a method with these options, as config.json has them, is not read, and why; None where nothing."""
    if not isinstance(options, dict) or method not in METHODS:
        return (
            f"{method}: this version reads bf16, fp16 and f32, and what config.json says is quantised by "
            f"{', '.join(METHODS)}"
        )
    changed = {key: options.get(key) for key, reads in METHODS[method].reads.items() if not reads(options.get(key))}
    if not changed:
        return None
    named = ", ".join(f"{key} {shown(value)}" for key, value in changed.items())
    return f"{method} with {named}, which this version does not read"


def method_of(folder: Folder) -> tuple[str, Any] | None:
    """How a checkpoint is quantised, None where it is not: (method, its options) by config.json or by ModelOpt's file;
    by the names of tensors, without options."""
    if (quantised := read_quantised(folder.config)) is not None:
        return shown(quantised.method).strip("'"), quantisation_of(folder.config)
    modelopt = folder.root / MODELOPT_FILE
    if folder.path.is_dir() and modelopt.exists():
        options = read_json(modelopt).get("quantization")
        return "modelopt", options if isinstance(options, dict) else {}
    for name in folder.shard_of:
        for mark, method in MARKS.items():
            if name.endswith(mark):
                return f"{method} (it has {shown(name)})", None
    return None


def _compressed_tensors(method: str, found: dict) -> Quantised:
    name = str(found.get("format", "unnamed"))
    known = next((bits for part, bits in BITS.items() if name.startswith(f"{part}-")), None)
    groups = found.get("config_groups")
    weights = [g.get("weights") for g in groups.values() if isinstance(g, dict)] if isinstance(groups, dict) else []
    if known is not None or len(weights) != 1 or not isinstance(weights[0], dict):
        return Quantised(method, name, known)
    _, bits = _integers(weights[0].get("num_bits"), weights[0].get("group_size"), zeros=not weights[0].get("symmetric"))
    return Quantised(method, name, bits)


def _integers(bits: Any, group_size: Any, zeros: bool) -> tuple[str, float | None]:
    """Name and bits of integers with a 16-bit scale, and where `zeros` a zero point, a group (or a row)."""
    if not _positive(bits):
        return "unnamed", None
    scales = (16 + (bits if zeros else 0)) / group_size if _positive(group_size) else 0.0
    return f"int{bits}", bits + scales


def _positive(value: Any) -> bool:
    return isinstance(value, int) and value > 0
