// One layer of experts: out[t] = sum over k of weight[t,k] * down(act(gate x[t], up x[t])) of expert ids[t,k].
#pragma once
#include <cstdint>

#include "isa/kernels.h"

namespace coterie {

struct Batch {
  int64_t tokens, top_k;
  const void* x;  // [tokens, hidden], rows x_stride elements apart
  DType x_dtype;
  int64_t x_stride;
  const int64_t* ids;    // [tokens, top_k], each -1 or an expert
  const float* weights;  // [tokens, top_k]
  void* out;             // [tokens, hidden]
  DType out_dtype;       // bf16 or f32
  bool integer;          // int8 activations; only where weights are int8 or int4 and there is no Training
};

// LoRA, and where the pre-activations are kept for the backward pass, bf16 [tokens * top_k][intermediate]; null where nothing is kept.
struct Training {
  Lora lora;
  uint16_t *gate, *up;
};

// The sum runs over a token's experts in an order that depends on the batch alone: same bits for any number of threads, and with bf16 activations the
// same with Training as without, where its LoRA adds nothing.
void forward(const Experts& layer, const Kernels& kernels, const Batch& batch, const Training* training = nullptr);

}  // namespace coterie
