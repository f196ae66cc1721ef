"""What packing linear layers costs: the error of one of Gaussian weights, and the perplexity of the bundled model.

python benchmarks/dense.py
"""

from __future__ import annotations

import torch
from transformers import AutoTokenizer
from transformers.utils import logging

import coterie
from coterie import tiny
from coterie.formats import FORMATS, resolve

SIZE, TOKENS = 2048, 16
SPECS = (
    *map(resolve, FORMATS), resolve("int8", 32), resolve("int4", 32, True), resolve("int4", 128),
)  # fmt: skip
PAIRS = (
    ("bf16", None), ("bf16", "int8"), ("bf16", "int4"), ("int8", None), ("int8", "int8"), ("int4", None),
    ("int4", "int8"), ("int4", "int4"),
)  # fmt: skip


@torch.inference_mode()
def main() -> None:
    random = torch.Generator().manual_seed(0)
    weight = (torch.randn(SIZE, SIZE, generator=random) / SIZE**0.5).bfloat16()
    x = torch.randn(TOKENS, SIZE, generator=random).bfloat16()
    truth = x.float() @ weight.float().T
    print(f"relative error of the output of a linear layer [{SIZE}, {SIZE}], {TOKENS} tokens")
    for spec in SPECS:
        out = coterie.Linear.pack(weight, format=spec)(x).float()
        print(f"  {spec.described:38} {((out - truth).norm() / truth.norm()).item():.3g}")

    logging.disable_progress_bar()
    ids = AutoTokenizer.from_pretrained(tiny.PATH)(tiny.heldout_text(), return_tensors="pt").input_ids[0]
    print(f"perplexity of the bundled model, {len(ids)} tokens that it never saw")
    first = None
    for experts, dense in PAIRS:
        found = tiny.perplexity(coterie.from_pretrained(tiny.PATH, experts=experts, dense=dense), ids)
        first = first or found
        print(f"  experts {experts:5} dense {dense!s:5} {found:.2f} {100 * (found / first - 1):+.2f} %")


if __name__ == "__main__":
    main()
