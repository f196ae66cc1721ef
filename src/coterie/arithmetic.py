"""What packed weights are multiplied with: activations as bf16, or rounded to int8."""

from __future__ import annotations

from .errors import ArgumentError
from .formats import ENCODINGS, Format, Formats

ACTIVATIONS = ("auto", "bf16", "int8")


class Arithmetic:
    """Mixed into packed weights.

    Attributes:
        allows_int8: whether their formats do.
        activations: what they compute with: "int8", "bf16", or "auto": int8, where the format allows it, until they are
            adapted.
        adapted: whether they have an adapter or have been trained through.
    """

    allows_int8: bool
    activations = "auto"
    adapted = False

    def uses_int8(self) -> bool:
        """Whether a forward without adapter and gradients rounds activations to int8."""
        if not self.allows_int8 or self.activations == "bf16":
            return False
        return self.activations == "int8" or not self.adapted

    @property
    def as_trained(self) -> bool:
        """Whether it computes as in training: asked for bf16, or adapted."""
        return self.activations == "bf16" or (self.adapted and self.activations == "auto")

    def adapt(self) -> None:
        """From now on "auto" means bf16: a model in training must compute the same with its adapter and without.

        Raises ArgumentError where the activations are to be int8.
        """
        if self.activations == "int8":
            raise ArgumentError(
                'int8 activations are for inference: weights that are adapted or trained through need '
                'activations="auto" or "bf16"'
            )
        self.adapted = True


def check_activations(activations: str, spec: Format | Formats) -> None:
    """Raises ArgumentError for activations that do not exist, or int8 with bf16 weights."""
    if activations not in ACTIVATIONS:
        raise ArgumentError(f"activations: expected one of {', '.join(ACTIVATIONS)}, found {activations!r}")
    if activations == "int8" and not spec.int8_activations:
        able = ", ".join(name for name, encoding in ENCODINGS.items() if encoding.int8_activations)
        raise ArgumentError(
            f'activations="int8" needs weights of {able}; those of {spec.name} are computed with bf16'
        )
