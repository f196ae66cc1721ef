"""`convert` and `Experts.open` know checkpoints by names and config.json, loading in Transformers by its conversions
and the model's own code: for every family both find the same experts."""

import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM

from coterie.checkpoints import open_reader
from coterie.hf.modules import number_layers, read_layouts


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_both_ways_find_the_same(family, checkpoint):
    reader = open_reader(checkpoint(family))
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family))
    layouts = read_layouts(model)
    numbers = number_layers(list(layouts))
    assert reader.layers == tuple(numbers.values())
    for name, layout in layouts.items():
        module, layer = model.get_submodule(name), reader.layer(numbers[name])
        for what in ("num_experts", "hidden_size", "intermediate_size", "has_gate", "activation"):
            assert getattr(layer, what) == getattr(layout, what), what
        for expert in range(layout.num_experts):
            found, expected = layer.expert(expert), {}
            for weight in layout.weights:
                expected |= layout.split_weight(weight, module.get_parameter(weight)[expert])
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[part], expected[part]) for part in found)
        biases = {}
        for parameter in set(layout.parameters) - set(layout.weights):
            biases |= layout.split_bias(parameter, module.get_parameter(parameter))
        assert layer.biases().keys() == biases.keys()
        assert all(torch.equal(bias, biases[part]) for part, bias in layer.biases().items())
