"""Train the small Qwen3-MoE that ships with coterie, from a fixed seed, in minutes on two cores.

    python scripts/make_tiny_model.py [--output src/coterie/data/tiny-qwen3-moe] [--steps 1400]

The text is `pydoc_data.topics`, the documentation that ships with Python itself. Every tenth topic is held out, and
paragraphs that a held-out topic shares with another are dropped from the other. Another Python version has another
text, so the log names the one used.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from coterie import tiny

SEED = 0
END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 2048
BATCH = 8
LEARNING_RATE = 2.5e-3
WARM_UP = 100
DROPOUT = 0.25

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|im_end|>{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def split() -> tuple[list[str], list[str]]:
    """(training topics, held-out topics); no paragraph stands in both, none twice in training."""
    names = sorted(topics)
    held_names = names[5::10]
    held = [topics[n].strip() for n in held_names]
    seen = {p for text in held for p in text.split("\n\n")}
    train = []
    for name in names:
        if name in held_names:
            continue
        fresh = [p for p in topics[name].strip().split("\n\n") if p not in seen]
        seen.update(fresh)
        if fresh:
            train.append("\n\n".join(fresh))
    return train, held


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, TURN_START, TURN_END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=TURN_END, pad_token=END)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3MoeForCausalLM:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in (END, TURN_END)}
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        moe_intermediate_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_experts=16,
        num_experts_per_tok=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        norm_topk_prob=True,
        router_aux_loss_coef=0.01,
        attention_dropout=DROPOUT,
        tie_word_embeddings=True,
        eos_token_id=[ids[TURN_END], ids[END]],
        pad_token_id=ids[END],
        bos_token_id=None,
    )
    return Qwen3MoeForCausalLM(config)


def unigram_perplexity(train: torch.Tensor, held: torch.Tensor) -> float:
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[held].mean().item())


def drop_out(model: Qwen3MoeForCausalLM) -> None:
    """Dropout on what attention and experts add to the residual stream, which Qwen3-MoE itself has none of.

    The text is 94,000 tokens: without it the model soon knows them by heart.
    """

    def dropped(module: torch.nn.Module, args: object, out: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(out, tuple):
            return (torch.nn.functional.dropout(out[0], DROPOUT, module.training), *out[1:])
        return torch.nn.functional.dropout(out, DROPOUT, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(dropped)
        layer.mlp.register_forward_hook(dropped)


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to a tenth."""
    if step < WARM_UP:
        return LEARNING_RATE * (step + 1) / WARM_UP
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


def train(model: Qwen3MoeForCausalLM, ids: torch.Tensor, held: torch.Tensor, steps: int) -> list[dict[str, float]]:
    """Windows from random places of `ids` [N]; returns the log."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    embed, log, start = model.get_input_embeddings(), [], time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        places = torch.randint(len(ids) - tiny.WINDOW, (BATCH, 1)) + torch.arange(tiny.WINDOW)
        batch = ids[places]
        embedded = torch.nn.functional.dropout(embed(batch), DROPOUT)
        out = model(inputs_embeds=embedded, labels=batch, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            model.eval()
            row = {
                "step": step + 1,
                "train_loss": round(out.loss.item(), 4),
                "heldout_perplexity": round(tiny.perplexity(model, held), 3),
                "seconds": round(time.perf_counter() - start, 1),
            }
            model.train()
            log.append(row)
            print(json.dumps(row), flush=True)
    return log


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=tiny.PATH)
    parser.add_argument("--steps", type=int, default=1400)
    args = parser.parse_args()

    torch.manual_seed(SEED)
    train_texts, held_texts = split()
    tokenizer = make_tokenizer(train_texts)
    train_ids = torch.tensor(tokenizer(END.join(train_texts) + END)["input_ids"])
    held_text = "\n\n".join(held_texts) + "\n"
    held_ids = torch.tensor(tokenizer(held_text)["input_ids"])

    model = make_model(tokenizer).train()
    drop_out(model)
    log = train(model, train_ids, held_ids, args.steps)

    model.eval().to(torch.bfloat16)
    model.config.attention_dropout = 0.0
    args.output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.output)
    (args.output / "model.safetensors").chmod(0o644)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(args.output)
    (args.output / "heldout.txt").write_text(held_text, encoding="utf-8")
    result = {
        "seed": SEED,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train_ids),
        "heldout_tokens": len(held_ids),
        "heldout_perplexity": {
            "unigram": round(unigram_perplexity(train_ids, held_ids), 3),
            "this model in bf16": round(tiny.perplexity(model, held_ids), 3),
        },
        "log": log,
    }
    (args.output / "training.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "log"}, indent=1))


if __name__ == "__main__":
    main()
