"""Where plan puts experts with a GPU, and how fast it says that is."""

from __future__ import annotations

import pytest

from coterie import formats, plan, tiny
from coterie.checkpoints.packed_formats import ModelFormats
from coterie.gpu.delivery import STAGED_NBYTES

SPEC = ModelFormats(formats.resolve("int4"))
RATES = plan.Rates(bandwidth=1e9, bf16=2e9, int8=4e9, layer=1e-4, forward=2e-4, reached=0.5)
GPU = plan.GpuRates(memory=50e9, delivered=2e9, products=1e12)
PLENTY = 10**12


@pytest.fixture(scope="module")
def anatomy():
    return plan.inspect(plan.open_source(str(tiny.PATH)).config)


@pytest.fixture
def fixed(anatomy):
    """VRAM that everything but experts takes, that of one expert of each layer, and its bytes in RAM."""
    room = plan.find_room(anatomy, SPEC, 2 << 30)
    return room.besides, room.experts(1), anatomy.experts_nbytes(SPEC) // 16


def test_room_is_that_of_auto(anatomy):
    """The parts that `gpu_experts="auto"` counts, by the same formula."""
    room = plan.find_room(anatomy, SPEC, 96 << 30)
    assert (room.rest, room.cache, room.tokens) == (anatomy.rest_nbytes, anatomy.cache_nbytes, anatomy.context)
    assert room.piece == 2 << 30 and room.layers[0][0] == 16


def test_all_of_them(anatomy, fixed):
    rest, expert, _ = fixed
    (found,) = plan.placements(anatomy, SPEC, rest + 16 * expert, PLENTY, RATES, GPU)
    assert (found.gpu_experts, found.format, found.vram, found.vram_short) == ("all", "int4", rest + 16 * expert, 0)
    assert (found.ram, found.ram_short) == (plan.RESERVE, 0) and found.fits


def test_as_many_as_fit(anatomy, fixed):
    rest, expert, packed = fixed
    streamed, some = plan.placements(anatomy, SPEC, rest + 4 * expert - 1, PLENTY, RATES, GPU)
    assert (some.gpu_experts, some.vram, some.vram_short) == (3, rest + 3 * expert, 0)
    assert some.ram == plan.RESERVE + 13 * packed
    assert (streamed.gpu_experts, streamed.vram) == ("stream", rest + 3 * STAGED_NBYTES)
    assert streamed.ram == plan.RESERVE + 16 * packed
    assert streamed.vram_short == max(0, 3 * STAGED_NBYTES - 4 * expert + 1)


def test_what_is_missing(anatomy, fixed):
    rest, _, packed = fixed
    (found,) = plan.placements(anatomy, SPEC, rest - 5, plan.RESERVE + 16 * packed - 7, RATES, GPU)
    assert (found.gpu_experts, found.vram_short, found.ram_short) == ("stream", 3 * STAGED_NBYTES + 5, 7)
    assert not found.fits and plan.choose([found]) is None


def test_what_is_predicted(anatomy, fixed):
    """The tiny model: 4 of 16 experts a token, int8 activations on the CPU."""
    rest, expert, in_ram_each = fixed
    (whole,) = plan.placements(anatomy, SPEC, PLENTY, PLENTY, RATES, GPU)
    streamed, some = plan.placements(anatomy, SPEC, rest + 4 * expert, PLENTY, RATES, GPU)
    besides = 4 * 1e-4 + 2e-4
    read, active = anatomy.experts_read_nbytes(SPEC), 2 * anatomy.active_expert_parameters
    one = besides + (anatomy.rest_read_nbytes + anatomy.cache_nbytes) / 50e9
    assert whole.decode == pytest.approx(1 / (one + read / 50e9 + active / 1e12))
    in_ram = max(read / 1e9, active / 4e9) / 0.5
    assert streamed.decode == pytest.approx(1 / (one + min(in_ram, read / 2e9 + active / 1e12)))
    assert some.decode == pytest.approx(1 / (one + 0.75 * in_ram))

    packed, products = 16 * in_ram_each, plan.PROMPT * active  # of so many tokens every expert has some
    rest_products = 2 * plan.PROMPT * (anatomy.active_rest_parameters - anatomy.head_parameters)
    prompt = besides + (rest_products + anatomy.prompt_operations) / 1e12
    assert whole.prefill == pytest.approx(plan.PROMPT / (prompt + packed / 50e9 + products / 1e12))
    in_ram = max(packed / 1e9, products / 4e9) / 0.5
    sent = packed / 2e9 + products / 1e12
    assert sent < in_ram and streamed.prefill == pytest.approx(plan.PROMPT / (prompt + sent))
    assert some.prefill == pytest.approx(plan.PROMPT / (prompt + 0.75 * in_ram))


def test_the_faster_one_is_named():
    def made(gpu_experts, decode, prefill, ram_short=0):
        return plan.Placement(gpu_experts, "int4", 1, 0, 1, ram_short, decode, prefill)

    streamed, some = made("stream", 10, 1000), made(3, 12, 100)  # 26.1 s and 26.5 s
    assert plan.choose([some, streamed]) is streamed and plan.choose([]) is None
    assert plan.choose([some, made("stream", 10, 1000, ram_short=1)]) is some
    assert streamed.seconds == pytest.approx(plan.PROMPT / 1000 + plan.ANSWER / 10)
