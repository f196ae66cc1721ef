// RMSNorm of a few rows: torch takes longer to start its seven operators than they have to do.
#pragma once
#include "isa/kernels.h"

namespace coterie {

struct RmsNorm {
  const void* weight;
  DType weight_dtype;
  float epsilon;
  bool rounded;      // the normed row is rounded to its type before it meets the weight
  bool from_one;     // times 1 + weight
};

// Rows [rows, cols], bf16 or f32, contiguous, into `to`, of the same type.
void rms_norm(const RmsNorm& norm, const void* from, DType dtype, int64_t rows, int64_t cols, void* to);

// What a row, bf16 or f32, is scaled by.
float inverse_rms(float epsilon, const void* from, DType dtype, int64_t cols);

}  // namespace coterie
