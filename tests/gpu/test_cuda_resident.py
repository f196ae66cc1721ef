"""Experts on a real GPU: against the reference, what memory they take, and that nothing waits for them."""

from __future__ import annotations

import pytest
import torch
from engine_cases import FORMATS, dense, name_of, options
from gradient_cases import TOLERANCE, gradients, random_batch, random_lora, relative

from coterie import Experts, reference
from coterie.gpu import resident

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")

SIZES = (6, 128, 256)
SPEC = FORMATS[6]
PLACES = {"all": None, "some": (0, 2, 3)}


def moved(spec=SPEC, experts=None, sizes=SIZES):
    found = Experts.pack(*dense(sizes), **options(spec))
    found.activations = "bf16" if spec.encoding.int8_activations else "auto"
    truth = found.dequantize()
    found.move("cuda", experts)
    return found, truth


@pytest.fixture(params=["one piece", "pieces"])
def pieces(request, monkeypatch):
    if request.param == "pieces":
        monkeypatch.setattr(resident, "PIECE_NBYTES", 2 * 3 * 2 * SIZES[1] * SIZES[2])
        monkeypatch.setattr(resident, "PIECE_SHARE", 0)


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("spec", FORMATS, ids=name_of)
def test_formats(spec, where):
    experts, truth = moved(spec, PLACES[where])
    for found, expected in zip(experts.dequantize(), truth, strict=True):
        assert torch.equal(found, expected)
    x, ids, weights, _ = random_batch(SIZES, 2, 33)
    found = experts(x.cuda(), ids.cuda(), weights.cuda())
    assert found.is_cuda and found.dtype == torch.bfloat16
    assert relative(found.cpu(), reference.forward(x, ids, weights, *truth)) < TOLERANCE


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("there", [True, False], ids=["LoRA on the GPU", "LoRA in RAM"])
def test_gradients(there, rank, where, pieces):
    experts, truth = moved(experts=PLACES[where])
    x, ids, weights, grad = random_batch(SIZES, 2, 20)
    lora = random_lora(SIZES, rank, torch.float32)
    expected = gradients(
        lambda x, w, lora: reference.forward(x, ids, w, *truth, lora=lora), x, weights, lora, grad, torch.float32
    )
    lora = {name: factor.cuda() if there else factor for name, factor in lora.items()}
    ids = ids.cuda()
    for _ in range(2):
        found = gradients(
            lambda x, w, lora: experts(x, ids, w, lora), x.cuda(), weights.cuda(), lora, grad.cuda()
        )
        for name, value in found.items():
            assert value.device == lora.get(name, ids).device, name
            assert relative(value.cpu(), expected[name]) < TOLERANCE, name


@pytest.mark.parametrize("where", PLACES)
def test_empty_batches_and_one_hot_expert(where, pieces):
    experts, truth = moved(experts=PLACES[where])
    x, ids, weights, _ = random_batch(SIZES, 2, 33)
    for chosen in (torch.full_like(ids, 2), torch.full_like(ids, -1), ids.where(ids != 1, 5)):
        found = experts(x.cuda(), chosen.cuda(), weights.cuda()).cpu()
        assert relative(found, reference.forward(x, chosen, weights, *truth)) < TOLERANCE
    assert experts(x[:0].cuda(), ids[:0].cuda(), weights[:0].cuda()).shape == (0, 128)


def test_what_is_not_computed_does_not_matter(pieces):
    """Slots without an expert, for a token of infinities; memory that was NaN before."""
    experts, _ = moved()
    x, ids, weights, _ = (t.cuda() for t in random_batch(SIZES, 2, 9))
    ids[2], x[2] = -1, torch.inf
    x.requires_grad_()
    spoilt = torch.full((1 << 24,), torch.nan, device="cuda")
    del spoilt
    lora = {name: t.cuda() for name, t in random_lora(SIZES, 8, torch.float32).items()}
    ids = ids.where(ids != 3, 1)
    found = gradients(lambda x, w, lora: experts(x, ids, w, lora), x, weights, lora, torch.ones_like(x))
    assert all(value.isfinite().all() for value in found.values())
    assert not found["y"][2].any() and not found["x"][2].any() and not found["down_b"][3].any()


@pytest.mark.parametrize("spec", [FORMATS[0], SPEC], ids=name_of)
def test_memory_of_a_step(spec):
    """Packed weights, what the tokens need, and dense pieces of a bounded size; never all of the weights."""
    count, hidden, intermediate = sizes = 64, 512, 1024
    before = torch.cuda.memory_allocated()
    experts = Experts.empty(*sizes, format=spec)
    experts.move("cuda")
    held = torch.cuda.memory_allocated() - before
    assert held < 1.2 * experts.nbytes
    x, ids, weights, grad = (t.cuda() for t in random_batch(sizes, 2, 64))
    piece = 2 * 3 * 4 * hidden * intermediate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resident, "PIECE_NBYTES", piece)
        patch.setattr(resident, "PIECE_SHARE", 0)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        experts(x.requires_grad_(), ids, weights).backward(grad)
        assert torch.cuda.max_memory_allocated() - before < 3 * piece < 2 * 3 * count * hidden * intermediate / 4


def test_decoding_does_not_wait_and_can_be_a_cuda_graph():
    experts, truth = moved()
    x, ids, weights, _ = (t.cuda() for t in random_batch(SIZES, 2, 4))
    with torch.no_grad():
        expected = experts(x, ids, weights)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            assert experts(x, ids, weights).is_cuda
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = experts(x, ids, weights)
        graph.replay()
        assert torch.equal(found, expected)
        x.mul_(2)
        ids.copy_(ids.flip(0))
        graph.replay()
    wanted = reference.forward(x.cpu(), ids.cpu(), weights.cpu(), *truth)
    assert relative(found.cpu(), wanted) < TOLERANCE
