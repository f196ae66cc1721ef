#include "layer/step.h"

#include <chrono>
#include <cstring>
#include <vector>

#include "layer/values.h"

namespace coterie {
namespace {

// A norm's weight as floats.
std::vector<float> weight_of(const RmsNorm& norm, int64_t count) {
  if (!norm.weight) return {};
  std::vector<float> values(count);
  for (int64_t i = 0; i < count; i++)
    values[i] = value_at(norm.weight, norm.weight_dtype, i) + (norm.from_one ? 1.0f : 0.0f);
  return values;
}

// All heads of one kind, of every sequence, in rows `stride` bytes apart, to where `place` says.
template <class Place>
void turn_heads(const Kernels& kernels, const Step& s, const RmsNorm& norm, bool whole, const uint8_t* rows, int64_t heads, int64_t stride, const Place& place) {
  const std::vector<float> weight = weight_of(norm, whole ? heads * s.key_dim : s.key_dim);
  std::vector<float> scratch(2 * s.key_dim);
  for (int64_t b = 0; b < s.sequences; b++) {
    const uint8_t* row = rows + b * heads * stride;
    float scale = norm.weight && whole ? inverse_rms(norm.epsilon, row, s.dtype, heads * s.key_dim) : 1.0f;
    for (int64_t h = 0; h < heads; h++) {
      const uint8_t* from = row + h * stride;
      if (norm.weight && !whole) scale = inverse_rms(norm.epsilon, from, s.dtype, s.key_dim);
      const float* own = weight.empty() ? nullptr : weight.data() + (whole ? h * s.key_dim : 0);
      kernels.turn({from, place(b, h), s.dtype, s.key_dim, s.turned, scale, own, s.cos + b * s.angle_bytes, s.sin + b * s.angle_bytes, s.twin}, scratch.data());
    }
  }
}

uint8_t* place_in(const CacheMemory& cache, int64_t sequence, int64_t head, int64_t position) {
  return cache.data + sequence * cache.sequence + head * cache.head + position * cache.position;
}

// Rows of x behind the norm, kept in `normed`; without one as they are.
Strided normed_input(const RmsNorm& norm, const Strided& x, int64_t rows, int64_t cols, std::vector<uint8_t>& normed) {
  if (!norm.weight) return x;
  normed.resize(rows * cols * element_bytes(x.dtype));
  rms_norm(norm, x.data, x.dtype, rows, cols, normed.data());
  return {normed.data(), x.dtype, cols};
}

// to += x
void add(const void* x, DType dtype, int64_t count, void* to) {
  for (int64_t i = 0; i < count; i++) put_value(to, dtype, i, value_at(to, dtype, i) + value_at(x, dtype, i));
}

Heads heads_of(const CacheMemory& cache) { return {cache.data, cache.sequence, cache.head, cache.position}; }

// x *= sigmoid(gates)
void gate(const void* gates, DType dtype, int64_t count, void* x) {
  for (int64_t i = 0; i < count; i++) put_value(x, dtype, i, value_at(x, dtype, i) * sigmoid_of(value_at(gates, dtype, i), dtype));
}

// A head, or what is beside a latent, to a position.
void turn_to(const Kernels& kernels, const LatentStep& s, Halves halves, int64_t sequence, const uint8_t* from, uint8_t* to) {
  const DType dtype = s.attention.dtype;
  const int64_t dim = s.attention.turned_dim, half = dim / 2;
  std::vector<uint8_t> apart(dim * element_bytes(dtype));
  std::vector<float> scratch(2 * dim);
  for (int64_t i = 0; i < half; i++)
    for (int64_t second = 0; second < 2; second++)
      put_value(apart.data(), dtype, i + second * half, value_at(from, dtype, halves == Halves::apart ? i + second * half : 2 * i + second));
  const int64_t angles = sequence * s.angle_bytes;
  kernels.turn({apart.data(), apart.data(), dtype, dim, dim, 1.0f, nullptr, s.cos + angles, s.sin + angles, s.twin}, scratch.data());
  for (int64_t i = 0; i < half; i++)
    for (int64_t second = 0; second < 2; second++)
      put_value(to, dtype, halves == Halves::kept_pairs ? 2 * i + second : i + second * half, value_at(apart.data(), dtype, i + second * half));
}

float dot(const void* a, const void* b, DType dtype, int64_t count) {
  float sums[kPanelRows] = {}, sum = 0.0f;
  int64_t i = 0;
  for (; i + kPanelRows <= count; i += kPanelRows)
    for (int64_t k = i; k < i + kPanelRows; k++) sums[k - i] += value_at(a, dtype, k) * value_at(b, dtype, k);
  for (; i < count; i++) sum += value_at(a, dtype, i) * value_at(b, dtype, i);
  for (const float s : sums) sum += s;
  return sum;
}

}  // namespace

double attention_step(const Kernels& kernels, const StepWeights& weights, const Step& s, void* out) {
  const int64_t size = element_bytes(s.dtype), heads = s.kv_heads * s.group, key_bytes = s.key_dim * size, value_bytes = s.value_dim * size;
  const int64_t query_bytes = weights.gated ? 2 * key_bytes : key_bytes;
  std::vector<uint8_t> queries(s.sequences * heads * query_bytes), keys(s.sequences * s.kv_heads * key_bytes), values(s.sequences * s.kv_heads * value_bytes),
      attended(s.sequences * heads * value_bytes);
  const int64_t inputs = weights.queries->layout.cols;
  std::vector<uint8_t> normed;
  const Strided x = normed_input(weights.norm, s.x, s.sequences, inputs, normed);
  linears({weights.queries, weights.keys, weights.values}, kernels, s.sequences, x, {queries.data(), keys.data(), values.data()}, s.dtype, weights.integer);
  turn_heads(kernels, s, weights.query_norm, weights.whole, queries.data(), heads, query_bytes,
             [&](int64_t b, int64_t h) { return queries.data() + (b * heads + h) * query_bytes; });
  turn_heads(kernels, s, weights.key_norm, weights.whole, keys.data(), s.kv_heads, key_bytes, [&](int64_t b, int64_t h) { return place_in(s.keys, b, h, s.cached); });
  for (int64_t b = 0; b < s.sequences; b++)
    for (int64_t h = 0; h < s.kv_heads; h++) memcpy(place_in(s.values, b, h, s.cached), values.data() + (b * s.kv_heads + h) * value_bytes, value_bytes);
  const Attention attention{s.sequences,   s.kv_heads, s.group, s.cached + 1, s.key_dim, s.value_dim, s.dtype, {queries.data(), heads * query_bytes, query_bytes, 0},
                            heads_of(s.keys), heads_of(s.values), s.mask, s.mask_stride, s.scale, s.sinks, {}, 0};
  const auto begun = std::chrono::steady_clock::now();
  attend(kernels, attention, attended.data());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  for (int64_t i = 0; weights.gated && i < s.sequences * heads; i++)
    gate(queries.data() + i * query_bytes + key_bytes, s.dtype, s.value_dim, attended.data() + i * value_bytes);
  linear(*weights.output, kernels, s.sequences, {attended.data(), s.dtype, heads * s.value_dim}, out, s.dtype, weights.output_integer);
  if (weights.norm.weight) add(s.x.data, s.dtype, s.sequences * inputs, out);
  return took.count();
}

double latent_step(const Kernels& kernels, const LatentWeights& weights, const LatentStep& s, void* out) {
  LatentAttention a = s.attention;
  const int64_t size = element_bytes(a.dtype), inputs = weights.latents->layout.cols, sequences = a.sequences;
  const int64_t query_bytes = (a.key_dim + a.turned_dim) * size, latent_bytes = (a.rank + a.turned_dim) * size, attended_cols = a.heads * a.value_dim;
  std::vector<uint8_t> queries(sequences * a.heads * query_bytes), latents(sequences * latent_bytes), attended(sequences * attended_cols * size);
  std::vector<uint8_t> normed;
  const Strided x = normed_input(weights.norm, s.x, sequences, inputs, normed);
  if (const Linear* first = weights.query_latents) {
    const int64_t cols = first->layout.rows;
    std::vector<uint8_t> made(sequences * cols * size), of_queries(made.size());
    linears({first, weights.latents}, kernels, sequences, x, {made.data(), latents.data()}, a.dtype, weights.integer);
    rms_norm(weights.query_norm, made.data(), a.dtype, sequences, cols, of_queries.data());
    linear(*weights.queries, kernels, sequences, {of_queries.data(), a.dtype, cols}, queries.data(), a.dtype, weights.queries_integer);
  } else {
    linears({weights.queries, weights.latents}, kernels, sequences, x, {queries.data(), latents.data()}, a.dtype, weights.integer);
  }
  for (int64_t b = 0; b < sequences; b++) {
    const uint8_t* row = latents.data() + b * latent_bytes;
    rms_norm(weights.latent_norm, row, a.dtype, 1, a.rank, place_in(s.latents, b, 0, s.cached));
    turn_to(kernels, s, weights.halves, b, row + a.rank * size, place_in(s.turned, b, 0, s.cached));
    for (int64_t h = 0; h < a.heads; h++) {
      uint8_t* query = queries.data() + (b * a.heads + h) * query_bytes + a.key_dim * size;
      turn_to(kernels, s, weights.halves, b, query, query);
    }
  }
  a.positions = s.cached + 1;
  a.queries = {queries.data(), a.heads * query_bytes, query_bytes, 0};
  a.latents = heads_of(s.latents), a.turned = heads_of(s.turned);
  const auto begun = std::chrono::steady_clock::now();
  attend_latents(kernels, a, attended.data());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  linear(*weights.output, kernels, sequences, {attended.data(), a.dtype, attended_cols}, out, a.dtype, weights.output_integer);
  if (weights.norm.weight) add(s.x.data, a.dtype, sequences * inputs, out);
  return took.count();
}

double delta_step(const Kernels& kernels, const DeltaStep& step, DeltaTokens d, const void* x, void* out) {
  const int64_t size = element_bytes(d.dtype), hidden = step.projections[0]->layout.cols;
  std::vector<uint8_t> normed(d.sequences * hidden * size), attended(d.sequences * d.values() * size);
  rms_norm(step.norm, x, d.dtype, d.sequences, hidden, normed.data());
  std::vector<std::vector<uint8_t>> made;
  std::vector<void*> to;
  for (const Linear* projection : step.projections) to.push_back(made.emplace_back(d.sequences * projection->layout.rows * size).data());
  linears(step.projections, kernels, d.sequences, {normed.data(), d.dtype, hidden}, to, d.dtype, step.integer);
  d.mixed = made[0].data(), d.betas = made[d.by_head ? 1 : 2].data();
  if (!d.by_head) d.gates = made[1].data(), d.steps = made[3].data();
  const auto begun = std::chrono::steady_clock::now();
  delta_rule(kernels, d, attended.data());
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begun;
  linear(*step.output, kernels, d.sequences, {attended.data(), d.dtype, d.values()}, out, d.dtype, step.output_integer);
  add(x, d.dtype, d.sequences * hidden, out);
  return took.count();
}

void experts_step(const Kernels& kernels, const Experts& layer, const ExpertsStep& step, const void* x, DType dtype, int64_t tokens, void* out) {
  const int64_t size = element_bytes(dtype), chosen = tokens * step.router.top_k;
  std::vector<uint8_t> normed(tokens * layer.hidden * size), logits(tokens * step.router.experts * (step.router.wide ? 4 : size));
  std::vector<float> weights(chosen);
  std::vector<int64_t> ids(chosen);
  rms_norm(step.norm, x, dtype, tokens, layer.hidden, normed.data());
  route(kernels, step.router, normed.data(), dtype, tokens, logits.data(), weights.data(), ids.data());
  for (float& weight : weights) weight = step.rounded_weights ? rounded(weight, dtype) : weight;
  forward(layer, kernels, {tokens, step.router.top_k, normed.data(), dtype, layer.hidden, ids.data(), weights.data(), out, dtype, step.integer}, nullptr);
  if (const SharedExpert* shared = step.shared) {
    std::vector<uint8_t> beside(normed.size());
    weights.assign(tokens, 1.0f), ids.assign(tokens, 0);
    for (int64_t t = 0; shared->score && t < tokens; t++)
      weights[t] = sigmoid_of(rounded(dot(normed.data() + t * layer.hidden * size, shared->score, dtype, layer.hidden), dtype), dtype);
    forward(shared->layer, kernels, {tokens, 1, normed.data(), dtype, layer.hidden, ids.data(), weights.data(), beside.data(), dtype, shared->integer}, nullptr);
    add(beside.data(), dtype, tokens * layer.hidden, out);
  }
  add(x, dtype, tokens * layer.hidden, out);
}

}  // namespace coterie
