"""What a conversion needs a model of Transformers for: the rest of a GGUF file, and which tensors are linear layers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from coterie.checkpoints.folder import read_json
from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.gguf_file import GgufFile, find_gguf
from coterie.checkpoints.packed_formats import OWN
from coterie.checkpoints.packed_linears import LINEARS_FILE
from coterie.checkpoints.quantised import says_quantised
from coterie.checkpoints.tensorfile import DTYPES, PLAIN_DTYPES
from coterie.checkpoints.tensorwriter import check_room
from coterie.convert import ConversionReport, Progress, convert_cpu, verify
from coterie.convert import compare as comparing
from coterie.convert import dequantize as dequantizing
from coterie.convert.compare import Comparison
from coterie.convert.dequantize import Dequantized
from coterie.convert.linears import Dense, KeptLinear
from coterie.convert.merge import Merged
from coterie.convert.merge import merge as merge_layers
from coterie.convert.report import LinearErrors
from coterie.convert.rest import into_shards, write_shard
from coterie.convert.tensors import Made
from coterie.errors import ArgumentError, CheckpointError, UnsupportedModelError
from coterie.formats import resolve
from coterie.hf.config import NO_FORMAT, check_skip
from coterie.hf.dense import chosen_linears
from coterie.hf.empty import empty_model
from coterie.hf.gguf.config import read_config, save_tokenizer
from coterie.hf.gguf.plain import plain_tensors
from coterie.hf.gguf.weights import RestWeight, kept_tensors, rest_weights
from coterie.hf.linears import kept_linears
from coterie.hf.names import parameters_in, stored_name, tied_names
from coterie.hf.skeleton import make_config


def convert(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dense: str | None = OWN,
    dense_skip: Sequence[str] | str = (),
    **options: Any,
) -> ConversionReport:
    """`convert_cpu`, with its arguments, for any source, and with `dense` and `dense_skip` as in `from_pretrained`.

    Of a GGUF file Transformers makes config, tokenizer and all weights but the experts' first, in a temporary folder
    beside `output`; not those of linear layers that keep their codes.
    """
    if dense not in (None, OWN):
        resolve(dense)
    experts_alone = options.get("loose") or options.get("layers") is not None
    gguf = find_gguf(source)
    if experts_alone and dense not in (None, OWN):
        raise ArgumentError("--dense packs linear layers outside the experts, and loose layers are experts alone")
    if experts_alone:
        return convert_cpu(source, output, **options)
    if gguf is None:
        return convert_cpu(source, output, dense=_dense_of_folder(Path(source), dense, dense_skip), **options)
    reader = GgufReader(GgufFile(gguf))
    model = model_of_gguf(reader.file)
    if dense is None and dense_skip:
        raise ArgumentError(NO_FORMAT)
    weights = rest_weights(reader.file, model)
    reader.parameters = kept_tensors(weights)
    if dense is not None:
        kept = {}
        for name in kept_linears(model, reader.format_of, dense, check_skip(dense_skip)):
            weight = weights.pop(f"{name}.weight")
            nbytes = reader.file.nbytes(weight.tensors[0])
            kept[f"{name}.weight"] = KeptLinear(f"{name}.weight", weight.shape, nbytes)
        found = dense_of(model, dense, dense_skip)
        options["dense"] = replace(found, codes=reader.codes, format=reader.format_of, kept=kept)
    with rest_of_gguf(reader.file, model, weights, Path(output)) as rest:
        return convert_cpu(source, output, rest=rest, **options)


def merge(
    inputs: Sequence[str | os.PathLike],
    output: str | os.PathLike,
    original: str | os.PathLike | None = None,
    max_tensors: int | None = None,
) -> Merged:
    """`convert.merge.merge`, for any original: of a GGUF file the rest is made as `convert` does."""
    gguf = None if original is None else find_gguf(original)
    if gguf is None:
        return merge_layers(inputs, output, original, max_tensors)
    file = GgufFile(gguf)
    model = model_of_gguf(file)
    with rest_of_gguf(file, model, rest_weights(file, model), Path(output)) as rest:
        return merge_layers(inputs, output, original, max_tensors, rest)


def verify_linears(packed: str | os.PathLike, source: str | os.PathLike) -> LinearErrors:
    """How far the packed linear layers of a checkpoint are from its source's; none where it has none."""
    if not any(LINEARS_FILE.fullmatch(file.name) for file in Path(packed).iterdir()):
        return LinearErrors()
    tied, gguf = tied_names(model_of(Path(packed))), find_gguf(source)
    if gguf is None:
        return verify.verify_linears(Path(packed), Path(source), tied)
    file = GgufFile(gguf)
    model = model_of_gguf(file)
    with rest_of_gguf(file, model, rest_weights(file, model), Path(packed)) as rest:
        return verify.verify_linears(Path(packed), Path(source), tied, rest)


def dequantize(source: str | os.PathLike, output: str | os.PathLike, **options: Any) -> Dequantized:
    """`convert.dequantize.dequantize`, with its arguments, for GGUF files too: the original's tensors, in files as
    Transformers names them, in bf16 but for those that are numbers in the file, its config and its tokenizer."""
    gguf = find_gguf(source)
    if gguf is None:
        return dequantizing.dequantize(source, output, **options)
    reader = GgufReader(GgufFile(gguf))
    model = model_of_gguf(reader.file)
    shards = into_shards(plain_tensors(reader, model, dequantizing.DTYPE))
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder)
        model.config.save_pretrained(described)
        save_tokenizer(reader.file, described)
        opened = dequantizing.Opened(shards, None, read_json(described / "config.json"), described)
        return dequantizing.dequantize(gguf.parent, output, **options, opened=opened)


def compare(
    a: str | os.PathLike, b: str | os.PathLike, tolerance: float = 0.0, progress: Progress | None = None
) -> Comparison:
    """`convert.compare.compare`, for GGUF files too, which are compared by the numbers that they stand for."""
    return comparing.compare(a, b, tolerance, progress, _tensors)


def _tensors(path: Path) -> comparing.Opened:
    gguf = find_gguf(path)
    if gguf is None:
        return comparing.open_folder(path)
    reader = GgufReader(GgufFile(gguf))
    return None, {made.name: made for made in plain_tensors(reader, model_of_gguf(reader.file), "F32")}


def model_of_gguf(file: GgufFile) -> PreTrainedModel:
    """The model of a GGUF file, without weights."""
    config, _ = read_config(file)
    model = empty_model(config, dtype=config.dtype)
    model.config.architectures = [type(model).__name__]
    return model


@contextmanager
def rest_of_gguf(
    file: GgufFile, model: PreTrainedModel, weights: Mapping[str, RestWeight], beside: Path
) -> Iterator[Path]:
    """A folder with `weights` of a GGUF file, by parameter, as Transformers has them, and all that is no weight; gone
    afterwards."""
    names = {dtype: name for name, (_, dtype) in DTYPES.items() if name in PLAIN_DTYPES}
    tensors = [
        Made(parameter, names[weight.dtype(model.dtype)], weight.shape, partial(weight.pieces, model.dtype))
        for parameter, weight in weights.items()
    ]
    parent = beside.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    check_room(parent, sum(tensor.nbytes for tensor in tensors))
    with tempfile.TemporaryDirectory(prefix=f".{beside.name}-", dir=parent) as rest:
        model.config.save_pretrained(rest)
        save_tokenizer(file, rest)
        write_shard(None, tensors, Path(rest, "model.safetensors"))
        yield Path(rest)


def _dense_of_folder(folder: Path, dense: str | None, skip: Sequence[str] | str) -> Dense | None:
    """How the linear layers of a checkpoint's folder are packed; None: not at all. Of models that Transformers does not
    know, layers do not keep their codes: which are linear it would have to say."""
    if dense is None or (dense == OWN and not says_quantised(folder)):
        if skip:
            raise ArgumentError(NO_FORMAT)
        return None
    try:
        model = model_of(folder)
    except UnsupportedModelError:
        if dense == OWN and not skip:
            return None
        raise
    return dense_of(model, dense, skip)


def model_of(folder: Path) -> PreTrainedModel:
    """The model of a checkpoint's folder, without weights."""
    file = folder / "config.json"
    return empty_model(make_config(read_json(file), str(file)))


def dense_of(model: PreTrainedModel, dense: str, skip: Sequence[str] | str) -> Dense:
    """How a conversion packs the linear layers of a model. Raises ArgumentError for what does not fit the model."""
    spec, patterns = None if dense == OWN else resolve(dense), check_skip(skip)
    names = chosen_linears(model, spec, patterns)
    return Dense(spec, tuple(patterns), partial(linear_tensors, model, names, spec is None))


def linear_tensors(
    model: PreTrainedModel, names: Sequence[str], single: bool, tensors: Collection[str]
) -> dict[str, str]:
    """The linear layers `names` of a model in a checkpoint: {name when packed: the tensor that has the weight}. single:
    of those that are one tensor there, and no others.

    Raises ArgumentError for a weight that is made of several tensors, CheckpointError for one that is not there.
    """
    known = model.state_dict().keys()
    plain, made = dict[str, str](), dict[str, str]()
    for tensor, parameter, converter, _ in parameters_in(model, get_model_conversion_mapping(model), tensors, known):
        (plain if converter is None else made)[parameter] = tensor
    found = {}
    for name in names:
        weight = f"{name}.weight"
        shared = plain.get(model.all_tied_weights_keys.get(weight, ""))
        if weight in plain:
            found[plain[weight]] = plain[weight]
        elif shared is not None:
            found[stored_name(model, weight)] = shared
        elif single:
            continue
        elif weight in made:
            raise ArgumentError(
                f"{weight} is made of several tensors ({made[weight]}), which a conversion does not join: leave it out "
                "by dense_skip, or save_pretrained() a model that was loaded with dense=..."
            )
        else:
            raise CheckpointError(f"the checkpoint has no tensor for {weight}")
    return found
