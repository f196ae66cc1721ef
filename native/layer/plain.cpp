#include "layer/plain.h"

#include <algorithm>
#include <mutex>

#include "layer/values.h"
#include "layer/workspace.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

constexpr int64_t kRows = 32;  // of one item of work

}  // namespace

void plain_products(const Kernels& kernels, const uint8_t* weight, DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t tokens, float* to) {
  const int64_t scratch_floats = tokens * cols;
  auto* scratch = reinterpret_cast<float*>(workspace().scratch.at_least(thread_count() * scratch_floats * 4));
  parallel((rows + kRows - 1) / kRows, [&](int64_t item, int thread) {
    const int64_t first = item * kRows;
    kernels.plain_rows({std::min(kRows, rows - first), cols, tokens, dtype, weight + first * cols * element_bytes(dtype), x, to + first, rows},
                       scratch + thread * scratch_floats);
  });
}

void plain_linear(const Kernels& kernels, const uint8_t* weight, DType dtype, int64_t rows, int64_t cols, const uint8_t* x, int64_t tokens, const float* bias, void* out) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  auto* sums = reinterpret_cast<float*>(w.result.at_least(tokens * rows * 4));
  plain_products(kernels, weight, dtype, rows, cols, x, tokens, sums);
  for (int64_t t = 0; bias && t < tokens; t++)
    for (int64_t r = 0; r < rows; r++) sums[t * rows + r] += bias[r];
  kernels.store(sums, tokens * rows, out, dtype);
}

}  // namespace coterie
