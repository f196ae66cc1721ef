"""Packed linear layers in checkpoints: under which names, opened for a model, and written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from coterie.checkpoints.codes import Codes
from coterie.checkpoints.packed_formats import OWN
from coterie.checkpoints.packed_linears import LINEARS_FILE, LinearsFile, open_linears, write_linears
from coterie.checkpoints.tensorfile import shown
from coterie.errors import CheckpointError
from coterie.formats import Format, resolve
from coterie.hf.dense import attach, chosen_linears, pack_linears, packed_linears
from coterie.hf.modules import hide_parameters, remove_hooks
from coterie.hf.names import parameters_in, stored_name
from coterie.linear import Linear

FormatOf = Callable[[str, Format | None], Format | None]  # of a parameter's codes, if they are in that one, or in any


class ModelLinears:
    """The linear layers of a model that are packed when it is loaded, or were packed before.

    packed: those that a checkpoint has packed, by module name: the name of the weight there, and its file. left: those
    to be packed once the model has its weights. kept: of these, the formats of those that need none, since they are
    packed of codes. Neither packed nor left: they stay as they are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dense: str | None,
        skip: Sequence[str],
        files: Sequence[Path],
        format_of: FormatOf | None = None,
    ):
        """`dense` and `skip`: see CoterieConfig; `files` are those of the checkpoint, `format_of` of a quantised one.
        Raises ArgumentError where they do not fit the model, CheckpointError for packed layers that are broken or
        another model's."""
        self._spec = None if dense in (None, OWN) else resolve(dense)
        self.packed = stored_linears(model, [file for file in files if LINEARS_FILE.fullmatch(file.name)], dense)
        self.left = chosen_linears(model, self._spec, skip) if dense is not None and not self.packed else []
        self.kept = kept_linears(model, format_of, dense, skip) if format_of is not None else {}
        self._model = model

    def hide(self) -> None:
        """Keeps the packed weights out of the state dict, so that Transformers does not look for them."""
        tied = self._model.all_tied_weights_keys  # Transformers gives a tied head the embedding until it is packed
        for name in (*self.packed, *self.kept):
            if f"{name}.weight" not in tied:
                module = self._model.get_submodule(name)
                hide_parameters(module, {"weight"})
                module.weight._is_hf_initialized = True

    def load(self, mmap: bool, activations: str, codes: Callable[[str, Format | None], Codes | None]) -> None:
        """Opens the layers that are packed, packs those that are to be: see `pack_linears` for `codes`.

        activations: what they compute with, see `Experts`; those whose format has no int8 compute with bf16.
        """
        for name, (weight, file) in self.packed.items():
            module = self._model.get_submodule(name)
            attach(module, Linear.from_packed(file, weight, module.bias, mmap=mmap))
            remove_hooks(module)
        if self.left:
            pack_linears(self._model, self.left, self._spec, codes)
        for name in self.kept:
            remove_hooks(self._model.get_submodule(name))
        for _, linear in packed_linears(self._model):
            if activations != "int8" or linear.spec.int8_activations:
                linear.activations = activations

    def saved_nbytes(self, mmap: bool) -> int:
        """Bytes of RAM that packed layers take less than in the model's dtype; mapped ones take none."""
        tied, saved = self._model.all_tied_weights_keys, 0
        for name, (weight, file) in self.packed.items():
            saved -= 0 if mmap else file.layout.nbytes(weight)
            saved += 0 if f"{name}.weight" in tied else self._model.get_submodule(name).weight.nbytes
        for name, spec in self.kept.items():
            module = self._model.get_submodule(name)
            saved += module.weight.nbytes - spec.matrix_nbytes(module.out_features, module.in_features)
        return saved


def kept_linears(
    model: PreTrainedModel, format_of: FormatOf, dense: str | None, skip: Sequence[str]
) -> dict[str, Format]:
    """The linear layers of a model that `dense` packs with the codes which a checkpoint has, by module name. Not those
    that share a weight, whose numbers the others need. Raises ArgumentError as `chosen_linears` does."""
    if dense is None:
        return {}
    found = linear_formats(model, format_of, None if dense == OWN else resolve(dense), skip)
    tied = model.all_tied_weights_keys
    return {name: spec for name, spec in found.items() if f"{name}.weight" not in {*tied, *tied.values()}}


def linear_formats(
    model: PreTrainedModel,
    format_of: FormatOf,
    spec: Format | None = None,
    skip: Sequence[str] = (),
) -> dict[str, Format]:
    """The linear layers of a model that are quantised as `spec` already, or as any format, by module name. `format_of`
    says it of a parameter. Raises ArgumentError as `chosen_linears` does."""
    tied, found = model.all_tied_weights_keys, dict[str, Format]()
    for name in chosen_linears(model, spec, skip):
        weight = f"{name}.weight"
        if (own := format_of(tied.get(weight, weight), spec)) is not None:
            found[name] = own
    return found


def stored_linears(
    model: PreTrainedModel, files: Sequence[Path], dense: str | None
) -> dict[str, tuple[str, LinearsFile]]:
    """The packed linear layers in `files` that `model` has, by module name: the weight's name there, and its file.

    Raises CheckpointError where they are broken, not packed as `dense`, or not what the model has there.
    """
    stored, found = open_linears(files), dict[str, tuple[str, LinearsFile]]()
    for file in stored.values():
        if dense != OWN and file.layout.spec != (dense and resolve(dense)):
            raise CheckpointError(
                f"{file.file.path}: packed as {file.layout.spec.described}, config.json says "
                f"{resolve(dense).described if dense else 'that no linear layers are packed'}"
            )
    known = model.state_dict().keys()
    for weight, parameter, converter, _ in parameters_in(model, get_model_conversion_mapping(model), stored, known):
        if parameter not in known:
            continue  # of a head, or of a part of the model, that this class has not
        file, name = stored[weight], parameter.removesuffix(".weight")
        where = f"{file.file.path}, tensor {shown(weight)}"
        module = model.get_submodule(name) if converter is None and name != parameter else None
        expected = list(model.get_parameter(parameter).shape)
        if not hasattr(module, "in_features"):
            raise CheckpointError(f"{where}: {shown(parameter)} is no linear layer of this model")
        shape = list(file.layout.shapes[weight])
        if shape != expected:
            raise CheckpointError(f"{where}: packed from {shape}, expected {expected}")
        found[name] = weight, file
    return found


def save_linears(model: PreTrainedModel, folder: Path) -> None:
    """Writes the packed linear layers of a model, if it has any, into a folder."""
    linears = {stored_name(model, f"{name}.weight"): linear for name, linear in packed_linears(model)}
    if linears:
        specs = {name: linear.spec for name, linear in linears.items()}
        shapes = {name: (linear.out_features, linear.in_features) for name, linear in linears.items()}
        write_linears(lambda name: folder / name, specs, shapes, lambda name: linears[name].packed)
