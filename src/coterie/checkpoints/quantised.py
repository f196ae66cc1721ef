"""Checkpoints that some other method quantised: named and refused, never read as if their numbers were plain."""

from __future__ import annotations

from coterie.checkpoints.folder import Folder, read_json
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


def refuse_quantised(folder: Folder) -> None:
    """Raises CheckpointError, naming the method, for a checkpoint that is quantised."""
    method = _method(folder)
    if method == "coterie":
        raise CheckpointError(
            f"{folder.path} says that coterie packed it, but holds no packed layers; convert the original again"
        )
    if method is not None:
        raise CheckpointError(
            f"{folder.path} is quantised by {method}: this version reads bf16, fp16 and f32 only; "
            "use the original checkpoint"
        )


def _method(folder: Folder) -> str | None:
    """By config.json, by ModelOpt's file, or by the names of tensors."""
    for config in (folder.config, folder.text_config):
        for key in ("quantization_config", "compression_config"):
            if (found := config.get(key)) is not None:
                method = found.get("quant_method") if isinstance(found, dict) else None
                return shown(method).strip("'") if method else "an unnamed method (quantization_config)"
    modelopt = folder.root / "hf_quant_config.json"
    if folder.path.is_dir() and modelopt.exists():
        algorithm = read_json(modelopt).get("quantization")
        name = algorithm.get("quant_algo") if isinstance(algorithm, dict) else None
        return f"ModelOpt {shown(name)}"
    for name in folder.shard_of:
        for mark, method in MARKS.items():
            if name.endswith(mark):
                return f"{method} (it has {shown(name)})"
    return None
