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
from coterie.gpu.resident import PIECE_NBYTES, PIECE_SHARE
from coterie.gpu.room import Room, token_nbytes
from coterie.hf.room import device_nbytes
from coterie.hf.sizes import expert_nbytes, expert_parameters
from coterie.plan.anatomy import PROMPT, Anatomy
from coterie.plan.estimate import RESERVE, Rates

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

    vram: needed, what is kept for computing included. vram_short, ram_short: missing; 0 where it fits.
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
    room = find_room(anatomy, formats, vram)
    counts = [count for count, _ in room.layers]
    on_gpu, packed = [size for _, size in room.layers], _packed(anatomy, formats)

    def placed(gpu_experts: str | int, there: Sequence[int], buffers: int = 0) -> Placement:
        needed = room.besides + buffers + sum(n * size for n, size in zip(there, on_gpu, strict=True))
        held = RESERVE + sum((count - n) * size for count, n, size in zip(counts, there, packed, strict=True))
        parts = [n / count for n, count in zip(there, counts, strict=True)]
        decode, prefill = _speeds(anatomy, formats, parts, gpu_experts == "stream", rates, gpu)
        return Placement(
            gpu_experts, formats.name, needed, max(0, needed - vram), held, max(0, held - ram), decode, prefill
        )

    if room.besides + room.experts(max(counts)) <= vram:
        return [placed("all", counts)]
    streamed = placed("stream", [0] * len(counts), 3 * STAGED_NBYTES)
    number = min(room.most, *counts)
    return [streamed, placed(number, [number] * len(counts))] if number else [streamed]


def find_room(anatomy: Anatomy, formats: ModelFormats, vram: int) -> Room:
    """A GPU with `vram` usable bytes and what the model takes there, counted as `gpu_experts="auto"` does."""
    layouts = [layer.layout for layer in anatomy.experts]
    return Room(
        free=vram,
        rest=anatomy.rest_nbytes,
        cache=anatomy.cache_nbytes,
        tokens=anatomy.context,
        token=max(token_nbytes(x.per_token, x.layout.hidden_size, x.layout.intermediate_size) for x in anatomy.experts),
        piece=max(PIECE_NBYTES, int(vram * PIECE_SHARE)),
        layers=tuple(
            (layout.num_experts, device_nbytes(layout, formats[layer.number]))
            for layout, layer in zip(layouts, anatomy.experts, strict=True)
        ),
    )


def _packed(anatomy: Anatomy, formats: ModelFormats) -> list[int]:
    """Bytes of an expert of each layer in RAM."""
    return [expert_nbytes(layer.layout, formats[layer.number]) for layer in anatomy.experts]


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
