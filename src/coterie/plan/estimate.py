"""Whether a model fits in memory, and the most that its speed can be."""

from __future__ import annotations

from dataclasses import dataclass

from coterie.errors import ArgumentError
from coterie.formats import Format
from coterie.plan.anatomy import Anatomy
from coterie.plan.dense import Dense

RESERVE = 10**9  # bytes of RAM for Python, torch and the activations of a short prompt
MARGIN = 0.05  # of the available memory is left alone: what others take meanwhile, and pages that cannot be had


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second: bytes read from RAM, and operations (two a multiply-add)."""

    bandwidth: float
    bf16: float
    int8: float

    def experts(self, spec: Format) -> float:
        """The rate of the dot products that experts of a format are computed with."""
        return self.bf16 if spec.name == "bf16" else self.int8


@dataclass(frozen=True, slots=True)
class Estimate:
    """One way to hold a model, in bytes; the speeds are bounds, in tokens per second.

    problem: why the experts cannot be packed so; None where they can.
    decode: one sequence, every byte that a token needs read once at full bandwidth.
    prefill: every product of the weights at full speed, and nothing else (attention, routing, norms) counted.
    """

    format: str
    experts: int
    ram: int  # needed, RESERVE included
    ram_short: int  # missing; 0 when it fits
    decode: float
    prefill: float
    problem: str | None = None


def usable(ram: int) -> int:
    """What of `ram` available bytes to plan with: a margin is left alone."""
    return int(ram * (1 - MARGIN))


def estimate(anatomy: Anatomy, spec: Format, ram: int, rates: Rates, dense: Dense | None = None) -> Estimate:
    """The model with its experts in format `spec` and everything else in bf16, but for linear layers that are packed as
    `dense` says, in `ram` usable bytes."""
    experts = anatomy.experts_nbytes(spec)
    needed = experts + anatomy.rest_nbytes + anatomy.cache_nbytes + RESERVE
    read = anatomy.experts_read_nbytes(spec) + anatomy.rest_read_nbytes + anatomy.cache_nbytes
    rest = anatomy.active_rest_parameters - anatomy.head_parameters
    products = anatomy.active_expert_parameters / rates.experts(spec)
    if dense is not None:
        needed -= dense.saved
        read -= dense.read_saved
        rest -= dense.prompt_parameters
        products += dense.prompt_parameters / rates.experts(dense.spec)
    seconds = 2 * (products + rest / rates.bf16)
    return Estimate(
        format=spec.name,
        experts=experts,
        ram=needed,
        ram_short=max(0, needed - ram),
        decode=rates.bandwidth / read,
        prefill=1 / seconds,
        problem=_problem(anatomy, spec),
    )


def _problem(anatomy: Anatomy, spec: Format) -> str | None:
    try:
        for layer in anatomy.experts:
            spec.check_columns("gate and up", layer.layout.hidden_size)
            spec.check_columns("down", layer.layout.intermediate_size)
    except ArgumentError as error:
        return str(error)
    return None
