// Which experts a few tokens go to: the k largest of a softmax of x W^T + bias, or of its sigmoids, for the rows of a plain matrix.
#pragma once
#include "isa/kernels.h"

namespace coterie {

struct Router {
  const uint8_t* weight;  // [experts, cols], contiguous, of the type of x
  const float* bias;      // [experts], or null
  int64_t experts, cols;  // columns: a multiple of 16
  int64_t top_k;
  bool normalised;        // the weights of the k add up to 1
  // Sigmoids instead of a softmax, null: the softmax. Added to them where experts are chosen, [experts]; then only those of the `kept` groups of experts are
  // looked at whose best two have the largest sums. The weights are times `scale`.
  const float* correction = nullptr;
  int64_t groups = 1, kept = 1;
  float scale = 1.0f;
  bool wide = false;      // logits are given back, and looked at, as float32
};

// x [tokens, cols], contiguous, bf16 or f32, to logits [tokens, experts] of its type or float32, and by falling weight float32 weights and experts [tokens, top_k].
void route(const Kernels& kernels, const Router& router, const uint8_t* x, DType dtype, int64_t tokens, void* logits, float* weights, int64_t* ids);

}  // namespace coterie
