"""What experts and models take in memory, from layouts and from models on the meta device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from coterie.formats import Formats
from coterie.hf.layout import Layout


def expert_matrices(layout: Layout) -> list[tuple[int, int]]:
    """(rows, columns) of an expert's matrices."""
    up = layout.intermediate_size, layout.hidden_size
    return [up, up, up[::-1]] if layout.has_gate else [up, up[::-1]]


def expert_parameters(layout: Layout) -> int:
    """Parameters of one expert, biases included."""
    return sum(rows * cols + (rows if layout.has_bias else 0) for rows, cols in expert_matrices(layout))


def expert_nbytes(layout: Layout, formats: Formats) -> int:
    """Packed bytes of one expert, biases (float32) included."""
    packed = formats.expert_nbytes(layout.hidden_size, layout.intermediate_size, layout.has_gate)
    return packed + bias_nbytes(layout)


def bias_nbytes(layout: Layout) -> int:
    """Bytes of one expert's biases, float32."""
    return 4 * sum(rows for rows, _ in expert_matrices(layout)) if layout.has_bias else 0


def rest_of(model: nn.Module, experts: list[nn.Module]) -> list[nn.Parameter]:
    """The parameters of `model` that are not those of its experts modules."""
    inside = {parameter for module in experts for parameter in module.parameters()}
    return [parameter for parameter in model.parameters() if parameter not in inside]


def loaded_nbytes(
    model: PreTrainedModel,
    layouts: dict[str, Layout],
    formats: Mapping[str, Formats],
    mmap: bool = False,
    rest_in_ram: bool = True,
    moved: Sequence[int] = (),
) -> int:
    """Bytes of RAM that `model` takes with its experts packed as `formats`; mapped ones are the page cache's.

    formats: by the name of the experts module, as layouts.
    moved: how many experts of each layer go to a device. A layer is whole in RAM until then.
    """
    counts = moved or [0] * len(layouts)
    packed = whole = 0
    for (name, layout), count in zip(layouts.items(), counts, strict=True):
        expert = expert_nbytes(layout, formats[name])
        packed += (layout.num_experts - count) * expert
        whole = max(whole, layout.num_experts * expert if count else 0)
    packed = 0 if mmap else packed + whole
    return packed + (rest_nbytes(model, layouts) if rest_in_ram else 0)


def rest_nbytes(model: PreTrainedModel, layouts: dict[str, Layout]) -> int:
    """Bytes of all parameters of `model` but its experts, once weights that are tied are one."""
    rest = sum(parameter.nbytes for parameter in rest_of(model, [model.get_submodule(name) for name in layouts]))
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not table.weight:
        rest -= head.weight.nbytes  # tied once the weights are there
    return rest
