"""Layouts are read off a module's flags, shapes and what its gate computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.activations import ACT2FN
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from coterie import Activation
from coterie.errors import UnsupportedModelError
from coterie.hf.layout import Layout, read_layout

E, H, I = 3, 8, 6  # noqa: E741


def made(act: str = "silu", gate=None, parameters: tuple[str, ...] = (), transposed: bool = False, then=None, **flags):
    """A decorated experts module with that activation, `gate` in the place of `_apply_gate`, attributes set `then`."""

    class SomeExperts(nn.Module):
        def __init__(self, config):
            super().__init__()
            first, down = (E, 2 * I, H), (E, H, I)
            if transposed:
                first, down = (E, H, 2 * I), (E, I, H)
            self.gate_up_proj = nn.Parameter(torch.randn(first))
            self.down_proj = nn.Parameter(torch.randn(down))
            for name in parameters:
                setattr(self, name, nn.Parameter(torch.zeros(E, H)))
            self.act_fn = ACT2FN[act]

        def forward(self, hidden, ids, weights):
            return hidden

    if gate is not None:
        SomeExperts._apply_gate = gate
    decorated = use_experts_implementation(is_transposed=transposed, **flags)(SomeExperts)
    module = decorated(SimpleNamespace())
    for name, value in (then or {}).items():
        setattr(module, name, value)
    return module


def clamped(limit: float, alpha: float = 1.0, offset: float = 0.0):
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + offset) * gate * torch.sigmoid(alpha * gate)

    return gate


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("silu", Activation("silu")),
        ("swish", Activation("silu")),
        ("quick_gelu", Activation("silu", alpha=1.702)),
        ("gelu", Activation("gelu")),
        ("gelu_python", Activation("gelu")),
        ("gelu_new", Activation("gelu_tanh")),
        ("gelu_fast", Activation("gelu_tanh")),
        ("gelu_pytorch_tanh", Activation("gelu_tanh")),
        ("relu", Activation("relu")),
        ("relu2", Activation("relu2")),
    ],
)
def test_activation_by_name(name, expected):
    assert read_layout(made(name)).activation == expected


@pytest.mark.parametrize("name", ["tanh", "mish", "relu6", "sigmoid", "gelu_10", "leaky_relu", "xielu", "prelu"])
def test_activation_unsupported(name):
    with pytest.raises(UnsupportedModelError, match="SomeExperts is not supported: its _apply_gate"):
        read_layout(made(name))


@pytest.mark.parametrize(("limit", "alpha", "offset"), [(7.0, 1.702, 1.0), (10.0, 1.0, 0.0), (20.0, 1.0, 0.5)])
def test_clamped_gate(limit, alpha, offset):
    expected = Activation("silu", alpha=alpha, limit=limit, up_offset=offset)
    assert read_layout(made(gate=clamped(limit, alpha, offset))).activation == expected


def test_gate_in_float32():
    def gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return (self.act_fn(gate.float()) * up.float()).to(gate_up.dtype)

    assert read_layout(made(gate=gate)).activation == Activation("silu")


@pytest.mark.parametrize(
    "gate",
    [
        lambda self, x: F.silu(x.chunk(2, -1)[0]).clamp(max=7.0) * x.chunk(2, -1)[1],  # clamped after, not before
        lambda self, x: F.silu(x.chunk(2, -1)[1]) * x.chunk(2, -1)[0],  # up before gate
        lambda self, x: F.silu(x[..., ::2]) * x[..., 1::2],  # alternating, but declared concatenated
        lambda self, x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1] ** 2,
        lambda self, x: x / 0,
    ],
    ids=["clamped-after", "swapped", "interleaved", "squared", "infinite"],
)
def test_gate_unsupported(gate):
    with pytest.raises(UnsupportedModelError, match="its _apply_gate"):
        read_layout(made(gate=gate))


def test_gpt_oss():
    config = GptOssConfig(num_local_experts=E, hidden_size=H, intermediate_size=I)
    layout = read_layout(GptOssExperts(config))
    assert layout == Layout(
        E,
        H,
        I,
        Activation("silu", 1.702, 7.0, 1.0),
        has_gate=True,
        has_bias=True,
        is_transposed=True,
        is_concatenated=False,
    )
    assert layout.parameters == ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def test_no_gate():
    config = NemotronHConfig(n_routed_experts=E, hidden_size=H, moe_intermediate_size=I, moe_latent_size=None)
    layout = read_layout(NemotronHExperts(config))
    assert not layout.has_gate
    assert layout.activation == Activation("relu2")
    assert layout.weights == ("up_proj", "down_proj")


def test_on_the_meta_device():
    with torch.device("meta"):
        assert read_layout(made("gelu")).activation == Activation("gelu")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: made(then={"has_post_expert_norm": True}), "normalises"),
        (lambda: made(parameters=("scales",)), "parameters that no kernel reads: scales"),
        (lambda: made(has_bias=True), "expected parameters gate_up_proj, gate_up_proj_bias"),
        (lambda: made(has_gate=False), "expected parameters up_proj"),
        (lambda: made().to(torch.float64), "float64"),
        (lambda: nn.Linear(2, 2), "experts interface"),
    ],
)
def test_unsupported(module, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        read_layout(module())


def test_wrong_shape():
    module = made()
    module.gate_up_proj = nn.Parameter(torch.zeros(E, 2 * I, H + 1))
    with pytest.raises(UnsupportedModelError, match=r"gate_up_proj has shape \[3, 12, 9\], expected \[3, 12, 8\]"):
        read_layout(module)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("concatenated", [False, True])
def test_split_and_join(transposed, concatenated):
    layout = Layout(E, H, I, Activation(), True, True, transposed, concatenated)
    first = torch.randn(layout.shape("gate_up_proj"))
    parts = layout.split_weight("gate_up_proj", first[0])
    rows = first[0].T if transposed else first[0]
    assert torch.equal(parts["gate"], rows[:I] if concatenated else rows[::2])
    assert torch.equal(parts["up"], rows[I:] if concatenated else rows[1::2])
    assert all(part.stride(1) == 1 for part in parts.values())
    assert torch.equal(layout.join_weight("gate_up_proj", parts), first[0])
    down = torch.randn(layout.shape("down_proj"))[0]
    assert torch.equal(layout.join_weight("down_proj", layout.split_weight("down_proj", down)), down)
    bias = torch.randn(layout.shape("gate_up_proj_bias"))
    parts = layout.split_bias("gate_up_proj_bias", bias)
    assert parts["gate"].shape == (E, I)
    assert torch.equal(layout.join_bias("gate_up_proj_bias", parts), bias)
