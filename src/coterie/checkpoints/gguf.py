"""Experts in GGUF files: a stack of each projection a layer, `blk.{L}.ffn_{gate,up,down}_exps.weight`."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.activations import Activation
from coterie.checkpoints.codes import Codes
from coterie.checkpoints.gguf_file import GgufFile
from coterie.checkpoints.gguf_types import TYPES, Type, widest
from coterie.checkpoints.reader import LayerReader, Reader, spans
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from coterie.formats import Format

EXPERTS = re.compile(r"blk\.(?P<layer>\d+)\.ffn_(?:gate|up|down|gate_up)_exps\.(?P<kind>\w+)")
# The metadata does not say what the experts compute. Architectures that are known to compute silu(gate) * up:
SILU = {
    "afmoe", "bailingmoe", "bailingmoe2", "deepseek", "deepseek2", "dots1", "ernie4_5-moe", "exaone-moe", "glm-dsa",
    "glm4moe", "granitehybrid", "granitemoe", "hunyuan-moe", "jamba", "kimi-linear", "lfm2moe", "llama", "minimax-m2",
    "olmoe", "phimoe", "qwen2moe", "qwen35moe", "qwen3moe", "qwen3next", "qwen3vlmoe",
}  # fmt: skip
ACTIVATIONS = {
    **dict.fromkeys(SILU, Activation()),
    "gemma4": Activation("gelu_tanh"),
    "gpt-oss": Activation("silu", alpha=1.702, limit=7.0, up_offset=1.0),
    "nemotron_h_moe": Activation("relu2"),
}
UNGATED = {"nemotron_h_moe"}  # architectures whose experts have no gate
# Architectures whose routers have scales, of their input and of the weights that they give to experts, and the tensors
# beside which these stand as elsewhere what those are multiplied by.
ROUTER_SCALES = {"gemma4": ("ffn_gate_inp", "ffn_down_exps")}
PLAIN_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class GgufReader(Reader):
    """The experts of a GGUF model.

    types: the names of the types that they are stored in. parameters: what other tensors are to a model, if that was
    looked for: by parameter, those that it has as they are.
    Raises CheckpointError for a broken file, MissingTensorError for one without experts, UnsupportedModelError for one
    that is what a model sees with.
    """

    folder = None
    schemes = ()

    def __init__(self, file: GgufFile):
        self.file = file
        self.experts_per_token = file.own_value("expert_used_count")
        blocks, drafts = file.own_value("block_count"), file.own_value("nextn_predict_layers", 0)
        if not isinstance(blocks, int | None) or not isinstance(drafts, int):
            raise CheckpointError(f"{file.path}: block_count is {shown(blocks)}, of which {shown(drafts)} are drafts'")
        names = [name for name in file.names if (match := EXPERTS.fullmatch(name)) and match["kind"] == "weight"]
        layers = {int(name.split(".")[1]) for name in names}
        self._layers = tuple(sorted(n for n in layers if blocks is None or n < blocks - drafts))
        if file.architecture == "clip":
            raise UnsupportedModelError(
                f"{file.path} is what a model sees or hears with (mmproj), not the model: give the path of the "
                "model's own file, of which the language model is read"
            )
        if not self._layers:
            raise MissingTensorError(
                f"{file.path}: no experts found; the names tried: blk.{{L}}.ffn_{{gate,up,down,gate_up}}_exps.weight"
            )
        found = {file.type(name): name for name in names if int(name.split(".")[1]) in self._layers}
        for kind, name in found.items():
            if kind not in TYPES:
                raise CheckpointError(
                    f"{file.path}, tensor {shown(name)}: type {kind}, this version reads {', '.join(TYPES)}"
                )
        self.types = tuple(found)
        self.parameters: dict[str, str] = {}

    def __deepcopy__(self, memo: dict) -> GgufReader:
        """Copies of a config that holds one share it."""
        return self

    @property
    def layers(self) -> tuple[int, ...]:
        return self._layers

    def codes(self, parameter: str, spec: Format | None) -> Codes | None:
        """The codes of a parameter, if its tensor has some in that format or, without one, in any."""
        if self.format_of(parameter, spec) is None:
            return None
        name = self.parameters[parameter]
        found = _matrix(self.file, name)
        self.file.release(name)
        return found if isinstance(found, Codes) else None

    def format_of(self, parameter: str, spec: Format | None) -> Format | None:
        """The format of those codes, which are not read for it; None where there are none."""
        name = self.parameters.get(parameter)
        kind = None if name is None else TYPES.get(self.file.type(name))
        return kind.spec if kind is not None and kind.codes is not None and spec in (None, kind.spec) else None

    def layer(self, layer: int) -> LayerReader:
        if layer not in self._layers:
            raise CheckpointError(
                f"{self.file.path} has no experts in layer {layer}; layers with experts: {spans(self._layers)}"
            )
        return _open_layer(self.file, layer)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufExperts(LayerReader):
    """One layer. `names` has the tensor of each projection; "gate_up" for gate and, behind it, up in one."""

    file: GgufFile
    names: dict[str, str]

    def expert(self, expert: int) -> dict[str, Tensor | Codes]:
        found: dict[str, Tensor | Codes] = {}
        for part, name in self.names.items():
            weight = _matrix(self.file, name, expert)
            if part != "gate_up":
                found[part] = weight
                continue
            half = self.intermediate_size
            for own, rows in (("gate", (0, half)), ("up", (half, 2 * half))):
                found[own] = weight.rows(*rows) if isinstance(weight, Codes) else weight[slice(*rows)]
        return found

    def matrix(self, projection: str, expert: int) -> Tensor | Codes:
        """One projection of one expert, as `expert` gives it."""
        if projection in self.names:
            return _matrix(self.file, self.names[projection], expert)
        return self.expert(expert)[projection]

    def tensor_of(self, projection: str) -> str:
        """The name of the tensor that has a projection."""
        return self.names.get(projection) or self.names["gate_up"]

    def bias_of(self, projection: str) -> str:
        return _bias(self.tensor_of(projection))

    def parts_of(self, tensor: str) -> tuple[str, ...]:
        """The projections that a tensor has."""
        parts = ("gate", "up", "down") if self.has_gate else ("up", "down")
        return tuple(part for part in parts if self.tensor_of(part) == tensor)

    def stored(self, expert: int, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        raise CheckpointError(f"{self.file.path}: GGUF files are read, not written; convert it first")

    def biases(self) -> dict[str, Tensor]:
        if not self.biased:
            return {}
        found = {part: torch.from_numpy(self.file.dequantize(_bias(name)).copy()) for part, name in self.names.items()}
        if "gate_up" in found:
            both = found.pop("gate_up")
            found |= {"gate": both[:, : self.intermediate_size], "up": both[:, self.intermediate_size :]}
        return {part: found[part].contiguous() for part in self.biased}

    def release(self, expert: int) -> None:
        for name in self.names.values():
            self.file.release(name, expert, self.num_experts)


def scale_of(file: GgufFile, tensor: str) -> str | None:
    """The tensor that another is multiplied by, a number an expert; None where there is none."""
    stem = tensor.removesuffix(".weight")
    of_router = stem.rpartition(".")[2] in ROUTER_SCALES.get(file.architecture, ())
    return f"{stem}.scale" if f"{stem}.scale" in file.names and not of_router else None


def _bias(name: str) -> str:
    return name.removesuffix(".weight") + ".bias"


def _open_layer(file: GgufFile, layer: int) -> GgufExperts:
    """Checks every tensor of the layer. Raises CheckpointError.

    Gate and up have one format, down has one: that of their types, or the smallest that none of them is larger than.
    """
    stem = f"blk.{layer}.ffn_"
    has_gate = file.architecture not in UNGATED
    parts = ("gate", "up", "down") if has_gate else ("up", "down")
    if has_gate and f"{stem}gate_up_exps.weight" in file.names:
        parts = ("gate_up", "down")
    names = {part: f"{stem}{part}_exps.weight" for part in parts}
    missing = [name for name in names.values() if name not in file.names]
    if missing:
        raise MissingTensorError(
            f"{file.path} has no tensor {missing[0]}; the names tried: {', '.join(names.values())}"
        )
    folds = 2 if "gate_up" in names else 1
    experts, rows, hidden = _size(file, names[parts[0]])
    intermediate = rows // folds
    for part, name in names.items():
        expected = (experts, hidden, intermediate) if part == "down" else (experts, folds * intermediate, hidden)
        if (found := _size(file, name)) != expected:
            raise CheckpointError(f"{file.path}, tensor {name}: shape {list(found)}, expected {list(expected)}")
    stated = file.own_value("expert_count", experts)
    if stated != experts:
        raise CheckpointError(f"{file.path}, {stem}*: {experts} experts, the metadata says {stated}")
    biased = tuple(part for part, name in names.items() if _bias(name) in file.names)
    if biased and biased != parts:
        raise CheckpointError(
            f"{file.path}, {stem}*: biases of {', '.join(biased)} alone, expected of {', '.join(parts)}"
        )
    for part in biased:
        expected = (experts, hidden if part == "down" else folds * intermediate)
        if file.shape(_bias(names[part])) != expected:
            raise CheckpointError(
                f"{file.path}, tensor {_bias(names[part])}: shape {list(file.shape(_bias(names[part])))}, "
                f"expected {list(expected)}"
            )
    own = tuple(name for name in file.names if name.startswith(stem) and EXPERTS.fullmatch(name))
    known = {*names.values(), *(_bias(names[part]) for part in biased)}
    for name in own:
        kind = EXPERTS.fullmatch(name)["kind"]  # type: ignore[index]
        if name not in known and kind not in ("scale", "input_scale"):
            raise CheckpointError(
                f"{file.path}, tensor {shown(name)}: this version does not know what it is to experts"
            )
    kinds = {"gate_up": [file.type(names[part]) for part in parts[:-1]], "down": [file.type(names["down"])]}
    specs = {part: widest([TYPES[kind] for kind in found]) for part, found in kinds.items()}
    odd = [kind for part, found in kinds.items() for kind in found if not TYPES[kind].keeps(specs[part])]
    return GgufExperts(
        num_experts=experts,
        hidden_size=hidden,
        intermediate_size=intermediate,
        has_gate=has_gate,
        biased=(("gate",) if has_gate else ()) + ("up", "down") if biased else (),
        activation=_activation(file),
        specs={part: (spec,) for part, spec in specs.items()},
        tensors=own,
        nbytes=sum(file.nbytes(name) for name in names.values()),
        odd=", ".join(dict.fromkeys(odd)),
        file=file,
        names=names,
    )


def _size(file: GgufFile, name: str) -> tuple[int, ...]:
    shape = file.shape(name)
    if len(shape) != 3 or 0 in shape:
        raise CheckpointError(f"{file.path}, tensor {name}: shape {list(shape)}, expected [experts, rows, columns]")
    return shape


def _activation(file: GgufFile) -> Activation:
    if file.architecture not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"{file.path}: GGUF architecture {shown(file.architecture)}: this version does not know what its experts "
            f"compute; it knows {', '.join(sorted(ACTIVATIONS))}"
        )
    return ACTIVATIONS[file.architecture]


def _matrix(file: GgufFile, name: str, expert: int | None = None) -> Tensor | Codes:
    """A matrix [rows, cols], or one expert's: as it is where it is plain or has codes of a format, else float32."""
    kind = file.type(name)
    stored: Type = TYPES[kind]
    scale = scale_of(file, name)
    factor = 1.0 if scale is None else float(file.data(scale, expert))
    if kind in PLAIN_TORCH and factor == 1.0:
        return torch.from_numpy(file.data(name, expert).copy()).view(PLAIN_TORCH[kind])
    if stored.codes is None or stored.spec is None:
        return torch.from_numpy(file.dequantize(name, expert).copy()).mul_(factor)
    rows = file.data(name, expert)
    codes = stored.codes(stored.spec, rows.reshape(len(rows), -1, file.block_bytes(name)))
    if factor == 1.0:
        return codes
    if codes.row_scale is None:
        return codes.dequantize().mul_(factor)
    return replace(codes, row_scale=codes.row_scale * factor)
