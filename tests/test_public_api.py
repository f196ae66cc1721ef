"""The public API as the README shows it; type-checked too, as a user's program would be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import coterie
from coterie import tiny


def test_every_public_name_is_there() -> None:
    for name in coterie.__all__:
        assert getattr(coterie, name) is not None


def test_a_model_is_loaded_in_one_line_and_writes(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny.PATH)
    model: Any = coterie.from_pretrained(str(tiny.PATH), experts="int4", device="cpu")
    longhand = AutoModelForCausalLM.from_pretrained(
        tiny.PATH, quantization_config=coterie.CoterieConfig(experts="int4"), dtype=torch.bfloat16
    )
    inputs = tokenizer("A list is", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert torch.equal(model(inputs).logits, longhand(inputs).logits)
    assert model.generate(inputs, max_new_tokens=4, do_sample=False).shape[1] > inputs.shape[1]

    model.save_pretrained(tmp_path)
    with torch.inference_mode():
        assert torch.equal(coterie.from_pretrained(tmp_path)(inputs).logits, model(inputs).logits)


def test_a_layer_of_experts_stands_alone(tmp_path: Path) -> None:
    gate, up, down = torch.randn(4, 64, 128), torch.randn(4, 64, 128), torch.randn(4, 128, 64)
    experts: coterie.Experts = coterie.Experts.pack(gate, up, down, format="int8")
    x, ids, weights = torch.randn(3, 128), torch.tensor([[0, 1], [2, 3], [1, -1]]), torch.rand(3, 2)
    y: torch.Tensor = experts(x, ids, weights)
    assert y.shape == x.shape
    ticket: coterie.Ticket = experts.submit(x, ids, weights)
    assert torch.equal(ticket.wait(), y) and ticket.done
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (4, 128, 64)
    assert experts.format == "int8" and experts.nbytes > 0
    assert [tuple(w.shape) for w in experts.dequantize() if w is not None] == [(4, 64, 128), (4, 64, 128), (4, 128, 64)]

    experts.save(tmp_path, layer=0)
    opened = coterie.Experts.open(tmp_path, layer=0)
    assert torch.equal(opened(x, ids, weights), y)
    opened.move("cpu", [0, 3])  # a device: "cuda" where there is one
    torch.testing.assert_close(opened(x, ids, weights), y, rtol=0.05, atol=0.05 * float(y.abs().max()))


def test_threads_can_be_set() -> None:
    before = coterie.cpu.threads()
    coterie.cpu.set_threads(1)
    assert coterie.cpu.info().threads == 1
    coterie.cpu.set_threads(before)
