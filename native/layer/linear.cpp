#include "layer/linear.h"

#include <algorithm>
#include <mutex>
#include <numeric>
#include <vector>

#include "layer/products.h"
#include "layer/values.h"
#include "layer/workspace.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

// Row i of the input makes row i of the result.
Tokens each_row(Workspace& w, int64_t rows) {
  const size_t before = w.in_order.size();
  if (static_cast<int64_t>(before) < rows) {
    w.in_order.resize(rows);
    std::iota(w.in_order.begin() + before, w.in_order.end(), static_cast<int32_t>(before));
  }
  return {w.in_order.data(), w.in_order.data(), nullptr, rows};
}

// f(first, rows, input) for chunks of the rows.
template <class F>
void in_chunks(int64_t rows, const Strided& x, const F& f) {
  for (int64_t first = 0; first < rows; first += kChunkTokens) {
    const Strided part{static_cast<const uint8_t*>(x.data) + first * x.stride * element_bytes(x.dtype), x.dtype, x.stride};
    f(first, std::min(kChunkTokens, rows - first), part);
  }
}

// Rows of a result [*, cols], from row `first` on.
Target rows_of(void* out, int64_t first, int64_t count, int64_t cols, DType dtype) {
  return {count, cols, static_cast<uint8_t*>(out) + first * cols * element_bytes(dtype), dtype};
}

// Layers of one format, for which an input is staged once.
void linears_alike(const std::vector<const Linear*>& layers, const Kernels& kernels, int64_t rows, const Strided& x, const std::vector<void*>& outs, DType out_dtype,
             bool integer) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const Layout& layout = layers[0]->layout;
  const int64_t scratch_bytes = round_up(block_scratch_bytes(layout.padded_cols()), 4096);
  uint8_t* scratch = w.scratch.at_least(scratch_bytes * thread_count());
  in_chunks(rows, x, [&](int64_t first, int64_t count, const Strided& part) {
    const Staged staged = staged_rows(w.input, kernels, layout, part, layout.cols, layout.padded_cols(), count, integer);
    const Tokens tokens = each_row(w, count);
    std::vector<Product> products(layers.size());
    std::vector<Sum> sums;
    for (size_t i = 0; i < layers.size(); i++) {
      products[i].layout = &layers[i]->layout;
      products[i].matrix[0] = layers[i]->matrix;
      products[i].bias[0] = layers[i]->bias;
      products[i].x = staged;
      products[i].tokens = tokens;
      sums.push_back({&products[i], 1, rows_of(outs[i], first, count, layers[i]->layout.rows, out_dtype)});
    }
    multiply_sums(kernels, sums, w.result, scratch, scratch_bytes);
  });
}

}  // namespace

void linears(const std::vector<const Linear*>& layers, const Kernels& kernels, int64_t rows, const Strided& x, const std::vector<void*>& outs, DType out_dtype,
             bool integer) {
  for (size_t first = 0; first < layers.size(); first++) {
    const auto as_first = [&](size_t i) { return same_format(layers[i]->layout, layers[first]->layout); };
    bool done = false;
    for (size_t i = 0; i < first; i++) done = done || as_first(i);
    if (done) continue;
    std::vector<const Linear*> those;
    std::vector<void*> their_outs;
    for (size_t i = first; i < layers.size(); i++)
      if (as_first(i)) those.push_back(layers[i]), their_outs.push_back(outs[i]);
    linears_alike(those, kernels, rows, x, their_outs, out_dtype, integer);
  }
}

void linear(const Linear& layer, const Kernels& kernels, int64_t rows, const Strided& x, void* out, DType out_dtype, bool integer) {
  linears({&layer}, kernels, rows, x, {out}, out_dtype, integer);
}

void linear_parts(const Linear& layer, const Kernels& kernels, const std::vector<int64_t>& first, int64_t count, int64_t rows, const void* x, void* out, DType dtype,
                  bool integer) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const int64_t parts = static_cast<int64_t>(first.size());
  Layout layout = layer.layout;
  layout.rows = count;
  const int64_t scratch_bytes = round_up(block_scratch_bytes(layout.padded_cols()), 4096);
  uint8_t* scratch = w.scratch.at_least(scratch_bytes * thread_count());
  const Staged staged = staged_rows(w.input, kernels, layout, {x, dtype, layout.cols}, layout.cols, layout.padded_cols(), parts * rows, integer);
  Tokens tokens = each_row(w, parts * rows);
  tokens.count = rows;
  std::vector<Product> products(parts);
  std::vector<Sum> sums;
  for (int64_t i = 0; i < parts; i++, tokens.input += rows) {
    products[i].layout = &layout;
    products[i].matrix[0] = layer.matrix + layout.block_start(first[i] / kBlockRows);
    products[i].x = staged;
    products[i].tokens = tokens;
    sums.push_back({&products[i], 1, rows_of(out, i * rows, rows, count, dtype)});
  }
  multiply_sums(kernels, sums, w.result, scratch, scratch_bytes);
}

void linear_backward(const Linear& layer, const Kernels& kernels, int64_t rows, const Strided& grad_out, void* grad_x, DType grad_x_dtype) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const Layout& layout = layer.layout;
  const int64_t padded_rows = round_up(layout.rows, kColumnAlign);
  const int64_t scratch_bytes = round_up(block_scratch_bytes(padded_rows), 4096);
  uint8_t* scratch = w.scratch.at_least(scratch_bytes * thread_count());
  in_chunks(rows, grad_out, [&](int64_t first, int64_t count, const Strided& part) {
    Product product{};
    product.layout = &layout;
    product.matrix[0] = layer.matrix;
    product.transposed = true;
    product.x = staged_rows(w.input, kernels, layout, part, layout.rows, padded_rows, count, false);
    product.tokens = each_row(w, count);
    multiply_sums(kernels, {{&product, 1, rows_of(grad_x, first, count, layout.cols, grad_x_dtype)}}, w.result, scratch, scratch_bytes);
  });
}

}  // namespace coterie
