"""A GGUF file end to end, beside llama.cpp on the same file: prefill and decode tokens per second, taking turns.

    bash benchmarks/peers/setup.sh && python benchmarks/peers/gguf_duel.py --dense own    # also int8, q4_k, none

The file is that slice of Qwen3-30B-A3B which e2e_model.py makes, in random blocks of Q4_K_M's types: Q6_K for the
head and, in every other layer, for v and down, and Q4_K for all else.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from e2e_duel import CACHE, Engine

LAYERS, VOCABULARY, HIDDEN, INNER, EXPERTS, CHOSEN, HEADS, KV_HEADS, HEAD = 4, 32768, 2048, 768, 128, 8, 32, 4, 128
PROMPT, DECODED = 512, 64
# Of a block of 256 weights: bytes, and f16 scales by where they are, with which weights are as large as a model's.
BLOCKS = {"Q4_K": (144, {0: 1.8e-4, 2: 1.3e-3}), "Q6_K": (210, {208: 2e-5})}


def make_file(path: Path) -> None:
    import gguf

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for key, value in {
        "block_count": LAYERS, "context_length": 32768, "embedding_length": HIDDEN, "feed_forward_length": 6144,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "expert_count": EXPERTS, "expert_used_count": CHOSEN,
        "expert_feed_forward_length": INNER, "vocab_size": VOCABULARY,
    }.items():  # fmt: skip
        writer.add_uint32(f"qwen3moe.{key}", value)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["t 0"])

    def add(name: str, kind: str, *shape: int) -> None:
        nbytes, scales = BLOCKS[kind]
        made = draw.integers(0, 256, (*shape[:-1], shape[-1] // 256, nbytes), dtype=np.uint8)
        for at, scale in scales.items():
            made[..., at : at + 2] = np.array([scale], np.float16).view(np.uint8)
        writer.add_tensor(name, made.reshape(*shape[:-1], -1), raw_dtype=gguf.GGMLQuantizationType[kind])

    add("token_embd.weight", "Q4_K", VOCABULARY, HIDDEN)
    add("output.weight", "Q6_K", VOCABULARY, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for layer in range(LAYERS):
        stem, finer = f"blk.{layer}.", "Q4_K" if layer % 2 else "Q6_K"
        for name, size in (("attn_norm", HIDDEN), ("ffn_norm", HIDDEN), ("attn_q_norm", HEAD), ("attn_k_norm", HEAD)):
            writer.add_tensor(f"{stem}{name}.weight", np.ones(size, np.float32))
        add(f"{stem}attn_q.weight", "Q4_K", HEADS * HEAD, HIDDEN)
        add(f"{stem}attn_k.weight", "Q4_K", KV_HEADS * HEAD, HIDDEN)
        add(f"{stem}attn_v.weight", finer, KV_HEADS * HEAD, HIDDEN)
        add(f"{stem}attn_output.weight", "Q4_K", HIDDEN, HEADS * HEAD)
        router = (draw.standard_normal((EXPERTS, HIDDEN)) * 0.02).astype(np.float32)
        writer.add_tensor(f"{stem}ffn_gate_inp.weight", router)
        add(f"{stem}ffn_gate_exps.weight", "Q4_K", EXPERTS, INNER, HIDDEN)
        add(f"{stem}ffn_up_exps.weight", "Q4_K", EXPERTS, INNER, HIDDEN)
        add(f"{stem}ffn_down_exps.weight", finer, EXPERTS, HIDDEN, INNER)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Ours(Engine):
    """The file opened by coterie in a process of its own, which answers as e2e_engines.py does."""

    def __init__(self, path: Path, dense: str) -> None:
        self.name = f"coterie, dense={dense}"
        command = [sys.executable, __file__, "--worker", str(path), "--dense", dense]
        self.process = subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.answer()


def work(path: str, dense: str) -> None:
    from e2e_engines import transformers_model

    import coterie

    run = transformers_model(lambda: coterie.from_pretrained(path, dense=None if dense == "none" else dense))
    draw = random.Random(0)

    def figures(prompt: int, decoded: int) -> dict[str, float]:
        prefill, decode = run([draw.randrange(VOCABULARY) for _ in range(prompt)], decoded)
        return {"prefill": prefill, "decode": decode}

    figures(32, 4)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(figures(*map(int, line.split()))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", default="own", help="of linear layers: own, int8, none ..., or several")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.worker:
        work(asked.worker, asked.dense)
        return
    path = CACHE / "e2e" / "q4_k_m.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        make_file(path.with_suffix(".tmp"))
        path.with_suffix(".tmp").rename(path)
    engines = [Engine("llama:q4_k_m", path.parent), *(Ours(path, dense) for dense in asked.dense.split(","))]
    rounds = [[engine.time(PROMPT, DECODED) for engine in engines] for _ in range(asked.rounds)]
    for number, engine in enumerate(engines):
        said = [engine.name]
        for what in ("prefill", "decode"):
            rate = statistics.median(turn[number][what] for turn in rounds)
            ratios = [turn[number][what] / turn[0][what] for turn in rounds]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            said.append(f"{what} {rate:.1f} tokens/s, {ratio} times llama.cpp's")
        print("; ".join(said), flush=True)


if __name__ == "__main__":
    main()
