"""What is to be planned: a folder, a GGUF file, a config file or a hub id; whether this version opens it, and what to
do if not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError

from coterie.checkpoints import LayerReader, Reader, open_reader
from coterie.checkpoints.folder import Folder, read_json
from coterie.checkpoints.gguf import GgufReader
from coterie.checkpoints.gguf_file import GgufFile, find_gguf
from coterie.checkpoints.packed import UNFINISHED
from coterie.checkpoints.packed_formats import NONE, OWN, ModelFormats
from coterie.checkpoints.packed_linears import LINEARS_FILE
from coterie.checkpoints.quantised import METHODS, Quantised, quantisation_of, read_quantised, unread
from coterie.checkpoints.tensorfile import PLAIN_DTYPES
from coterie.convert.cpu import formats_for
from coterie.errors import ArgumentError, CheckpointError
from coterie.formats import FORMATS, Format, resolve
from coterie.hf.config import METHOD, CoterieConfig
from coterie.hf.empty import empty_model
from coterie.hf.gguf.config import read_config
from coterie.hf.gguf.weights import kept_tensors, rest_weights
from coterie.hf.linears import linear_formats, stored_linears
from coterie.hf.modules import read_layouts
from coterie.hf.quantised import open_quantised
from coterie.hf.skeleton import make_config

OPENS = (
    f"this version opens bf16, fp16, f32, what is quantised by {', '.join(METHODS)}, GGUF, and its own packed folders"
)


@dataclass(frozen=True, slots=True)
class Source:
    """A model to plan for.

    problem: why this version does not open it and what to do, None where it opens it.
    packed: the formats of its experts where coterie packed them; dense, dense_skip: that of its linear layers, or of
    each by name, and which of them are not. quantised: what somebody else made of its weights.
    stored: {dtype: bytes} of its files, {} where there are none.
    linears: finds the formats of its linear layers that are quantised, by name, where weights are here.
    experts: of quantised weights that are here, by layer; own: the formats that hold them as they are; choice: why one
    format has to be named instead. odd: the types of those that its own formats do not hold as they are, in words.
    """

    config: Any
    problem: str | None = None
    packed: ModelFormats | None = None
    dense: Format | dict[str, Format] | None = None
    dense_skip: tuple[str, ...] = ()
    quantised: Quantised | None = None
    stored: dict[str, int] = field(default_factory=dict)
    linears: Callable[[], dict[str, Format]] | None = None
    experts: dict[int, LayerReader] = field(default_factory=dict)
    own: ModelFormats | None = None
    choice: str | None = None
    odd: str = ""

    def formats(self, name: str | None = None) -> list[ModelFormats]:
        """The formats to compare: those that it is packed in, or its own and all that it can be packed into, or the one
        named."""
        if self.packed is None:
            own = [self.own] if self.own and name in (None, self.own.name) else []
            named = [name] if name else FORMATS
            return own + [ModelFormats(resolve(n)) for n in named if not own or n != own[0].name]
        if name not in (None, self.packed.name):
            raise ArgumentError(
                f"it is packed as {self.packed.name}, and packed experts do not become {name}: plan the original"
            )
        return [self.packed]

    @property
    def dense_name(self) -> str:
        """Of what linear layers are packed in."""
        return self.dense.name if isinstance(self.dense, Format) else OWN

    def dense_format(self, name: str | None = None) -> Format | dict[str, Format] | None:
        """The format of linear layers to plan for, or that of each: what they are packed in, or the one named; without
        a name those that are quantised keep theirs. "none": none is packed."""
        if self.dense is None and name not in (None, OWN):
            return None if name == NONE else resolve(name)
        if self.dense is None:
            return self._own_linears(asked=name is not None) or None
        if name not in (None, self.dense_name):
            raise ArgumentError(
                f"its linear layers are packed as {self.dense_name}, and do not become {name}: plan the original"
            )
        return self.dense

    def _own_linears(self, asked: bool) -> dict[str, Format]:
        if self.linears is None and self.quantised is not None and asked:
            raise ArgumentError("which linear layers are quantised, and how, is in its files: plan its folder")
        return self.linears() if self.linears else {}


def open_source(model: str) -> Source:
    """What is at `model`: a model folder, a GGUF file or the folder of one, a config.json, or a model on the Hugging
    Face hub.

    Raises CheckpointError for a config that cannot be had or read, UnsupportedModelError for an unknown model.
    """
    path, where = Path(model), str(model)
    gguf = find_gguf(path)
    if gguf is not None:
        return _open_gguf(GgufFile(gguf))
    if path.is_dir():
        file = path / "config.json"
        if not file.is_file():
            raise CheckpointError(f"{path} has no config.json: {_instead_of_a_model(path)}")
    elif path.exists():
        file = path
    else:
        file = _download(where)
    values = read_json(file)
    config = make_config(values, str(file))
    quantised, ours = read_quantised(values), None
    if quantised and quantised.method == METHOD:
        quantised, ours = None, CoterieConfig(**values["quantization_config"])
    stored, problem, experts = {}, _quantised_problem(quantised, quantisation_of(values)), {}
    if path.is_dir():
        try:
            stored = stored_nbytes(path)
            problem = problem or _folder_problem(path, stored, plain=quantised is None and ours is None)
            if quantised and stored and not problem:
                experts = _experts(open_reader(path))
        except CheckpointError as error:
            problem = problem or f"the checkpoint is not whole: {error}"
    linears = partial(_quantised_linears, path, config) if experts else None
    found = Source(config, problem, quantised=quantised, stored=stored, linears=linears)
    if ours is None:
        return _with_experts(found, experts)
    dense: Format | dict[str, Format] | None = None if ours.dense in (None, OWN) else resolve(ours.dense)
    if ours.dense == OWN:
        try:
            dense = _linear_formats(path, config)
        except CheckpointError as error:
            found = replace(found, problem=problem or f"the checkpoint is not whole: {error}")
    return replace(found, packed=ours.packing, dense=dense, dense_skip=tuple(ours.dense_skip))


def _linear_formats(folder: Path, config: Any) -> dict[str, Format]:
    """The format of each linear layer that is packed in a folder. Raises CheckpointError where the files are broken, or
    not here: config.json does not say."""
    files = [shard for shard in folder.glob("linears-*.safetensors") if LINEARS_FILE.fullmatch(shard.name)]
    if not files:
        raise CheckpointError("which linear layers are packed, and how, is in its files: plan its folder")
    return {name: file.layout.spec for name, (_, file) in stored_linears(empty_model(config), files, OWN).items()}


def _quantised_linears(folder: Path, config: Any) -> dict[str, Format]:
    model = empty_model(config)
    found = open_quantised(folder, read_layouts(model))
    return linear_formats(model, found.formats_of(model)) if found else {}


def _gguf_linears(reader: GgufReader, config: Any) -> dict[str, Format]:
    model = empty_model(config)
    reader.parameters = kept_tensors(rest_weights(reader.file, model))
    return linear_formats(model, reader.format_of)


def _open_gguf(file: GgufFile) -> Source:
    reader = GgufReader(file)
    experts = _experts(reader)
    config, _ = read_config(file)
    linears = partial(_gguf_linears, reader, config)
    stored = Counter[str]()
    for name in file.names:
        stored[file.type(name)] += file.nbytes(name)
    plain = all(layer.kinds == (None,) for layer in experts.values())
    if plain:
        return Source(config, stored=dict(stored), linears=linears)
    odd = ", ".join(dict.fromkeys(layer.odd for layer in experts.values() if layer.odd))
    found = Source(
        config,
        quantised=Quantised("gguf", "GGUF", None),
        stored=dict(stored),
        linears=linears,
        odd=odd,
    )
    return _with_experts(found, experts)


def _experts(reader: Reader) -> dict[int, LayerReader]:
    return {layer: reader.layer(layer) for layer in reader.layers}


def _with_experts(source: Source, experts: dict[int, LayerReader]) -> Source:
    if not experts:
        return source
    try:
        return replace(source, experts=experts, own=formats_for(experts))
    except ArgumentError as error:
        return replace(source, choice=str(error))


def stored_nbytes(folder: Path) -> dict[str, int]:
    """{dtype: bytes} of the checkpoint in `folder`, from its safetensors headers; {} where it has none."""
    if not any(folder.glob("*.safetensors")):
        return {}
    checkpoint, total = Folder(folder), Counter[str]()
    for shard in checkpoint.shards:
        for entry in checkpoint.file(shard).entries.values():
            total[entry.dtype] += entry.nbytes
    return dict(total)


def _download(model: str) -> Path:
    """config.json of a hub id. A path that does not exist is told from one by its form."""
    if model.startswith((".", "/", "~")) or model.count("/") > 1 or model.endswith((".json", ".gguf", "/")):
        raise CheckpointError(
            f"{model} does not exist: expected a model folder, a GGUF file, a config.json or a hub id"
        )
    try:
        return Path(hf_hub_download(model, "config.json"))
    except (OSError, ValueError, HfHubHTTPError) as error:  # no such model, no access, no network, no such file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is no folder here, and its config.json could not be had from the hub: {reason}"
        ) from error


def _instead_of_a_model(folder: Path) -> str:
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = read_json(adapter).get("base_model_name_or_path") or "its base model"
        return f"it is an adapter, plan {base}"
    return "expected a model folder"


def _quantised_problem(quantised: Quantised | None, options: Any) -> str | None:
    problem = unread(quantised.method, options) if quantised is not None else None
    return f"it is quantised by {problem}; use the original, or a copy written in bf16" if problem else None


def _folder_problem(folder: Path, stored: dict[str, int], plain: bool) -> str | None:
    if (folder / UNFINISHED).exists():
        return f"a conversion that was not finished ({UNFINISHED} is there): finish it with --resume"
    if not stored:
        others = sorted(f.name for p in ("*.bin", "*.pt", "*.pth") for f in folder.glob(p))
        return f"no safetensors files, only {others[0]}: save it as safetensors first" if others else None
    odd = sorted(dtype for dtype in stored if dtype[0] == "F" and dtype not in PLAIN_DTYPES)
    if plain and odd:
        return f"it holds {', '.join(odd)} tensors: {OPENS}; use the original, or a copy written in bf16"
    return None
