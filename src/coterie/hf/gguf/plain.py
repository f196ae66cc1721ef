"""A GGUF file as a plain checkpoint: the tensors that the original has, by its names, made a matrix at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from coterie.checkpoints.codes import Codes
from coterie.checkpoints.gguf import GgufExperts, GgufReader, scale_of
from coterie.checkpoints.gguf_file import GgufFile
from coterie.checkpoints.tensorfile import DTYPES, PLAIN_DTYPES
from coterie.convert.tensors import Made
from coterie.hf.gguf.weights import RestWeight, rest_weights
from coterie.hf.layout import Layout
from coterie.hf.modules import read_layouts
from coterie.hf.names import expert_names, stored_name
from coterie.hf.quantised import read_experts


def plain_tensors(reader: GgufReader, model: PreTrainedModel, dtype: str) -> list[Made]:
    """All tensors of the checkpoints of `model`, which has no weights: in `dtype`, as files name it, what the file has
    in blocks, in its own what it has as numbers. Nothing is read.

    Raises CheckpointError where the file is not the model's, UnsupportedModelError for experts that are stored in
    another way than Transformers has them.
    """
    weights, layouts = rest_weights(reader.file, model), read_layouts(model)
    found = [_of_rest(stored_name(model, parameter), weight, dtype) for parameter, weight in weights.items()]
    for name, layer in read_experts(reader, layouts, reader.file.path).items():
        assert isinstance(layer, GgufExperts)
        found += _of_experts(model, name, layouts[name], layer, dtype)
    return found


def _of_rest(name: str, weight: RestWeight, dtype: str) -> Made:
    own = _own_dtype(weight.file, weight.tensors)
    numbers = DTYPES[own or dtype][1]
    nbytes = sum(weight.file.nbytes(tensor) for tensor in weight.tensors)
    return Made(name, own or dtype, weight.shape, partial(weight.pieces, numbers), nbytes, own is None)


def _of_experts(model: PreTrainedModel, module: str, layout: Layout, layer: GgufExperts, dtype: str) -> Iterator[Made]:
    names = expert_names(model, module, layout)
    for (expert, projection), name in sorted(names.apart.items()):
        tensor, rows, cols = layer.tensor_of(projection), layout.intermediate_size, layout.hidden_size
        own, share = _own_dtype(layer.file, [tensor]), layout.num_experts * len(layer.parts_of(tensor))
        shape = (cols, rows) if projection == "down" else (rows, cols)
        read = partial(_alone, layer, projection, expert)
        yield Made(name, own or dtype, shape, read, layer.file.nbytes(tensor) // share, own is None)
    for parameter, name in names.stacked.items():
        shape, transposed = layout.shape(parameter), parameter in names.transposed
        yield _stacked(layout, layer, parameter, name, dtype, shape, transposed)
    for parameter in layout.parameters:
        if parameter not in layout.weights:
            yield _biases(layout, layer, parameter, stored_name(model, f"{module}.{parameter}"), dtype)


def _stacked(
    layout: Layout,
    layer: GgufExperts,
    parameter: str,
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    transposed: bool,
) -> Made:
    """A parameter whose experts are stacked, an expert at a time."""
    projections = layout.projections_of(parameter)
    tensors = list(dict.fromkeys(map(layer.tensor_of, projections)))
    own, nbytes = _own_dtype(layer.file, tensors), sum(map(layer.file.nbytes, tensors))

    def read() -> Iterator[Tensor]:
        for expert in range(layout.num_experts):
            parts = {part: _matrix(layer, part, expert).float() for part in projections}
            joined = layout.join_weight(parameter, parts)
            yield joined.mT if transposed else joined

    shape = (shape[0], shape[2], shape[1]) if transposed else shape
    return Made(name, own or dtype, shape, read, nbytes, own is None)


def _biases(layout: Layout, layer: GgufExperts, parameter: str, name: str, dtype: str) -> Made:
    parts = layout.projections_of(parameter)
    tensors = list(dict.fromkeys(map(layer.bias_of, parts)))
    own, nbytes = _own_dtype(layer.file, tensors), sum(map(layer.file.nbytes, tensors))

    def read() -> Iterator[Tensor]:
        biases = layer.biases()
        yield layout.join_bias(parameter, {part: biases[part] for part in parts})

    return Made(name, own or dtype, layout.shape(parameter), read, nbytes, own is None)


def _alone(layer: GgufExperts, projection: str, expert: int) -> Iterator[Tensor]:
    yield _matrix(layer, projection, expert)


def _matrix(layer: GgufExperts, projection: str, expert: int) -> Tensor:
    """A copy. The memory that reading took is let go."""
    weight = layer.matrix(projection, expert)
    layer.file.release(layer.tensor_of(projection), expert, layer.num_experts)
    return weight.dequantize() if isinstance(weight, Codes) else weight


def _own_dtype(file: GgufFile, tensors: Sequence[str]) -> str | None:
    """The dtype of tensors of numbers, the first one's; None where one is stored in blocks, or multiplied by scales."""
    types = [file.type(tensor) for tensor in tensors]
    scaled = any(scale_of(file, tensor) for tensor in tensors)
    return None if scaled or not set(types) <= set(PLAIN_DTYPES) else types[0]
