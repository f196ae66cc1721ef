"""CoterieConfig: how the experts of a model are to be packed, or are packed; stored in config.json."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

from transformers.quantizers import auto
from transformers.utils.quantization_config import QuantizationConfigMixin

from coterie.arithmetic import check_activations
from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.packed import VERSION
from coterie.checkpoints.packed_formats import MIXED, OWN, ModelFormats, read_layers
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import Format, resolve
from coterie.gpu.room import CONTEXT

METHOD = "coterie"
STORED = ("experts", "group_size", "zero_point", "formats", "dense", "dense_skip")  # what is packed, and how
# How packed experts are opened, what they compute with, and which are on the GPU.
LOADING = ("mmap", "activations", "gpu_experts", "gpu_context")
NO_FORMAT = "dense_skip: expected dense=... too, the format that the other layers are packed in"
OPTIONS = (*STORED, "scale_search", *LOADING)


@auto.register_quantization_config(METHOD)
class CoterieConfig(QuantizationConfigMixin):
    """How the experts of a model are packed, and its linear layers; the rest of the model keeps its dtype.

    experts: "bf16", "int8" or "int4", which is the default. "mixed" where they are packed in several formats, as a
        quantised checkpoint has them.
    group_size: columns that share one scale, 0 for one scale per row. Default: 32 for int4, per row for int8.
    zero_point: int4 with zero points (asymmetric): more accurate, slightly larger.
    formats: of "mixed" experts, by layer; as docs/format.md has it.
    scale_search: choose scales that minimise the squared error, at pack time.
    mmap: read a packed checkpoint in place instead of copying it into huge pages; for models larger than memory.
    activations: what int8 and int4 experts and linear layers compute with, "auto", "bf16" or "int8"; see `Experts`.
    gpu_experts: which experts are on the GPU that the rest of the model is on, packed as in RAM: "all", a number of
        each layer's, a fraction in (0, 1] (both take the first ones), a bool mask [layers, experts], or "auto": as many
        of each layer as there is room for beside the rest of the model, a KV cache and activations (`gpu/room.py`). Or
        "stream": they stay in RAM, and a layer's are sent to the GPU and computed there for calls of so many tokens
        that this is faster, by rates measured in the first call; "stream:256": for 256 tokens or more. Default: none.
    gpu_context: tokens of the KV cache that "auto" leaves room for. Default: 8192.
    dense: the format that linear layers outside the experts are packed in: attention, dense MLPs, shared experts, the
        head; routers and embeddings stay. A head that shares its weight with the embedding is a packed copy from then
        on. "own": those that the checkpoint has quantised keep their codes, each its own, and the others have the
        model's dtype; on a GPU all have. Default: all have.
    dense_skip: regular expressions; layers whose names they match keep their dtype.

    Given for a packed checkpoint, what is said of its formats must be what it is packed as. `dense` packs linear layers
    that it has in their own dtype; "own" and None leave all as they are.
    Raises ArgumentError for a format, group size or option that does not exist.
    """

    def __init__(
        self,
        experts: str | None = None,
        group_size: int | None = None,
        zero_point: bool | None = None,
        scale_search: bool = True,
        mmap: bool = False,
        activations: str = "auto",
        gpu_experts: Any = None,
        gpu_context: int = CONTEXT,
        dense: str | None = None,
        dense_skip: Sequence[str] | str = (),
        formats: dict[str, Any] | None = None,
        quant_method: str = METHOD,
        version: str = VERSION,
        **unknown: Any,
    ):
        if unknown:
            name = next(iter(unknown))
            near = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ArgumentError(f"CoterieConfig has no option {name!r}; its options: {', '.join(OPTIONS)}{hint}")
        if quant_method != METHOD:
            raise ArgumentError(f"CoterieConfig: quant_method is {quant_method!r}, expected {METHOD!r}")
        if str(version).split(".")[0] != VERSION.split(".")[0]:
            raise CheckpointError(
                f"config.json: packed format version {version!r}, this coterie reads {VERSION}; update coterie, "
                "or convert the original checkpoint again"
            )
        self.dense = dense if dense in (None, OWN) else resolve(dense).name
        self.dense_skip = check_skip(dense_skip)
        if self.dense_skip and dense is None:
            raise ArgumentError(NO_FORMAT)
        given = {"experts": experts, "group_size": group_size, "zero_point": zero_point, "dense": self.dense}
        given["dense_skip"] = self.dense_skip or None
        self.asked = {name: value for name, value in given.items() if value not in (None, OWN)}
        if (experts == MIXED) != (formats is not None):
            raise ArgumentError(f"experts={MIXED!r} and formats are of packed checkpoints, and go together")
        self.quant_method = METHOD
        self.version = VERSION
        self.scale_search = scale_search
        self.mmap = mmap
        self.activations = activations
        self.gpu_experts = gpu_experts
        if isinstance(gpu_context, bool) or not isinstance(gpu_context, int) or gpu_context < 1:
            raise ArgumentError(f"gpu_context: expected a number of tokens, at least 1, found {gpu_context!r}")
        self.gpu_context = gpu_context
        self.gguf: GgufReader | None = None  # where the experts are, while a GGUF file is loaded
        if formats is not None:
            self.become(ModelFormats(None, read_layers(formats)))
        else:
            self.become(ModelFormats(resolve("int4" if experts is None else experts, group_size, bool(zero_point))))

    def become(self, formats: ModelFormats) -> None:
        """Sets the formats of the packed weights. Raises ArgumentError where `activations` does not go with one."""
        for each in formats.each:
            check_activations(self.activations, each)
        self.packing = formats
        self.group_size = self.zero_point = self.formats = None
        vars(self).update(formats.stored())

    @property
    def spec(self) -> Format | None:
        """The format of the packed experts; None where they have several, which `packing` has."""
        return self.packing.spec

    def get_loading_attributes(self) -> dict[str, Any]:
        """What Transformers copies onto the config of a packed checkpoint when this one is given for it too."""
        return {name: getattr(self, name) for name in ("asked", *LOADING)}

    def check_asked(self) -> None:
        """Raises ArgumentError where a packed checkpoint was asked for in another format than it is packed in.

        Linear layers that it does not have packed are to be packed as asked for.
        """
        if self.dense is None:
            self.dense, self.dense_skip = self.asked.get("dense"), self.asked.get("dense_skip", [])
        for name, value in self.asked.items():
            if value != getattr(self, name):
                raise ArgumentError(
                    f"{name}={value!r}, but the checkpoint is already packed with {name}={getattr(self, name)!r}: "
                    "leave it out, or start from the original checkpoint"
                )

    def to_dict(self) -> dict[str, Any]:
        """What is stored in config.json: what is packed and how, not how it was made or is to be opened."""
        stored = {
            name: value for name, value in super().to_dict().items() if name in ("quant_method", "version", *STORED)
        }
        dropped = ("dense", "dense_skip") if self.spec else ("dense", "dense_skip", "group_size", "zero_point")
        return {name: value for name, value in stored.items() if value or name not in (*dropped, "formats")}


def check_skip(patterns: Sequence[str] | str) -> list[str]:
    """`dense_skip` as a list. Raises ArgumentError for what is no regular expression."""
    found = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in found:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise ArgumentError(f"dense_skip: {pattern!r} is not a regular expression: {error}") from None
    return found


# Transformers asks those for their loading attributes that it lists here.
auto.LOADING_ATTRIBUTES_CONFIG_TYPES += (CoterieConfig,)
