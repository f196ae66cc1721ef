"""Packing the experts of a checkpoint for the CPU; the rest of it is copied, and dequantised where it is quantised."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from coterie import cpu
from coterie.checkpoints import LayerReader, LayerWriter, Reader, TensorFile
from coterie.checkpoints.packed import PackedLayer, layer_file, read_layout
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.checkpoints.reader import spans
from coterie.convert.background import Background
from coterie.convert.linears import Dense
from coterie.convert.loose import loose_name
from coterie.convert.output import OutputFolder
from coterie.convert.progress import Meter, Progress
from coterie.convert.report import ConversionReport, LayerPacking, ProjectionError, together
from coterie.convert.rest import Rest
from coterie.convert.source import AUTO, check_input_type, open_source, rest_of
from coterie.errors import ArgumentError, CheckpointError
from coterie.experts import Experts
from coterie.formats import Format, Formats, resolve


def convert_cpu(
    source: str | os.PathLike,
    output: str | os.PathLike,
    quant_method: str | None = None,
    group_size: int | None = None,
    zero_point: bool = False,
    threads: int | None = None,
    layers: Sequence[int] | None = None,
    progress: Progress | None = None,
    *,
    input_type: str = AUTO,
    loose: bool = False,
    resume: bool = False,
    resume_layer: int | None = None,
    rest: str | os.PathLike | None = None,
    dense: Dense | None = None,
) -> ConversionReport:
    """Converts the checkpoint folder `source` into the new or empty folder `output`.

    `rest` is the folder that has everything but the experts where `source`, a GGUF file, has it in names of its own:
    `coterie.hf.converting.convert` makes one. `dense` packs the linear layers of the rest, which that knows too.

    `quant_method` None: int4 for a plain checkpoint; for a quantised one its own formats, which keep codes and scales
    (rounded to the format's own where they are finer). For any other a quantised checkpoint is dequantised, a matrix at
    a time. Beyond the page cache, one expert is in memory at a time, and a packed one that is being written. `layers`
    packs those layers alone, `loose` each in a folder of its own: files to be merged, without the rest of the
    checkpoint. `input_type` is checked against what the experts are, see INPUT_TYPES.

    Everything that can be checked is checked before `output` is touched. A conversion that fails or is killed leaves
    its finished layers in a folder that nothing loads, or, where it fails before any is, nothing. `resume` goes on
    there, at the first layer that is not finished, `resume_layer` at that layer: the files are those of a conversion
    that was not interrupted.

    Raises ArgumentError (options, output folder) and CheckpointError (broken source, output that cannot be written).
    """
    started = time.perf_counter()
    source, output = Path(source), Path(output)
    if quant_method is not None:
        resolve(quant_method, group_size, zero_point)
    reader = open_source(source)
    readers = {layer: reader.layer(layer) for layer in _selected(reader, layers)}
    check_input_type(input_type, source, reader, readers.values())
    formats = formats_for(readers, quant_method, group_size, zero_point)
    layouts = {layer: _layout(layer, r, formats[layer], source) for layer, r in readers.items()}
    scratch = {_kind(layout): (_one_expert(layout), _one_expert(layout)) for layout in layouts.values()}
    experts = {name for r in readers.values() for name in r.tensors}
    others = None
    if not loose and layers is None:
        others = Rest(rest_of(source, reader, rest), experts, reader.schemes, dense)
    packed_bytes = sum(layout.nbytes for layout in layouts.values())
    names = {layer: loose_name(layer) if loose else layer_file("", layer).name for layer in layouts}
    conversion = {"source": str(source.resolve()), "format": formats.described, "layers": spans(tuple(names))}
    conversion["layout"] = "loose files" if loose else "one checkpoint"
    packed = others.dense if others else None
    conversion["linear layers"] = packed.described if packed else "as they are"

    with _threads(threads), OutputFolder(output, conversion, resume or resume_layer is not None) as folder:
        _drop_unfinished(folder, layouts, names, resume_layer)
        packings = {layer: LayerPacking.of(notes, layer) for layer, notes in folder.finished.items()}
        resumed = tuple(packings)
        folder.check_room(packed_bytes + (others.nbytes if others else 0))
        left = sum(r.nbytes for layer, r in readers.items() if layer not in resumed)
        meter = Meter(progress, len(readers), left)
        for part, (layer, r) in enumerate(readers.items(), 1):
            if layer in resumed:
                continue
            two = scratch[_kind(layouts[layer])]
            told = partial(meter.add, part, r.num_experts)
            packings[layer] = _pack_layer(r, layouts[layer], folder.file(names[layer]), two, told)
            folder.finish(layer, packings[layer].notes())
        if others is not None:
            others.copy(formats, layouts.values(), folder.file)
    return ConversionReport(
        source=source,
        output=output,
        formats=formats,
        layers=tuple(readers),
        source_bytes=sum(r.nbytes for r in readers.values()),
        packed_bytes=packed_bytes,
        rest_source_bytes=others.source_bytes if others else 0,
        rest_bytes=others.tensor_bytes if others else 0,
        seconds=time.perf_counter() - started,
        errors=together(packings[layer] for layer in readers),
        sources=tuple(dict.fromkeys(spec for r in readers.values() for spec in r.kinds)),
        own=all(r.formats == formats[layer] for layer, r in readers.items()),
        repacked=sum(packing.repacked for packing in packings.values()),
        linear_bytes=others.linears.nbytes if others and others.linears else 0,
        linear_errors=others.linears.errors if others and others.linears else None,
        odd=", ".join(dict.fromkeys(r.odd for r in readers.values() if r.odd)),
        resumed=resumed,
        read_bytes=meter.done,
    )


def _drop_unfinished(
    folder: OutputFolder, layouts: Mapping[int, PackedLayer], names: Mapping[int, str], resume_layer: int | None
) -> None:
    """Drops the layers whose file is not there whole, and those from `resume_layer` on.

    Raises ArgumentError where a layer before it is not finished.
    """
    whole = {n for n in layouts if n in folder.finished and _holds(folder.path / names[n], layouts[n])}
    if resume_layer is not None:
        missing = [layer for layer in layouts if layer < resume_layer and layer not in whole]
        if missing:
            raise ArgumentError(
                f"--resume-layer is {resume_layer}: layer {missing[0]} is not finished in {folder.path}; "
                "--resume finds the layer itself"
            )
        whole = {layer for layer in whole if layer < resume_layer}
    if whole != set(folder.finished):
        folder.drop(set(folder.finished) - whole)


def _holds(path: Path, layout: PackedLayer) -> bool:
    """Whether a file holds that packed layer, whole."""
    try:
        return path.exists() and read_layout(TensorFile(path)) == layout
    except CheckpointError:
        return False


def _selected(reader: Reader, layers: Sequence[int] | None) -> Sequence[int]:
    if layers is None:
        return reader.layers
    unknown = sorted(set(layers) - set(reader.layers))
    if unknown or not layers:
        asked = f"layer {unknown[0]} has no experts" if unknown else "no layers were asked for"
        raise ArgumentError(f"{asked}; layers with experts: {spans(reader.layers)}")
    return sorted(set(layers))


def formats_for(
    readers: Mapping[int, LayerReader],
    quant_method: str | None = None,
    group_size: int | None = None,
    zero_point: bool = False,
) -> ModelFormats:
    """The format asked for, or else those of the experts of each layer, by number; int4 where all are plain.

    Raises ArgumentError for options that do not go together, and where several formats are mixed in gate and up, or in
    down, of a layer, and none is asked for.
    """
    if quant_method is not None or all(reader.formats is None for reader in readers.values()):
        return ModelFormats(resolve(quant_method or "int4", group_size, zero_point))

    def changed(own: Format) -> Format:
        return resolve(own.name, own.group_size if group_size is None else group_size, zero_point or own.zero_point)

    found = {}
    for layer, reader in readers.items():
        for part, specs in reader.specs.items():
            if len(specs) > 1:
                named = ", ".join(spec.described if spec else "plain" for spec in specs)
                raise ArgumentError(
                    f"layer {layer}: matrices of {part} are quantised in different ways ({named}): name one format for "
                    "all experts"
                )
        own = reader.formats or Formats.of(resolve("bf16"))
        found[layer] = Formats(changed(own.gate_up), changed(own.down))
    return ModelFormats.of(found)


def _layout(layer: int, reader: LayerReader, formats: Formats, source: Path) -> PackedLayer:
    return PackedLayer(
        layer=layer,
        num_experts=reader.num_experts,
        hidden_size=reader.hidden_size,
        intermediate_size=reader.intermediate_size,
        formats=formats,
        has_gate=reader.has_gate,
        activation=reader.activation,
        biased=reader.biased,
        source=source.resolve().name,
    )


def _kind(layout: PackedLayer) -> tuple[int, int, bool, Formats]:
    """What layers have in common whose experts take the same room."""
    return layout.hidden_size, layout.intermediate_size, layout.has_gate, layout.formats


def _one_expert(layout: PackedLayer) -> Experts:
    """Room for one packed expert."""
    return Experts.empty(
        1,
        layout.hidden_size,
        layout.intermediate_size,
        format=layout.formats,
        activation=layout.activation,
        has_gate=layout.has_gate,
    )


def _pack_layer(
    reader: LayerReader,
    layout: PackedLayer,
    path: Path,
    two: tuple[Experts, Experts],
    told: Callable[[int, int], None],
) -> LayerPacking:
    """Writes the file of a layer. `two` are room for an expert each; `told` hears of each, and of its bytes."""
    packing = LayerPacking()
    with LayerWriter(path, layout) as writer, Background() as writing:
        for expert in range(reader.num_experts):
            one = two[expert % 2]  # the other is being written
            _pack_expert(reader, layout.layer, expert, one, packing)
            writing.run(writer.write_experts, one, expert)
            reader.release(expert)
            told(expert + 1, reader.nbytes // reader.num_experts)
        for projection, bias in reader.biases().items():
            writer.write_bias(projection, bias)
    return packing


def _pack_expert(reader: LayerReader, layer: int, expert: int, one: Experts, packing: LayerPacking) -> None:
    for projection, weight in reader.expert(expert).items():
        try:
            error = one.pack_stored(projection, 0, weight)
        except ArgumentError as problem:
            raise CheckpointError(f"layer {layer}, expert {expert}, {projection}: {problem}") from problem
        packing.errors.setdefault(projection, ProjectionError()).add(layer, expert, error)
        packing.repacked += not reader.held(projection, weight)


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Computes with `count` threads while the block runs."""
    before = cpu.threads()
    if count is not None:
        cpu.set_threads(count)
    try:
        yield
    finally:
        if count is not None:
            cpu.set_threads(before)
