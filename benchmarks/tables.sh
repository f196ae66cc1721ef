#!/usr/bin/env bash
# The README's tables of speed and memory beside Transformers and PEFT, measured on this machine. About twenty minutes on a quiet machine.
set -euo pipefail
coterie doctor
for format in bf16 int8 int4; do
  coterie bench layer --experts "$format" --shape qwen3-30b
done
for format in bf16 int8 int4; do
  coterie bench model --experts "$format"
done
coterie bench model --experts int4 --dense int4 --peer none --profile
for format in bf16 int4; do
  coterie bench train layer --experts "$format"
done
for format in bf16 int8 int4; do
  coterie bench train lora --experts "$format"
done
coterie bench train memory
coterie bench train model --rounds 2
