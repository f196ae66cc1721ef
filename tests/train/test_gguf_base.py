"""A GGUF file as base_model: trained on as any other, its tokenizer from the file; what cannot be is refused first."""

from __future__ import annotations

import json

import gguf_models
import pytest
import torch
from hf.gpt_oss_checkpoints import write_as_gguf, write_mxfp4
from hf.tiny_models import make, prompt
from peft import PeftModel
from safetensors.torch import load_file

import coterie
from coterie.adapters.convert import convert_adapter
from coterie.adapters.export import export_adapter
from coterie.adapters.merge import merge_adapter
from coterie.errors import CheckpointError
from coterie.formats import resolve
from coterie.hf import described
from coterie.hf.converting import convert
from coterie.hf.modules import packed_modules
from coterie.serve.opening import dense_format, open_model
from coterie.train.checks import check_all
from coterie.train.empty import packed_as

ROPE = {"rope_type": "default", "rope_theta": 500000.0}
ROWS = {
    "text": [{"text": f"ab{chr(97 + n)}cdefgh"} for n in range(8)],
    "pairs": [{"prompt": "ab", "chosen": f"abab{chr(97 + n)}", "rejected": "efgh"} for n in range(8)],
    "steps": [{"prompt": "ab", "completions": ["cd", "ef"], "labels": [True, False]} for _ in range(8)],
}


def write_base(path, **options):
    model = make("qwen3_moe", torch.float32, norm_topk_prob=True, rope_parameters=ROPE)
    path.parent.mkdir(exist_ok=True)
    return gguf_models.write_qwen(path, model, **options)


@pytest.fixture
def data(tmp_path):
    files = {}
    for kind, rows in ROWS.items():
        files[kind] = tmp_path / f"{kind}.jsonl"
        files[kind].write_text("\n".join(map(json.dumps, rows)))
    return {kind: [{"path": str(file)}] for kind, file in files.items()}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("text", {}),
        ("text", {"experts": "int4", "sample_packing": True}),
        ("text", {"adapter": None, "unfrozen_parameters": ["q_proj"]}),
        ("pairs", {"rl": "dpo"}),
        ("pairs", {"reward_model": True}),
        ("steps", {"process_reward_model": True}),
    ],
    ids=["supervised", "int4", "no adapter", "dpo", "reward", "process reward"],
)
def test_trains(configure, train, tmp_path, data, kind, changes):
    file = write_base(tmp_path / "model" / "model.gguf", files=2)
    base = file if changes else file.parent
    rows = train(configure(base_model=str(base), datasets=data[kind], **{"experts": None, **changes}))
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and rows[-1]["loss"] < rows[0]["loss"]
    output = tmp_path / "output"
    assert f"Base model: `{base}`" in (output / "README.md").read_text()
    assert described.load_tokenizer(output).convert_tokens_to_ids("ab") == gguf_models.TOKENS.index("ab")
    if "unfrozen_parameters" in changes:
        assert [module.experts.format for _, module in packed_modules(coterie.from_pretrained(output))] == 2 * ["q8_0"]
        return
    assert json.loads((output / "adapter_config.json").read_text())["base_model_name_or_path"] == str(file)
    tensors = load_file(output / "adapter_model.safetensors")
    assert any(value.any() for name, value in tensors.items() if "experts" in name and "lora_B" in name)
    assert any("score" in name for name in tensors) == ("reward" in str(changes))


def test_gpt_oss(configure, train, tmp_path, data):
    file = write_as_gguf(tmp_path / "model.gguf", write_mxfp4(tmp_path / "in"))
    rows = train(configure(base_model=str(file), experts=None, datasets=data["text"]))
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_adapter_is_used(configure, train, tmp_path, data):
    file, output = write_base(tmp_path / "model.gguf"), tmp_path / "output"
    train(configure(base_model=str(file), experts=None, datasets=data["text"]))
    model = coterie.from_pretrained(file)
    with torch.no_grad():
        before = model(prompt()).logits
        after = PeftModel.from_pretrained(model, output)(prompt()).logits
    assert not torch.equal(before, after)
    served, tokenizers = open_model(str(file), {"tuned": output}, dense="own")
    assert tokenizers[None].convert_tokens_to_ids("ab") == gguf_models.TOKENS.index("ab")
    with torch.no_grad():
        assert torch.equal(served(prompt()).logits, after)
    assert export_adapter(output, tmp_path / "exported").experts == 2 * 8
    assert convert_adapter(output, tmp_path / "other", "unsloth").experts == 2 * 8
    with pytest.raises(CheckpointError, match=r"is a GGUF file: expected a checkpoint folder, .* with --model$"):
        merge_adapter(output, tmp_path / "merged")
    convert(file, tmp_path / "packed")
    merge_adapter(output, tmp_path / "merged", str(tmp_path / "packed"))
    merged = coterie.from_pretrained(tmp_path / "merged", experts="bf16")
    with torch.no_grad():
        apart = (merged(prompt()).logits - after).float().norm(dim=-1) / after.float().norm(dim=-1)
        changed = (before - after).float().norm(dim=-1) / after.float().norm(dim=-1)
    assert apart.median() < 0.03 < changed.median()  # a token whose router hesitates may go elsewhere


def test_formats_are_known_before(configure, tmp_path):
    file = write_base(tmp_path / "model.gguf")
    config = described.load_config(file, trust_remote_code=False)
    for experts, name in ((None, "q8_0"), ("int4", "int4")):
        assert packed_as(configure(experts=experts), str(file), config).spec == resolve(name)
    assert dense_format(str(file), "auto", "cpu") == "own"


def test_what_is_refused_before_weights_are_read(configure, tmp_path, data):
    def check(base):
        check_all(configure(base_model=str(base), experts=None, datasets=data["text"]), tmp_path)

    file = write_base(tmp_path / "model.gguf", change=("blk.1.ffn_up_exps.weight", None))
    with pytest.raises(CheckpointError, match=r"has no tensor blk\.1\.ffn_up_exps\.weight"):
        check(file)
    tensors, _ = gguf_models.experts(dict.fromkeys(gguf_models.PARTS, "Q8_0"))
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        described.load_tokenizer(gguf_models.write_gguf(tmp_path / "bare.gguf", tensors))
    (tmp_path / "two").mkdir()
    for name in ("a", "b"):
        write_base(tmp_path / "two" / f"{name}.gguf")
    with pytest.raises(CheckpointError, match="holds 2 GGUF models"):
        check(tmp_path / "two")
