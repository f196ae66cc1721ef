"""Whether a model fits in memory, and how fast it will be, predicted."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.errors import ArgumentError
from coterie.formats import Format, Formats
from coterie.hf.sizes import expert_parameters
from coterie.plan.anatomy import PROMPT, Anatomy
from coterie.plan.dense import Dense

RESERVE = 10**9  # bytes of RAM for Python, torch and the activations of a short prompt
MARGIN = 0.05  # of the available memory is left alone: what others take meanwhile, and pages that cannot be had
# Of the speed that rates measured one by one add up to, what a whole model reached: caches are cold, norms and routing
# are not counted, threads wait for each other. Qwen3-30B-A3B in int4 on two cores of Zen 4, `benchmarks/full_size.py`
# beside rates of the same machine at another time.
REACHED = 0.75


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine does in a second: bytes read from RAM, and operations (two a multiply-add).

    row: bytes of bf16 layers that torch multiplies with one row; None: at `bandwidth`. attention: operations of a
    prompt's attention. layer, forward: seconds that each layer, and each forward besides, take whatever their size.
    reached: the part of all this that whole models reach.
    """

    bandwidth: float
    bf16: float
    int8: float
    row: float | None = None
    attention: float = math.inf
    layer: float = 0.0
    forward: float = 0.0
    reached: float = 1.0

    def of(self, spec: Format | Formats) -> float:
        """The rate of the dot products that weights of a format are multiplied with."""
        return self.int8 if spec.int8_activations else self.bf16


@dataclass(frozen=True, slots=True)
class Estimate:
    """One way to hold a model, in bytes; the speeds are predictions, in tokens per second.

    problem: why the experts cannot be packed so; None where they can.
    decode: one sequence, every byte that a token needs read once, and what layers take besides.
    prefill: a prompt of PROMPT tokens, its products, its attention, and what layers take besides.
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


def estimate(
    anatomy: Anatomy, formats: ModelFormats, ram: int, rates: Rates, dense: Dense | None = None
) -> Estimate:
    """The model with its experts in these formats and everything else in bf16, but for linear layers that are packed as
    `dense` says, in `ram` usable bytes."""
    experts = anatomy.experts_nbytes(formats)
    needed = experts + anatomy.rest_nbytes + anatomy.cache_nbytes + RESERVE
    packed, plain = anatomy.experts_read_nbytes(formats) + anatomy.cache_nbytes, anatomy.rest_read_nbytes
    rest = anatomy.active_rest_parameters - anatomy.head_parameters
    products = sum(
        layer.per_token * expert_parameters(layer.layout) / rates.of(formats[layer.number]) for layer in anatomy.experts
    )
    if dense is not None:
        needed -= dense.saved
        packed += dense.read
        plain -= dense.read + dense.read_saved
        rest -= dense.prompt_parameters
        products += sum(count / rates.of(spec) for spec, count in dense.prompt.items())
    besides = anatomy.layers * rates.layer + rates.forward
    seconds = 2 * PROMPT * (products + rest / rates.bf16) + anatomy.prompt_operations / rates.attention + besides
    reading = (packed / rates.bandwidth + besides) / rates.reached + plain / (rates.row or rates.bandwidth)
    return Estimate(
        format=formats.name,
        experts=experts,
        ram=needed,
        ram_short=max(0, needed - ram),
        decode=1 / (reading + anatomy.latent_operations / rates.attention),
        prefill=rates.reached * PROMPT / seconds,
        problem=_problem(anatomy, formats),
    )


def _problem(anatomy: Anatomy, formats: ModelFormats) -> str | None:
    try:
        for layer in anatomy.experts:
            formats[layer.number].check_columns(layer.layout.hidden_size, layer.layout.intermediate_size)
    except ArgumentError as error:
        return str(error)
    return None
