"""Hugging Face checkpoints, plain (bf16, fp16, f32) and quantised."""

from __future__ import annotations

from coterie.checkpoints.activation import activation_of
from coterie.checkpoints.folder import Folder
from coterie.checkpoints.hf_fused import open_fused
from coterie.checkpoints.hf_separate import open_separate
from coterie.checkpoints.naming import find_layers
from coterie.checkpoints.quantised import check_quantised
from coterie.checkpoints.reader import LayerReader, Reader, spans
from coterie.checkpoints.schemes import PLAIN, PLAIN_STACKS, QUANTISED_STACKS
from coterie.errors import CheckpointError

# Models that store gate and up of fused experts as alternating columns.
INTERLEAVED = {"gpt_oss"}
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class HFReader(Reader):
    """A Hugging Face checkpoint, each expert stored apart or all of a layer stacked.

    Raises MissingTensorError when it has no experts, listing the names tried, CheckpointError when it is quantised in a
    way that is not read.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.schemes = check_quantised(folder)
        config = folder.text_config
        per_token, num_layers = config.get("num_experts_per_tok"), config.get("num_hidden_layers")
        self.experts_per_token = per_token if isinstance(per_token, int) else None
        self.activation = activation_of(config)
        try:
            self._names = find_layers(folder.shard_of, num_layers if isinstance(num_layers, int) else None)
        except CheckpointError as error:
            raise type(error)(f"{folder.path}: {error.args[0]}") from None

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self._names)

    def layer(self, layer: int) -> LayerReader:
        if layer not in self._names:
            raise CheckpointError(
                f"{self.folder.path} has no experts in layer {layer}; layers with experts: {spans(self.layers)}"
            )
        names, config = self._names[layer], self.folder.text_config
        reader: LayerReader
        if names.fused:
            schemes = (QUANTISED_STACKS if self.schemes else ()) + PLAIN_STACKS
            reader = open_fused(self.folder, names, self.activation, config.get("model_type") in INTERLEAVED, schemes)
        else:
            reader = open_separate(self.folder, names, self.activation, self.schemes + PLAIN)
        counts = [config[key] for key in COUNT_KEYS if isinstance(config.get(key), int)]
        if counts and reader.num_experts not in counts:
            raise CheckpointError(
                f"{self.folder.path}, {names.stem}: {reader.num_experts} experts, config.json says {counts[0]}"
            )
        return reader
