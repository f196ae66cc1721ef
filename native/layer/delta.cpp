#include "layer/delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "formats/bfloat16.h"
#include "layer/norm.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

constexpr int64_t kChannels = 512;   // of an item of the convolution
constexpr float kSmallest = 1e-6f;   // added to the square of a query's or key's length

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

float number(const uint8_t* at, DType dtype, int64_t i) {
  return dtype == DType::f32 ? reinterpret_cast<const float*>(at)[i] : bf16_to_float(reinterpret_cast<const uint16_t*>(at)[i]);
}

void put(uint8_t* at, DType dtype, int64_t i, float value) {
  if (dtype == DType::f32)
    reinterpret_cast<float*>(at)[i] = value;
  else
    reinterpret_cast<uint16_t*>(at)[i] = float_to_bf16(value);
}

float rounded(float value, DType dtype) { return dtype == DType::f32 ? value : bf16_to_float(float_to_bf16(value)); }
float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }
float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// Where in a row of `mixed` a channel, or the gate of a value, is.
int64_t channel_at(const DeltaStep& s, int64_t channel) {
  if (!s.by_head) return channel;
  const int64_t each = s.value_heads / s.key_heads * s.value_dim, group = 2 * s.key_dim + 2 * each;
  if (channel < 2 * s.keys()) {
    const int64_t kind = channel / s.keys(), within = channel % s.keys();
    return within / s.key_dim * group + kind * s.key_dim + within % s.key_dim;
  }
  const int64_t value = channel - 2 * s.keys();
  return value / each * group + 2 * s.key_dim + value % each;
}

int64_t gate_at(const DeltaStep& s, int64_t value) {
  return s.by_head ? channel_at(s, 2 * s.keys() + value) + s.value_heads / s.key_heads * s.value_dim : value;
}

// Channels [begin, end) of a sequence: into the window, and what the convolution makes of it.
void convolve(const DeltaStep& s, int64_t sequence, int64_t begin, int64_t end, float* to) {
  const int64_t size = bytes_of(s.dtype), width = s.by_head ? s.channels() + s.values() : s.channels();
  const uint8_t* const row = s.mixed + sequence * width * size;
  for (int64_t c = begin; c < end; c++) {
    uint8_t* const window = s.window + (sequence * s.channels() + c) * s.positions * size;
    memmove(window, window + size, (s.positions - 1) * size);
    memcpy(window + (s.positions - 1) * size, row + channel_at(s, c) * size, size);
    float sum = s.convolution_bias ? s.convolution_bias[c] : 0.0f;
    for (int64_t i = 0; i < s.taps; i++)
      sum += number(s.convolution, s.convolution_dtype, c * s.taps + i) * number(window, s.dtype, s.positions - s.taps + i);
    sum = rounded(sum, s.dtype);
    to[c] = rounded(sum * sigmoid(sum), s.dtype);
  }
}

// A query or key of length `scale`.
void normalise(const float* from, int64_t count, float scale, float* to) {
  float squares = 0.0f;
  for (int64_t i = 0; i < count; i++) squares += from[i] * from[i];
  const float by = scale / std::sqrt(squares + kSmallest);
  for (int64_t i = 0; i < count; i++) to[i] = from[i] * by;
}

// The rule for 16 columns of a head's state [keys][stride]; decay * state + key x (value - key (decay * state)) * beta, and its product with the query.
void update(float* state, int64_t stride, int64_t keys, const float* query, const float* key, float query_key, const float* value, float decay, float beta,
            float* out) {
  float by_key[kPanelRows] = {}, by_query[kPanelRows] = {}, change[kPanelRows];
  for (int64_t k = 0; k < keys; k++)
    for (int v = 0; v < kPanelRows; v++) {
      by_key[v] += state[k * stride + v] * key[k];
      by_query[v] += state[k * stride + v] * query[k];
    }
  for (int v = 0; v < kPanelRows; v++) {
    change[v] = (value[v] - by_key[v] * decay) * beta;
    out[v] = by_query[v] * decay + query_key * change[v];
  }
  for (int64_t k = 0; k < keys; k++)
    for (int v = 0; v < kPanelRows; v++) state[k * stride + v] = state[k * stride + v] * decay + key[k] * change[v];
}

void head_of(const DeltaStep& s, int64_t sequence, int64_t head, const float* channels, uint8_t* to) {
  const int64_t each = s.value_heads / s.key_heads, key_head = head / each, size = bytes_of(s.dtype);
  const int64_t beta_at = s.by_head ? key_head * 2 * each + head % each : head, step_at = s.by_head ? beta_at + each : head;
  const int64_t row = sequence * (s.by_head ? 2 : 1) * s.value_heads;
  const float beta = rounded(sigmoid(number(s.betas, s.dtype, row + beta_at)), s.dtype);
  const float step = number(s.by_head ? s.betas : s.steps, s.dtype, row + step_at) + s.step_bias[head];
  const float decay = std::exp(-std::exp(s.log_rates[head]) * softplus(step));
  std::vector<float> query(s.key_dim), key(s.key_dim), out(s.value_dim);
  normalise(channels + key_head * s.key_dim, s.key_dim, 1.0f / std::sqrt(static_cast<float>(s.key_dim)), query.data());
  normalise(channels + s.keys() + key_head * s.key_dim, s.key_dim, 1.0f, key.data());
  float query_key = 0.0f;
  for (int64_t i = 0; i < s.key_dim; i++) query_key += query[i] * key[i];
  const float* const value = channels + 2 * s.keys() + head * s.value_dim;
  float* const state = s.state + (sequence * s.value_heads + head) * s.key_dim * s.value_dim;
  for (int64_t v = 0; v < s.value_dim; v += kPanelRows)
    update(state + v, s.value_dim, s.key_dim, query.data(), key.data(), query_key, value + v, decay, beta, out.data() + v);
  for (float& v : out) v = rounded(v, s.dtype);
  const float by = inverse_rms(s.epsilon, out.data(), DType::f32, s.value_dim);
  const int64_t width = s.by_head ? s.channels() + s.values() : s.values();
  const uint8_t* const gates = (s.by_head ? s.mixed : s.gates) + sequence * width * size;
  for (int64_t v = 0; v < s.value_dim; v++) {
    const float gate = number(gates, s.dtype, gate_at(s, head * s.value_dim + v));
    put(to, s.dtype, v, rounded(rounded(out[v] * by, s.dtype) * s.norm[v], s.dtype) * gate * sigmoid(gate));
  }
}

}  // namespace

void delta_step(const DeltaStep& s, void* out) {
  const int64_t channels = s.channels(), parts = (channels + kChannels - 1) / kChannels;
  std::vector<float> convolved(s.sequences * channels);
  parallel(s.sequences * parts, [&](int64_t item, int) {
    const int64_t sequence = item / parts, begin = item % parts * kChannels;
    convolve(s, sequence, begin, std::min(channels, begin + kChannels), convolved.data() + sequence * channels);
  });
  const int64_t bytes = s.value_dim * bytes_of(s.dtype);
  parallel(s.sequences * s.value_heads, [&](int64_t item, int) {
    const int64_t sequence = item / s.value_heads;
    head_of(s, sequence, item % s.value_heads, convolved.data() + sequence * channels, static_cast<uint8_t*>(out) + item * bytes);
  });
}

}  // namespace coterie
