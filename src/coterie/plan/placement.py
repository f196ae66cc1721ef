"""A model with a GPU: what lies there, what stays in RAM, and how fast it will be, predicted.

Attention, routers and all else that is no expert are on the GPU; of the experts all, as many of each layer as fit, or
none, those in RAM being sent there for prompts ("stream").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coterie.checkpoints.packed_formats import ModelFormats
from coterie.gpu import rates as gpu_rates
from coterie.gpu.delivery import STAGED_NBYTES
from coterie.gpu.resident import PIECE_NBYTES
from coterie.hf.sizes import expert_nbytes, expert_parameters
from coterie.plan.anatomy import PROMPT, Anatomy
from coterie.plan.estimate import RESERVE, Rates

GPU_RESERVE = 1_500_000_000  # bytes of VRAM for CUDA, its libraries and the activations of a short prompt
ANSWER = 256  # tokens that are decoded after a prompt, by which placements are compared


@dataclass(frozen=True, slots=True)
class GpuRates:
    """What a GPU does in a second: bytes read from its memory; the others as `coterie.gpu.rates.Rates` says."""

    memory: float
    delivered: float
    products: float


# Of a GPU that is only named by --vram: a card of 2020's upper class on PCIe 4.0. Assumed, not measured.
ASSUMED = GpuRates(memory=600e9, delivered=10e9, products=40e12)


@dataclass(frozen=True, slots=True)
class Placement:
    """Experts in a format, placed as `gpu_experts` says; bytes, and predicted tokens per second.

    vram: needed, GPU_RESERVE included. vram_short, ram_short: missing; 0 where it fits.
    """

    gpu_experts: str | int
    format: str
    vram: int
    vram_short: int
    ram: int
    ram_short: int
    decode: float
    prefill: float

    @property
    def fits(self) -> bool:
        return not (self.vram_short or self.ram_short)

    @property
    def seconds(self) -> float:
        """Of a prompt of PROMPT tokens and an answer of ANSWER."""
        return PROMPT / self.prefill + ANSWER / self.decode


def placements(
    anatomy: Anatomy, formats: ModelFormats, vram: int, ram: int, rates: Rates, gpu: GpuRates
) -> list[Placement]:
    """The ways to place the experts in these formats, in `vram` and `ram` usable bytes: "all", where they fit; else as
    many of each layer's as do, if any do, and "stream"."""
    packed = [expert_nbytes(layer.layout, formats[layer.number]) for layer in anatomy.experts]
    fixed = anatomy.rest_nbytes + anatomy.cache_nbytes + GPU_RESERVE
    free = vram - fixed - PIECE_NBYTES
    counts = [layer.layout.num_experts for layer in anatomy.experts]
    number = max(0, min(min(counts), free // sum(packed)))

    def placed(gpu_experts: str | int, there: Sequence[int], buffers: int) -> Placement:
        experts_there = sum(n * nbytes for n, nbytes in zip(there, packed, strict=True))
        needed, held = fixed + buffers + experts_there, anatomy.experts_nbytes(formats) - experts_there + RESERVE
        parts = [n / count for n, count in zip(there, counts, strict=True)]
        decode, prefill = _speeds(anatomy, formats, parts, gpu_experts == "stream", rates, gpu)
        return Placement(
            gpu_experts, formats.name, needed, max(0, needed - vram), held, max(0, held - ram), decode, prefill
        )

    if anatomy.experts_nbytes(formats) <= free:
        return [placed("all", counts, PIECE_NBYTES)]
    streamed = placed("stream", [0] * len(counts), PIECE_NBYTES + 3 * STAGED_NBYTES)
    return [streamed, placed(number, [number] * len(counts), PIECE_NBYTES)] if number else [streamed]


def choose(found: Sequence[Placement]) -> Placement | None:
    """Of those that fit the one that is through with a prompt and an answer first; None where none fits."""
    return min((one for one in found if one.fits), key=lambda one: one.seconds, default=None)


def _speeds(
    anatomy: Anatomy, formats: ModelFormats, parts: Sequence[float], streamed: bool, rates: Rates, gpu: GpuRates
) -> tuple[float, float]:
    """Tokens per second of decoding and of a prompt, with these parts of each layer's experts on the GPU.

    A layer lasts as long as its experts in RAM or those on the GPU, which compute at the same time, or as it takes to
    send those in RAM where that is less; all else on the GPU comes on top, and what layers take whatever their size.
    """
    compared = gpu_rates.Rates(rates.bandwidth, rates.bf16, rates.int8, gpu.delivered, gpu.products)

    def experts(tokens: int) -> float:
        seconds = 0.0
        for layer, part in zip(anatomy.experts, parts, strict=True):
            integer = formats[layer.number].int8_activations
            used = gpu_rates.expected_experts(layer.layout.num_experts, layer.per_token, tokens)
            nbytes = used * expert_nbytes(layer.layout, formats[layer.number])
            operations = 2 * tokens * layer.per_token * expert_parameters(layer.layout)
            in_ram = compared.in_ram((1 - part) * nbytes, (1 - part) * operations, integer) / rates.reached
            if streamed:
                in_ram = min(in_ram, compared.streamed(nbytes, operations))
            seconds += max(in_ram, part * (nbytes / gpu.memory + operations / gpu.products))
        return seconds

    besides = anatomy.layers * rates.layer + rates.forward
    one = experts(1) + (anatomy.rest_read_nbytes + anatomy.cache_nbytes) / gpu.memory + besides
    rest = 2 * PROMPT * (anatomy.active_rest_parameters - anatomy.head_parameters)
    prompt = experts(PROMPT) + (rest + anatomy.prompt_operations) / gpu.products + besides
    return 1 / one, PROMPT / prompt
