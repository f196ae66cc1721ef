#include "layer/backward.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "layer/products.h"
#include "layer/values.h"
#include "layer/workspace.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

// Some columns of staged rows.
Staged columns(const Staged& s, int64_t begin, int64_t count) {
  Staged part = s;
  part.data += begin * (s.row_bytes / s.cols);
  part.cols = count;
  return part;
}

// d weights[t, k] = <grad_out[t], y>: the shares of the blocks of hidden columns, in order, and that of the down bias.
void weight_gradients(const Experts& layer, const Routing& routing, const Backward& b, const BackwardBatch& batch, int64_t blocks) {
  memset(batch.grad_weights, 0, batch.tokens * batch.top_k * 4);
  parallel(static_cast<int64_t>(routing.experts.size()), [&](int64_t i, int) {
    const float* bias = layer.down_bias ? layer.down_bias + routing.experts[i] * layer.out.panels() * kPanelRows : nullptr;
    for (int64_t s = routing.begin[i]; s < routing.begin[i + 1]; s++) {
      float sum = 0.0f;
      for (int64_t block = 0; block < blocks; block++) sum += b.weight_parts[block * b.slots + s];
      for (int64_t h = 0; bias && h < layer.hidden; h++)
        sum += bias[h] * value_at(batch.grad_out, batch.grad_out_dtype, routing.token[s] * layer.hidden + h);
      batch.grad_weights[routing.position[s]] = sum;
    }
  });
}

// The gradients of LoRA of experts that have no tokens.
void zero_gradients(const Experts& layer, const Routing& routing, const Lora& lora) {
  std::vector<bool> has_tokens(layer.count, false);
  for (int32_t e : routing.experts) has_tokens[e] = true;
  auto zero = [&](void* grad, DType dtype, int64_t values, int64_t e) {
    const int64_t bytes = values * element_bytes(dtype);
    if (grad) memset(static_cast<uint8_t*>(grad) + e * bytes, 0, bytes);
  };
  for (int64_t e = 0; e < layer.count; e++) {
    if (has_tokens[e]) continue;
    for (const LoraFactor* f : {&lora.gate, &lora.up, &lora.down}) {
      const auto [rows, cols] = f == &lora.down ? std::pair(layer.hidden, layer.intermediate) : std::pair(layer.intermediate, layer.hidden);
      zero(f->grad_a, f->a_type, f->rank * cols, e);
      zero(f->grad_b, f->b_type, rows * f->rank, e);
    }
  }
}

}  // namespace

void backward(const Experts& layer, const Kernels& kernels, const BackwardBatch& batch, const Training& training) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const Lora& lora = training.lora;
  const int threads = thread_count();
  Routing& routing = w.routing;
  routing.group(batch.ids, batch.weights, batch.tokens, batch.top_k, layer.count);
  zero_gradients(layer, routing, lora);
  if (!batch.tokens) return;
  const int64_t slots = routing.slots(), active = static_cast<int64_t>(routing.experts.size());
  const int64_t hidden_cols = layer.in.padded_cols(), inner = layer.out.padded_cols(), gate_cols = layer.has_gate ? inner : 0;

  Backward b{};
  b.lora = &lora;
  b.gate = training.gate;
  b.up = training.up;
  b.row = routing.position.data();
  b.slots = slots;
  b.x = w.input.floats(kernels, batch.tokens, hidden_cols);
  b.grad_out = w.grad_out.floats(kernels, batch.tokens, hidden_cols);
  b.hidden = w.hidden.floats(kernels, slots, inner);
  b.up_column = gate_cols;
  b.low_gate_column = gate_cols + inner;
  b.low_up_column = b.low_gate_column + lora.gate.padded_rank();
  b.grads = w.grads.floats(kernels, slots, b.low_up_column + lora.up.padded_rank());
  b.d_low_down = w.d_low_down.floats(kernels, slots, lora.down.padded_rank());
  b.low_gate = w.low_gate.floats(kernels, slots, lora.gate.padded_rank());
  b.low_up = w.low_up.floats(kernels, slots, lora.up.padded_rank());
  b.low_down = w.low_down.floats(kernels, slots, lora.down.padded_rank());
  const int64_t blocks = inner / kBlockRows;
  b.weight_parts = reinterpret_cast<float*>(w.weight_parts.at_least(blocks * slots * 4 + kLine));
  const int64_t scratch_bytes = round_up(block_scratch_bytes(std::max(b.grad_out.cols, b.low_gate_column)), 4096);
  uint8_t* scratch = w.scratch.at_least(scratch_bytes * threads);

  stage_rows(kernels, layer.in, batch.grad_out, batch.grad_out_dtype, layer.hidden, layer.hidden, batch.tokens, b.grad_out);
  stage_rows(kernels, layer.in, batch.x, batch.x_dtype, layer.hidden, layer.hidden, batch.tokens, b.x);
  parallel(active, [&](int64_t i, int) {
    if (lora.down.rank)
      kernels.low_rank(lora.down, routing.experts[i], layer.intermediate, layer.hidden, true, b.grad_out, routing.by_token(i), b.d_low_down, 0);
  });

  std::vector<Product> products(active);
  for (int64_t i = 0; i < active; i++) {
    Product& product = products[i] = down_of(layer, routing.experts[i]);
    product.transposed = true;
    product.lora[0] = {&lora.down, b.d_low_down, false};
    product.x = b.grad_out;
    product.tokens = routing.by_token(i);
    product.slopes = {&layer.activation, layer.has_gate, &b};
  }
  multiply_each(kernels, products, scratch, scratch_bytes);
  weight_gradients(layer, routing, b, batch, blocks);

  const Staged d_gate = columns(b.grads, 0, inner), d_up = columns(b.grads, b.up_column, inner);
  parallel(active, [&](int64_t i, int) {
    const int64_t e = routing.experts[i], H = layer.hidden, I = layer.intermediate;
    const Tokens by_token = routing.by_token(i), by_slot = routing.within_hidden(i);
    if (lora.gate.rank) {
      kernels.low_rank(lora.gate, e, H, I, true, d_gate, by_slot, b.grads, b.low_gate_column);
      kernels.low_rank(lora.gate, e, H, I, false, b.x, by_token, b.low_gate, 0);
    }
    if (lora.up.rank) {
      kernels.low_rank(lora.up, e, H, I, true, d_up, by_slot, b.grads, b.low_up_column);
      kernels.low_rank(lora.up, e, H, I, false, b.x, by_token, b.low_up, 0);
    }
    if (lora.down.rank) kernels.low_rank(lora.down, e, I, H, false, b.hidden, by_slot, b.low_down, 0);
  });

  for (int64_t i = 0; i < active; i++) {
    Product& product = products[i] = gate_up_of(layer, routing.experts[i]);
    product.transposed = true;
    product.lora[0] = {&lora.gate, columns(b.grads, b.low_gate_column, lora.gate.padded_rank()), true};
    product.lora[1] = {&lora.up, columns(b.grads, b.low_up_column, lora.up.padded_rank()), true};
    product.x = columns(b.grads, 0, b.low_gate_column);
    product.tokens = routing.within_result(i);
  }
  const Target target{batch.tokens, layer.hidden, batch.grad_x, batch.grad_x_dtype};
  multiply_sums(kernels, {{products.data(), active, target}}, w.result, scratch, scratch_bytes);

  std::vector<LoraGradient> wanted;
  const std::pair<LoraGradient, const void*> all[] = {
      {LoraGradient::gate_a, lora.gate.grad_a}, {LoraGradient::gate_b, lora.gate.grad_b}, {LoraGradient::up_a, lora.shared_a ? nullptr : lora.up.grad_a},
      {LoraGradient::up_b, lora.up.grad_b},     {LoraGradient::down_a, lora.down.grad_a}, {LoraGradient::down_b, lora.down.grad_b}};
  for (const auto& [which, grad] : all)
    if (grad) wanted.push_back(which);
  const int64_t kinds = static_cast<int64_t>(wanted.size());
  parallel(active * kinds, [&](int64_t item, int) {
    const int64_t i = item / kinds;
    kernels.lora_gradient(layer, routing.experts[i], wanted[item % kinds], routing.by_token(i), b);
  });
}

}  // namespace coterie
