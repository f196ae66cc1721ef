"""What expert tensors are called in Hugging Face checkpoints, and finding them among all names of one."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, field

from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError, MissingTensorError

# One row a family: what gate, up and down of one expert are called under `...experts.{e}.`
PER_EXPERT = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "w3", "down": "w2"},
)
# One row a family: what follows the block in `layers.{L}.{block}.`, gate and up (or up alone) first, then down. A layer
# may have "experts" without a block.
UNGATED = ("experts.up_proj", "experts.down_proj")
FUSED = (
    ("experts.gate_up_proj", "experts.down_proj"),
    UNGATED,
    ("experts.fc1.weight", "experts.fc2.weight"),
    ("input_linear.weight", "output_linear.weight"),
)
BLOCKS = ("mlp", "block_sparse_moe", "ffn", "feed_forward", "mixer")
# Blocks whose experts have no gate.
UNGATED_BLOCKS = ("mixer",)
# Draft layers for multi-token prediction: not part of the model that is run.
DRAFT = "mtp."

_LEAVES = "|".join(sorted({leaf for row in PER_EXPERT for leaf in row.values()}))
_STACKS = "|".join(sorted({re.escape(leaf) for row in FUSED for leaf in row}))
_BLOCK = rf"(?:.*\.)?layers\.(?P<layer>\d+)(?:\.(?:{'|'.join(BLOCKS)})|(?=\.experts\.))"
_SEPARATE = re.compile(rf"(?P<stem>{_BLOCK}\.experts)\.(?P<expert>\d+)\.(?P<leaf>{_LEAVES})(?P<kind>\.\w+)")
_FUSED = re.compile(rf"(?P<stem>{_BLOCK})\.(?P<leaf>{_STACKS})(?P<kind>(?:_[a-z0-9_]+)?)")
# Of a layer's experts as kt-kernel converts them, in tiles of its own for a number of NUMA nodes.
_KT_KERNEL = re.compile(r"blk\.\d+\.ffn_\w+_exps\.\d+\.numa\.\d+\.\w+")
# What follows the name of a matrix in that of the tensor with its numbers or codes; other tensors belong to these.
WEIGHTS = (".weight", ".weight_packed", ".qweight", "", "_blocks")


@dataclass(slots=True)
class LayerNames:
    """The expert tensors of one layer: `stem` is what their names begin with.

    Stored one by one, `experts` maps each expert's number to the leaves it has and `stem` ends in "experts"; stored as
    stacks, `experts` is empty, `leaves` has the stacks' and `stem` ends in the block. `kinds` has what follows a
    matrix's name in those of its tensors, and the first tensor that is called so.
    """

    layer: int
    stem: str
    leaves: set[str] = field(default_factory=set)
    experts: dict[int, set[str]] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        return not self.experts

    @property
    def has_gate(self) -> bool:
        return self.stem.removesuffix(".experts").rsplit(".", 1)[-1] not in UNGATED_BLOCKS


def find_layers(names: Collection[str], num_layers: int | None = None) -> dict[int, LayerNames]:
    """The layers that have experts, by layer number, among all tensor names of a checkpoint.

    Layers from `num_layers` on (draft layers stored behind the model's own) and multi-token prediction modules are left
    out. Raises MissingTensorError when there are none, CheckpointError when two modules claim the same layer.
    """
    found: dict[int, LayerNames] = {}
    kinds: dict[str, dict[str, str]] = {}
    for name in names:
        match = _SEPARATE.fullmatch(name) or _FUSED.fullmatch(name)
        if match is None or name.startswith(DRAFT):
            continue
        layer, stem = int(match["layer"]), match["stem"]
        if num_layers is not None and layer >= num_layers:
            continue
        kinds.setdefault(stem, {}).setdefault(match["kind"], name)
        if match["kind"] not in WEIGHTS:
            continue
        names_of = found.setdefault(layer, LayerNames(layer, stem))
        if names_of.stem != stem:
            raise CheckpointError(f"layer {layer} has experts under {shown(names_of.stem)} and under {shown(stem)}")
        if "expert" in match.re.groupindex:
            names_of.experts.setdefault(int(match["expert"]), set()).add(match["leaf"])
        else:
            names_of.leaves.add(match["leaf"])
    for names_of in found.values():
        names_of.kinds = kinds[names_of.stem]
    if not found:
        _refuse_kt_kernel(names)
        raise MissingTensorError("no experts found; the names tried: " + ", ".join(names_tried()))
    return dict(sorted(found.items()))


def _refuse_kt_kernel(names: Collection[str]) -> None:
    converted = next((name for name in names if _KT_KERNEL.fullmatch(name)), None)
    if converted is not None:
        raise CheckpointError(
            f"kt-kernel converted these experts ({shown(converted)}), in an order of bytes that is its own: use the "
            "original checkpoint, or convert it with `coterie convert cpu`"
        )


def names_tried(stem: str | None = None, expert: str = "{e}") -> list[str]:
    """Every name under which experts are looked for, or those that begin with the stem of a layer's."""
    leaves = [f"experts.{expert}.{leaf}.weight" for row in PER_EXPERT for leaf in row.values()]
    leaves += dict.fromkeys(leaf for row in FUSED for leaf in row)
    if stem is not None:
        return [f"{stem.removesuffix('.experts')}.{leaf}" for leaf in leaves]
    blocks = ",".join(f"{block}." for block in BLOCKS)
    return [f"*.layers.{{L}}.{{{blocks}{',' if leaf.startswith('experts.') else ''}}}{leaf}" for leaf in leaves]
