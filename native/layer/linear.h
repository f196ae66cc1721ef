// One packed matrix by itself: y = x W^T + bias, and what comes back.
#pragma once
#include <vector>

#include "layer/workspace.h"

namespace coterie {

struct Linear {
  Layout layout;  // [outputs, inputs]
  const uint8_t* matrix = nullptr;
  const float* bias = nullptr;  // outputs padded to panels; may be null
};

inline bool same_format(const Layout& a, const Layout& b) { return a.encoding == b.encoding && a.group == b.group && a.zero_point == b.zero_point; }

// `out` [rows, outputs] is contiguous. integer: activations are rounded to int8.
void linear(const Linear& layer, const Kernels& kernels, int64_t rows, const Strided& x, void* out, DType out_dtype, bool integer);

// Layers of as many inputs, of one input: outs[i] [rows, outputs of layer i].
void linears(const std::vector<const Linear*>& layers, const Kernels& kernels, int64_t rows, const Strided& x, const std::vector<void*>& outs, DType out_dtype,
             bool integer);

// Parts of a matrix, `count` rows of it from each of `first` on, which are whole blocks, with an input of their own each: x [parts][rows][inputs] to
// `out` [parts][rows][count], without bias.
void linear_parts(const Linear& layer, const Kernels& kernels, const std::vector<int64_t>& first, int64_t count, int64_t rows, const void* x, void* out, DType dtype,
                  bool integer);

// grad_x [rows, inputs], contiguous, from grad_out [rows, outputs].
void linear_backward(const Linear& layer, const Kernels& kernels, int64_t rows, const Strided& grad_out, void* grad_x, DType grad_x_dtype);

}  // namespace coterie
