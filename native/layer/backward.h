// The gradients of a layer of experts that forward ran with Training.
#pragma once
#include "layer/forward.h"

namespace coterie {

struct BackwardBatch {
  int64_t tokens, top_k;
  const void *x, *grad_out;  // [tokens, hidden], rows adjacent
  DType x_dtype, grad_out_dtype;
  const int64_t* ids;
  const float* weights;
  void* grad_x;         // [tokens, hidden]
  DType grad_x_dtype;   // bf16 or f32
  float* grad_weights;  // [tokens, top_k], zero where the id is -1
};

// LoRA gradients go where `training.lora` says; those of experts without tokens are zero. Same bits for any number of threads.
void backward(const Experts& layer, const Kernels& kernels, const BackwardBatch& batch, const Training& training);

}  // namespace coterie
