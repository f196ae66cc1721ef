"""Norms, routers and plain linear layers by the engine, beside the same modules by torch."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm, GptOssTopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, OlmoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, Qwen3MoeTopKRouter

from coterie import _native
from coterie.hf.inference.norms import QuickNorm
from coterie.hf.inference.proving import FEW
from coterie.hf.inference.quick import quicken
from coterie.hf.inference.routers import QuickRouter

WIDTH, EXPERTS, TOP_K = 64, 24, 3
STEP = {torch.bfloat16: 2**-8, torch.float32: 1e-6}


class Settings:
    """The part of a model's configuration that routers read."""

    hidden_size, num_experts, num_local_experts, num_experts_per_tok = WIDTH, EXPERTS, EXPERTS, TOP_K
    norm_topk_prob, n_group, topk_group, routed_scaling_factor = True, 1, 1, 1.0

    def __init__(self, **changed):
        vars(self).update(changed)


def both(make, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A module with random weights by torch, and a copy of it that was quickened."""
    plain, quick = make().to(dtype).eval(), make().to(dtype).eval()
    weight = torch.randn(plain.weight.shape, generator=torch.Generator().manual_seed(1)) * 0.3
    for module in (plain, quick):
        module.weight.data.copy_(weight)
        if getattr(module, "bias", None) is not None:
            module.bias.data.copy_(weight[:, 0])
    quicken(quick)
    return plain, quick


def rows(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
@pytest.mark.parametrize("kind", [Qwen3MoeRMSNorm, OlmoeRMSNorm, GptOssRMSNorm, Gemma3RMSNorm])
def test_norms(kind, epsilon, dtype, isa):
    plain, quick = both(lambda: kind(WIDTH, epsilon), dtype)
    assert isinstance(quick, QuickNorm) and isinstance(quick, kind) and type(quick).__name__ == kind.__name__
    for shape in ((1, 1), (3, 1, 5), (2, 1), (2, 3)):
        x = rows(dtype, *shape)
        with torch.no_grad():
            found, expected = quick(x), plain(x)
        assert found.dtype == dtype and found.shape == x.shape
        assert (found - expected).abs().max() <= STEP[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        (Qwen3MoeTopKRouter, {}),
        (OlmoeTopKRouter, {"norm_topk_prob": False}),
        (MixtralTopKRouter, {}),
        (GptOssTopKRouter, {}),
    ],
)
def test_routers(kind, changed, dtype, each_isa):
    plain, quick = both(lambda: kind(Settings(**changed)), dtype)
    assert isinstance(quick, QuickRouter) and isinstance(quick, kind)
    for isa in each_isa:
        for count in (1, 7):
            x = rows(dtype, count)
            with torch.no_grad():
                (logits, weights, experts), expected = quick(x), plain(x)
            assert [t.dtype for t in (logits, weights, experts)] == [t.dtype for t in expected], isa
            assert (logits - expected[0]).abs().max() <= STEP[dtype] * expected[0].abs().max(), isa
            assert (weights - expected[1]).abs().max() <= STEP[dtype], isa
            taken, wanted = logits.gather(1, experts), expected[0].gather(1, expected[2])
            assert (taken - wanted).abs().max() <= STEP[dtype] * expected[0].abs().max(), isa


@pytest.mark.parametrize("dtype", STEP)
@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (3, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("kind", [DeepseekV3TopkRouter, Glm4MoeTopkRouter])
def test_routers_by_sigmoids(kind, normalised, groups, dtype, each_isa):
    settings = {
        "n_group": groups[0],
        "topk_group": groups[1],
        "norm_topk_prob": normalised,
        "routed_scaling_factor": 2.5,
    }
    plain, quick = both(lambda: kind(Settings(**settings)), dtype)
    assert isinstance(quick, QuickRouter) and quick.quick.scores is not None
    correction = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(3)) * 0.2
    for module in (plain, quick):
        module.e_score_correction_bias.copy_(correction)
    for isa in each_isa:
        for count in (1, 7):
            x = rows(dtype, count)
            with torch.no_grad():
                (logits, weights, experts), expected = quick(x), plain(x)
            assert [t.dtype for t in (logits, weights, experts)] == [t.dtype for t in expected], isa
            assert (logits - expected[0]).abs().max() <= 1e-5 * expected[0].abs().max(), isa
            order, wanted = (found.argsort(-1) for found in (experts, expected[2]))
            assert torch.equal(experts.gather(1, order), expected[2].gather(1, wanted)), isa
            assert torch.allclose(weights.gather(1, order), expected[1].gather(1, wanted), atol=1e-5), isa


def test_scores_that_do_not_fit_are_not_taken():
    x, weight, bias = torch.randn(2, 64), torch.randn(8, 64), torch.zeros(8)
    route = lambda *scores, top_k=2: _native.route(x, weight, None, top_k, True, scores)  # noqa: E731
    assert route(bias, 4, 2, 1.0, True) is not None
    for scores in (
        (bias[:7], 1, 1, 1.0, True),
        (bias, 3, 1, 1.0, True),
        (bias, 4, 5, 1.0, True),
        (bias, 0, 0, 1.0, True),
    ):
        assert route(*scores) is None
    assert route(bias, 4, 1, 1.0, True, top_k=3) is None


def test_what_is_something_else_is_left_alone():
    class Scaled(Qwen3MoeRMSNorm):
        def forward(self, x):
            return 1.01 * super().forward(x)

    class Gated(Qwen3MoeRMSNorm):
        def forward(self, x, gate):
            return super().forward(x) * gate

    class Least(Qwen3MoeTopKRouter):
        def forward(self, x):
            logits, weights, experts = super().forward(x)
            return logits, weights.flip(1), experts

    settings = Settings()
    others = [Scaled(WIDTH), Gated(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH, bias=False), nn.Embedding(9, WIDTH)]
    for module in [*others, Least(settings), nn.Linear(WIDTH, WIDTH, bias=False)]:
        kind = type(module)
        quicken(module)
        assert type(module) is kind


def test_the_weights_of_a_module_are_read_with_each_call():
    plain, quick = both(lambda: Qwen3MoeRMSNorm(WIDTH), torch.float32)
    x = rows(torch.float32, 1)
    for module in (plain, quick):
        module.weight = nn.Parameter(torch.full((WIDTH,), 3.0))
    with torch.no_grad():
        assert torch.allclose(quick(x), plain(x))


def test_training_and_prompts_go_through_torch(monkeypatch):
    def refuse(*_):
        raise AssertionError("the engine was asked")

    _, norm = both(lambda: Qwen3MoeRMSNorm(WIDTH), torch.float32)
    _, router = both(lambda: Qwen3MoeTopKRouter(Settings()), torch.float32)
    monkeypatch.setattr(_native, "rms_norm", refuse)
    monkeypatch.setattr(_native, "route", refuse)
    for module, few, many in ((norm, (FEW, 1), (1, 2)), (router, (FEW,), (FEW + 1,))):
        x = rows(torch.float32, *few).requires_grad_()
        out = module(x)
        (out if module is norm else out[1]).square().sum().backward()
        assert x.grad.any() and module.weight.grad.any()
        with torch.no_grad():
            module(rows(torch.float32, *many))
            with pytest.raises(AssertionError, match="was asked"):
                module(x)
            module.train()(x)  # as checkpointing does, and a reference in the place of the policy


@pytest.mark.parametrize("bias", [False, True])
def test_plain_linear_layers(bias, monkeypatch):
    """Those of a model whose linear layers are not packed."""
    calls, call = [], _native.plain_linear
    monkeypatch.setattr(_native, "plain_linear", lambda *given: calls.append(1) or call(*given))
    model = nn.Sequential(nn.Linear(64, 48, bias=bias), nn.Linear(48, 16, bias=bias)).to(torch.bfloat16)
    rows = torch.randn(3, 5, 64).bfloat16()
    with torch.no_grad():
        expected = [model(x) for x in (rows[:, :1], rows, rows[:1, 0])]
    quicken(model)
    assert all(isinstance(part, nn.Linear) and "Linear(in_features" in repr(part) for part in model)
    for x, before in zip((rows[:, :1], rows, rows[:1, 0]), expected, strict=True):
        with torch.no_grad():
            found = model.eval()(x)
        assert found.dtype == torch.bfloat16 and (found - before).abs().max() < 2**-6 * before.abs().max()
    assert len(calls) == 4  # of three rows and of one, not of fifteen
    model(rows[:, :1]).sum().backward()
    with torch.no_grad():
        model.train()(rows[:, :1])
        model.eval().float()(rows[:, :1].float())
        model.half()(rows[:, :1].half())
    assert len(calls) == 4 and model[0].weight.grad is not None


def test_plain_linear_layers_of_other_types_are_left_alone():
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 16, dtype=torch.float16), nn.Linear(16, 8, device="meta"))
    quicken(model)
    assert all(type(part) is nn.Linear for part in model)
