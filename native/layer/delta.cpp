#include "layer/delta.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "layer/values.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

constexpr int64_t kBlock = 64;  // tokens at a time: their channels as floats, and what a thread has of a head, stay in L2

float softplus(float x) { return x > 20.0f ? x : std::log1p(std::exp(x)); }

// A head's queries, keys or values: its first channel, and where it is in a row of `mixed`.
struct Channels {
  int64_t first, at, dim;
  float length;

  Channels(const DeltaTokens& d, int64_t number) {
    const int64_t each = d.value_heads / d.key_heads, group = 2 * d.key_dim + 2 * each * d.value_dim;
    if (number < 2 * d.key_heads) {
      const bool is_key = number >= d.key_heads;
      first = number * d.key_dim, dim = d.key_dim, length = is_key ? 1.0f : 1.0f / std::sqrt(static_cast<float>(d.key_dim));
      at = d.by_head ? number % d.key_heads * group + (is_key ? d.key_dim : 0) : first;
    } else {
      const int64_t head = number - 2 * d.key_heads;
      first = 2 * d.keys() + head * d.value_dim, dim = d.value_dim, length = 0.0f;
      at = d.by_head ? head / each * group + 2 * d.key_dim + head % each * d.value_dim : first;
    }
  }
};

// Tokens [begin, begin + count) of a sequence, on their way through.
struct Span {
  const DeltaTokens& d;
  const Kernels& kernels;
  int64_t begin, count;
  float* channels;  // [sequences][heads of queries | of keys | of values][count][dim]: rows of one head lie together, or they share few sets of a cache

  const uint8_t* row(int64_t sequence) const { return d.mixed + (sequence * d.tokens + begin) * d.width() * element_bytes(d.dtype); }
  float* channels_at(int64_t sequence, int64_t first) const { return channels + (sequence * d.channels() + first) * count; }

  void convolve(int64_t sequence, int64_t number) const {
    const Channels c(d, number);
    const int64_t element = element_bytes(d.dtype), before = d.taps - 1, seen = std::min(before, begin);
    std::vector<float> rows((before + count) * c.dim), weights(d.taps * c.dim);
    uint8_t* const window = d.window + (sequence * d.channels() + c.first) * d.positions * element;
    for (int64_t t = 0; t < before - seen; t++)
      for (int64_t i = 0; i < c.dim; i++) rows[t * c.dim + i] = value_at(window, d.dtype, (i + 1) * d.positions - before + seen + t);
    for (int64_t tap = 0; tap < d.taps; tap++)
      for (int64_t i = 0; i < c.dim; i++) weights[tap * c.dim + i] = value_at(d.convolution, d.convolution_dtype, (c.first + i) * d.taps + tap);
    const uint8_t* const from = row(sequence) + c.at * element;
    kernels.convolve({count, c.dim, d.taps, from, d.width(), seen, d.dtype, rows.data(), weights.data(), d.convolution_bias ? d.convolution_bias + c.first : nullptr,
                      c.length, channels_at(sequence, c.first)});
    if (begin + count == d.tokens) slide(window, c, from);
  }

  // The last block's: a window of what came in last. `from`: these channels of the block's first token.
  void slide(uint8_t* window, const Channels& c, const uint8_t* from) const {
    const int64_t element = element_bytes(d.dtype), fresh = std::min(d.positions, d.tokens), kept = d.positions - fresh;
    for (int64_t i = 0; i < c.dim; i++, window += d.positions * element) {
      memmove(window, window + fresh * element, kept * element);
      for (int64_t p = 0; p < fresh; p++) memcpy(window + (kept + p) * element, from + ((count - fresh + p) * d.width() + i) * element, element);
    }
  }

  void recur(int64_t sequence, int64_t head, uint8_t* out) const {
    const int64_t each = d.value_heads / d.key_heads, key_head = head / each, element = element_bytes(d.dtype);
    const int64_t width = (d.by_head ? 2 : 1) * d.value_heads, beta_at = d.by_head ? key_head * 2 * each + head % each : head;
    const int64_t step_at = d.by_head ? beta_at + each : head;
    std::vector<float> decays(count), betas(count);
    for (int64_t t = 0; t < count; t++) {
      const int64_t at = (sequence * d.tokens + begin + t) * width;
      const float step = value_at(d.by_head ? d.betas : d.steps, d.dtype, at + step_at) + d.step_bias[head];
      decays[t] = std::exp(-std::exp(d.log_rates[head]) * softplus(step));
      betas[t] = sigmoid_of(value_at(d.betas, d.dtype, at + beta_at), d.dtype);
    }
    std::vector<float> results(count * d.value_dim);
    DeltaHead h{};
    h.tokens = count, h.key_dim = d.key_dim, h.value_dim = d.value_dim, h.dtype = d.dtype;
    h.queries = channels_at(sequence, key_head * d.key_dim), h.keys = channels_at(sequence, d.keys() + key_head * d.key_dim);
    h.values = channels_at(sequence, 2 * d.keys() + head * d.value_dim);
    h.decays = decays.data(), h.betas = betas.data(), h.out = results.data();
    h.state = d.state + (sequence * d.value_heads + head) * d.key_dim * d.value_dim;
    const int64_t first_gate = d.by_head ? Channels(d, 2 * d.key_heads + head).at + each * d.value_dim : head * d.value_dim;
    h.gate_stride = d.by_head ? d.width() : d.values();
    h.gates = (d.by_head ? d.mixed : d.gates) + ((sequence * d.tokens + begin) * h.gate_stride + first_gate) * element;
    h.norm = d.norm, h.epsilon = d.epsilon, h.to_stride = d.values();
    h.to = out + ((sequence * d.tokens + begin) * d.values() + head * d.value_dim) * element;
    std::vector<float> scratch(h.scratch_floats());
    kernels.delta_rule(h, scratch.data());
  }
};

}  // namespace

void delta_rule(const Kernels& kernels, const DeltaTokens& d, void* out) {
  std::vector<float> channels(d.sequences * std::min(d.tokens, kBlock) * d.channels());
  const int64_t parts = 2 * d.key_heads + d.value_heads;
  for (int64_t begin = 0; begin < d.tokens; begin += kBlock) {
    const Span span{d, kernels, begin, std::min(kBlock, d.tokens - begin), channels.data()};
    parallel(d.sequences * parts, [&](int64_t item, int) { span.convolve(item / parts, item % parts); });
    parallel(d.sequences * d.value_heads, [&](int64_t item, int) { span.recur(item / d.value_heads, item % d.value_heads, static_cast<uint8_t*>(out)); });
  }
}

}  // namespace coterie
