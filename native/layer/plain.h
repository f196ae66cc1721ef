// A plain matrix and a few tokens: torch takes several times as long as the reading of it for one row of bf16.
#pragma once
#include "isa/kernels.h"

namespace coterie {

// to[token * rows + row], float32: x [tokens, cols] times weight [rows, cols], contiguous, both of `dtype`, bf16 or f32; cols: a multiple of 16.
void plain_products(const Kernels& kernels, const uint8_t* weight, DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t tokens, float* to);

// The same, and bias [rows] or null, to `out` [tokens, rows] of that type.
void plain_linear(const Kernels& kernels, const uint8_t* weight, DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t tokens, const float* bias, void* out);

}  // namespace coterie
