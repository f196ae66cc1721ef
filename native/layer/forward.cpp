#include "layer/forward.h"

#include <algorithm>
#include <cstring>

#include "layer/products.h"
#include "layer/values.h"
#include "layer/workspace.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

// low[slot] = scaling * A x for every expert with tokens.
Staged low_rank(StagedBuffer& buffer, const LoraFactor& factor, int64_t in, int64_t out, const Kernels& kernels, const Routing& routing,
                const Staged& x, bool x_by_slot) {
  const Staged low = buffer.floats(kernels, routing.slots(), factor.padded_rank());
  if (factor.rank)
    parallel(static_cast<int64_t>(routing.experts.size()), [&](int64_t i, int) {
      kernels.low_rank(factor, routing.experts[i], in, out, false, x, x_by_slot ? routing.within_hidden(i) : routing.into_hidden(i), low, 0);
    });
  return low;
}

const float* bias_of(const float* biases, const Layout& layout, int64_t expert) {
  return biases ? biases + expert * layout.panels() * kPanelRows : nullptr;
}

void forward_chunk(Workspace& w, const Experts& layer, const Kernels& kernels, const Batch& batch, const Training* training) {
  const int threads = thread_count();
  const bool integer = batch.integer;
  Routing& routing = w.routing;
  routing.group(batch.ids, batch.weights, batch.tokens, batch.top_k, layer.count);
  const int64_t slots = routing.slots(), active = static_cast<int64_t>(routing.experts.size());
  const int64_t scratch_bytes = round_up(block_scratch_bytes(std::max(layer.in.padded_cols(), layer.out.padded_cols())), 4096);
  uint8_t* scratch = w.scratch.at_least(scratch_bytes * threads);

  const Staged input = staged_rows(w.input, kernels, layer.in, {batch.x, batch.x_dtype, batch.x_stride}, layer.hidden, layer.in.padded_cols(), batch.tokens,
                                   integer);

  Staged hidden = integer ? w.hidden.integers(kernels, slots, layer.out) : w.hidden.floats(kernels, slots, layer.out.padded_cols());
  uint8_t* rows = hidden.data;
  int64_t row_bytes = hidden.row_bytes;
  if (integer) {
    row_bytes = hidden.cols * 2;
    rows = w.hidden_rows.at_least(slots * row_bytes);
  }
  const int64_t columns = layer.in.panels() * kPanelRows, element = row_bytes / hidden.cols;
  if (columns < hidden.cols)
    for (int64_t s = 0; s < slots; s++) memset(rows + s * row_bytes + columns * element, 0, (hidden.cols - columns) * element);

  std::vector<Product> products(active);
  for (int64_t i = 0; i < active; i++) {
    const int64_t e = routing.experts[i];
    Product& product = products[i] = gate_up_of(layer, e);
    product.bias[0] = bias_of(layer.has_gate ? layer.gate_bias : layer.up_bias, layer.in, e);
    product.bias[1] = layer.has_gate ? bias_of(layer.up_bias, layer.in, e) : nullptr;
    product.x = input;
    product.tokens = routing.into_hidden(i);
    product.activated = {&layer.activation, rows, row_bytes, nullptr, nullptr, nullptr};
  }
  if (training) {
    const Lora& lora = training->lora;
    const LoraTerm gate{&lora.gate, low_rank(w.low_gate, lora.gate, layer.hidden, layer.intermediate, kernels, routing, input, false), false};
    const LoraTerm up{&lora.up, low_rank(w.low_up, lora.up, layer.hidden, layer.intermediate, kernels, routing, input, false), false};
    for (Product& product : products) {
      product.lora[0] = layer.has_gate ? gate : up;
      if (layer.has_gate) product.lora[1] = up;
      product.activated.gate = training->gate;
      product.activated.up = training->up;
      product.activated.kept_row = routing.position.data();
    }
  }
  multiply_each(kernels, products, scratch, scratch_bytes);
  if (integer) stage_rows(kernels, layer.out, rows, DType::bf16, hidden.cols, hidden.cols, slots, hidden);

  LoraTerm down_lora{};
  if (training)
    down_lora = {&training->lora.down, low_rank(w.low_down, training->lora.down, layer.intermediate, layer.hidden, kernels, routing, hidden, true), true};
  for (int64_t i = 0; i < active; i++) {
    const int64_t e = routing.experts[i];
    Product& product = products[i] = down_of(layer, e);
    product.bias[0] = bias_of(layer.down_bias, layer.out, e);
    product.lora[0] = down_lora;
    product.x = hidden;
    product.tokens = routing.into_result(i);
  }
  const Target target{batch.tokens, layer.hidden, batch.out, batch.out_dtype};
  multiply_sums(kernels, {{products.data(), active, target}}, w.result, scratch, scratch_bytes);
}

}  // namespace

void forward(const Experts& layer, const Kernels& kernels, const Batch& batch, const Training* training) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const int64_t x_size = element_bytes(batch.x_dtype), out_size = element_bytes(batch.out_dtype);
  for (int64_t begin = 0; begin < batch.tokens; begin += kChunkTokens) {
    Batch chunk = batch;
    chunk.tokens = std::min(kChunkTokens, batch.tokens - begin);
    chunk.x = static_cast<const uint8_t*>(batch.x) + begin * batch.x_stride * x_size;
    chunk.ids = batch.ids + begin * batch.top_k;
    chunk.weights = batch.weights + begin * batch.top_k;
    chunk.out = static_cast<uint8_t*>(batch.out) + begin * layer.hidden * out_size;
    if (!training) {
      forward_chunk(w, layer, kernels, chunk, nullptr);
      continue;
    }
    Training part = *training;
    const int64_t kept = begin * batch.top_k * layer.intermediate;
    if (part.gate) part.gate += kept;
    if (part.up) part.up += kept;
    forward_chunk(w, layer, kernels, chunk, &part);
  }
}

}  // namespace coterie
