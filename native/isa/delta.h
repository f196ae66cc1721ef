// Linear attention by the gated delta rule, of one head and some tokens (see layer/delta.h). What has no other form is plain C for the compiler to vectorise.
#pragma once
#include <cmath>
#include <cstring>

#include "formats/bfloat16.h"
#include "isa/activation.h"
#include "isa/kernels.h"

namespace coterie {
namespace {

template <class Isa>
struct Delta {
  using F = typename Isa::F;

  static void widen(const uint8_t* from, DType dtype, int64_t count, float* __restrict to) {
    if (dtype == DType::f32)
      memcpy(to, from, count * 4);
    else
      for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(from)[i]);
  }

  // As values of that type are.
  static void round_row(float* row, int64_t count, DType dtype) {
    if (dtype == DType::bf16)
      for (int64_t i = 0; i < count; i++) row[i] = bf16_to_float(float_to_bf16(row[i]));
  }

  static float sum_of_squares(const float* row, int64_t count) {
    float sums[kLanes] = {}, sum = 0.0f;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes)
      for (int k = 0; k < kLanes; k++) sums[k] += row[i + k] * row[i + k];
    for (; i < count; i++) sum += row[i] * row[i];
    for (const float s : sums) sum += s;
    return sum;
  }

  static void scale_row(float* row, int64_t count, float by) {
    for (int64_t i = 0; i < count; i++) row[i] *= by;
  }

  static void convolve(const HeadChannels& c) {
    const int64_t element = c.dtype == DType::f32 ? 4 : 2;
    for (int64_t t = -c.seen; t < c.tokens; t++) widen(c.from + t * c.stride * element, c.dtype, c.dim, c.rows + (c.taps - 1 + t) * c.dim);
    for (int64_t t = 0; t < c.tokens; t++) {
      float* __restrict to = c.to + t * c.dim;
      for (int64_t i = 0; i < c.dim; i++) to[i] = c.bias ? c.bias[i] : 0.0f;
      for (int64_t tap = 0; tap < c.taps; tap++) {
        const float *x = c.rows + (t + tap) * c.dim, *weight = c.weights + tap * c.dim;
        for (int64_t i = 0; i < c.dim; i++) to[i] += weight[i] * x[i];
      }
      round_row(to, c.dim, c.dtype);
      for (int64_t i = 0; i < c.dim; i++) to[i] = to[i] * sigmoid(to[i]);
      round_row(to, c.dim, c.dtype);
      if (c.length > 0.0f) scale_row(to, c.dim, c.length / std::sqrt(sum_of_squares(to, c.dim) + kSmallestSquare));
    }
  }

  // Columns of a state: a register's 16 lanes, or as many of them as leave room for the sums of an even and an odd row.
  static constexpr int kVectors = Isa::kRegistersPerVector == 1 ? 2 : 1;

  // state = decay state + key x change, whose products with `query` and `next` are added up, over all rows.
  template <int Vectors>
  struct Strip {
    F change[Vectors], by_query[Vectors], by_next[Vectors];

    void advance(float* state, int64_t stride, int64_t rows, float decay, const float* key, const float* query, const float* next) {
      F odd_query[Vectors], odd_next[Vectors];
      const F kept = Isa::set1(decay);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; v++) by_query[v] = by_next[v] = odd_query[v] = odd_next[v] = Isa::zero();
      const auto row = [&](int64_t r, F(&queried)[Vectors], F(&nexted)[Vectors]) {
        const F k = Isa::set1(key[r]), q = Isa::set1(query[r]), n = Isa::set1(next[r]);
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; v++) {
          float* const at = state + r * stride + v * kLanes;
          const F now = Isa::fma(k, change[v], Isa::mul(Isa::load(at), kept));
          Isa::store(at, now);
          queried[v] = Isa::fma(q, now, queried[v]);
          nexted[v] = Isa::fma(n, now, nexted[v]);
        }
      };
      int64_t r = 0;
      for (; r + 2 <= rows; r += 2) row(r, by_query, by_next), row(r + 1, odd_query, odd_next);
      if (r < rows) row(r, by_query, by_next);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; v++) by_query[v] = Isa::add(by_query[v], odd_query[v]), by_next[v] = Isa::add(by_next[v], odd_next[v]);
    }
  };

  // The rule for `Vectors` times 16 columns of a state [key_dim][stride]: each pass over it takes in a token and reads what the next one asks for.
  template <int Vectors>
  static void rule_of(const DeltaHead& d, float* state, int64_t stride, int64_t column) {
    Strip<Vectors> strip;
    for (F& change : strip.change) change = Isa::zero();
    for (int64_t t = 0; t <= d.tokens; t++) {
      const int64_t last = t > 0 ? t - 1 : 0, next = t < d.tokens ? t : d.tokens - 1;
      strip.advance(state, stride, d.key_dim, t > 0 ? d.decays[last] : 1.0f, d.keys + last * d.key_dim, d.queries + last * d.key_dim,
                    d.keys + next * d.key_dim);
      for (int v = 0; v < Vectors; v++) {
        const int64_t at = column + v * kLanes;
        if (t > 0) Isa::store(d.out + last * d.value_dim + at, strip.by_query[v]);
        if (t == d.tokens) continue;
        const F expected = Isa::mul(strip.by_next[v], Isa::set1(-d.decays[t]));
        strip.change[v] = Isa::mul(Isa::add(Isa::load(d.values + t * d.value_dim + at), expected), Isa::set1(d.betas[t]));
      }
    }
  }

  // Many passes are over a copy of the columns: they lie far apart in a state, at addresses that share few sets of a cache.
  template <int Vectors>
  static void columns(const DeltaHead& d, int64_t column, float* scratch) {
    constexpr int64_t kWidth = Vectors * kLanes;
    float* const state = d.state + column;
    if (d.tokens < kFewPasses) return rule_of<Vectors>(d, state, d.value_dim, column);
    for (int64_t r = 0; r < d.key_dim; r++) memcpy(scratch + r * kWidth, state + r * d.value_dim, kWidth * 4);
    rule_of<Vectors>(d, scratch, kWidth, column);
    for (int64_t r = 0; r < d.key_dim; r++) memcpy(state + r * d.value_dim, scratch + r * kWidth, kWidth * 4);
  }

  static constexpr int64_t kFewPasses = 4;

  static void rule(const DeltaHead& d, float* scratch) {
    int64_t column = 0;
    for (; column + kVectors * kLanes <= d.value_dim; column += kVectors * kLanes) columns<kVectors>(d, column, scratch);
    for (; column < d.value_dim; column += kLanes) columns<1>(d, column, scratch);
    gate(d, scratch);
  }

  // norm(out) * silu(gate), rounded where the models round.
  static void gate(const DeltaHead& d, float* __restrict gates) {
    const int64_t element = d.dtype == DType::f32 ? 4 : 2;
    for (int64_t t = 0; t < d.tokens; t++) {
      float* __restrict out = d.out + t * d.value_dim;
      round_row(out, d.value_dim, d.dtype);
      scale_row(out, d.value_dim, 1.0f / std::sqrt(sum_of_squares(out, d.value_dim) / static_cast<float>(d.value_dim) + d.epsilon));
      round_row(out, d.value_dim, d.dtype);
      for (int64_t i = 0; i < d.value_dim; i++) out[i] *= d.norm[i];
      round_row(out, d.value_dim, d.dtype);
      widen(d.gates + t * d.gate_stride * element, d.dtype, d.value_dim, gates);
      for (int64_t i = 0; i < d.value_dim; i++) out[i] *= gates[i] * sigmoid(gates[i]);
      Engine<Isa>::store(out, d.value_dim, d.to + t * d.to_stride * element, d.dtype);
    }
  }
};

}  // namespace
}  // namespace coterie
