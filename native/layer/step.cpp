#include "layer/step.h"

#include <chrono>
#include <cstring>
#include <vector>

#include "formats/bfloat16.h"

namespace coterie {
namespace {

// A norm's weight as floats.
std::vector<float> weight_of(const RmsNorm& norm, int64_t count) {
  if (!norm.weight) return {};
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; i++)
    values[i] = (norm.weight_dtype == DType::bf16 ? bf16_to_float(static_cast<const uint16_t*>(norm.weight)[i]) : static_cast<const float*>(norm.weight)[i]) +
                (norm.from_one ? 1.0f : 0.0f);
  return values;
}

// All heads of one kind, of every sequence, in rows one behind the other, to where `place` says.
template <class Place>
void turn_heads(const Kernels& kernels, const Step& s, const RmsNorm& norm, bool whole, const uint8_t* rows, int64_t heads, const Place& place) {
  const int64_t head_bytes = s.key_dim * (s.dtype == DType::f32 ? 4 : 2);
  const std::vector<float> weight = weight_of(norm, whole ? heads * s.key_dim : s.key_dim);
  std::vector<float> scratch(2 * s.key_dim);
  for (int64_t b = 0; b < s.sequences; b++) {
    const uint8_t* row = rows + b * heads * head_bytes;
    float scale = norm.weight && whole ? inverse_rms(norm.epsilon, row, s.dtype, heads * s.key_dim) : 1.0f;
    for (int64_t h = 0; h < heads; h++) {
      const uint8_t* from = row + h * head_bytes;
      if (norm.weight && !whole) scale = inverse_rms(norm.epsilon, from, s.dtype, s.key_dim);
      const float* own = weight.empty() ? nullptr : weight.data() + (whole ? h * s.key_dim : 0);
      kernels.turn({from, place(b, h), s.dtype, s.key_dim, s.turned, scale, own, s.cos + b * s.angle_bytes, s.sin + b * s.angle_bytes, s.twin}, scratch.data());
    }
  }
}

uint8_t* place_in(const CacheMemory& cache, int64_t sequence, int64_t head, int64_t position) {
  return cache.data + sequence * cache.sequence + head * cache.head + position * cache.position;
}

// to += x
void add(const void* x, DType dtype, int64_t count, void* to) {
  if (dtype == DType::f32) {
    for (int64_t i = 0; i < count; i++) static_cast<float*>(to)[i] += static_cast<const float*>(x)[i];
    return;
  }
  const auto* from = static_cast<const uint16_t*>(x);
  auto* sum = static_cast<uint16_t*>(to);
  for (int64_t i = 0; i < count; i++) sum[i] = float_to_bf16(bf16_to_float(from[i]) + bf16_to_float(sum[i]));
}

Heads heads_of(const CacheMemory& cache) { return {cache.data, cache.sequence, cache.head, cache.position}; }

}  // namespace

double attention_step(const Kernels& kernels, const StepWeights& weights, const Step& s, void* out) {
  const int64_t size = s.dtype == DType::f32 ? 4 : 2, heads = s.kv_heads * s.group, key_bytes = s.key_dim * size, value_bytes = s.value_dim * size;
  std::vector<uint8_t> queries(s.sequences * heads * key_bytes), keys(s.sequences * s.kv_heads * key_bytes), values(s.sequences * s.kv_heads * value_bytes),
      attended(s.sequences * heads * value_bytes);
  const int64_t inputs = weights.queries->layout.cols;
  std::vector<uint8_t> normed(weights.norm.weight ? s.sequences * inputs * size : 0);
  Strided x = s.x;
  if (weights.norm.weight) {
    rms_norm(weights.norm, s.x.data, s.dtype, s.sequences, inputs, normed.data());
    x = {normed.data(), s.dtype, inputs};
  }
  linears({weights.queries, weights.keys, weights.values}, kernels, s.sequences, x, {queries.data(), keys.data(), values.data()}, s.dtype, weights.integer);
  turn_heads(kernels, s, weights.query_norm, weights.whole, queries.data(), heads,
             [&](int64_t b, int64_t h) { return queries.data() + (b * heads + h) * key_bytes; });
  turn_heads(kernels, s, weights.key_norm, weights.whole, keys.data(), s.kv_heads, [&](int64_t b, int64_t h) { return place_in(s.keys, b, h, s.cached); });
  for (int64_t b = 0; b < s.sequences; b++)
    for (int64_t h = 0; h < s.kv_heads; h++) memcpy(place_in(s.values, b, h, s.cached), values.data() + (b * s.kv_heads + h) * value_bytes, value_bytes);
  const Attention attention{s.sequences,   s.kv_heads, s.group, s.cached + 1, s.key_dim, s.value_dim, s.dtype, {queries.data(), heads * key_bytes, key_bytes, 0},
                            heads_of(s.keys), heads_of(s.values), s.mask, s.mask_stride, s.scale, s.sinks};
  const auto begun = std::chrono::steady_clock::now();
  attend(kernels, attention, attended.data());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  linear(*weights.output, kernels, s.sequences, {attended.data(), s.dtype, heads * s.value_dim}, out, s.dtype, weights.output_integer);
  if (weights.norm.weight) add(s.x.data, s.dtype, s.sequences * inputs, out);
  return took.count();
}

void experts_step(const Kernels& kernels, const Experts& layer, const ExpertsStep& step, const void* x, DType dtype, int64_t tokens, void* out) {
  const int64_t size = dtype == DType::f32 ? 4 : 2, chosen = tokens * step.router.top_k;
  std::vector<uint8_t> normed(tokens * layer.hidden * size), logits(tokens * step.router.experts * size);
  std::vector<float> weights(chosen);
  std::vector<int64_t> ids(chosen);
  rms_norm(step.norm, x, dtype, tokens, layer.hidden, normed.data());
  route(kernels, step.router, normed.data(), dtype, tokens, logits.data(), weights.data(), ids.data());
  if (step.rounded_weights && dtype == DType::bf16)
    for (float& weight : weights) weight = bf16_to_float(float_to_bf16(weight));
  forward(layer, kernels, {tokens, step.router.top_k, normed.data(), dtype, layer.hidden, ids.data(), weights.data(), out, dtype, step.integer}, nullptr);
  add(x, dtype, tokens * layer.hidden, out);
}

}  // namespace coterie
