#!/usr/bin/env bash
# The README's tables of speed beside Transformers, measured on this machine. Takes about ten minutes.
set -euo pipefail
coterie doctor
for format in bf16 int8 int4; do
  coterie bench layer --experts "$format" --shape qwen3-30b
done
for format in bf16 int8 int4; do
  coterie bench model --experts "$format"
done
