// Packing one panel: 16 rows side by side as lanes, so that every loop over `lane` is one vector operation.
// Scales: docs/format.md says how they are chosen.
#pragma once
#include <cstdint>

#include "formats/bfloat16.h"
#include "isa/activation.h"
#include "isa/kernels.h"

// The bytes are the same on every CPU: no product and sum may be fused into one rounding where the instruction set happens to offer it.
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

constexpr int kLanes = kPanelRows;
using Lanes = float[kLanes];

inline float f16_to_float(uint16_t h) {
  const uint32_t sign = (h & 0x8000u) << 16, magnitude = h & 0x7fffu;
  const float normal = bits_to_float((magnitude << 13) + 0x38000000u);
  const float subnormal = static_cast<float>(magnitude) * 5.9604644775390625e-8f;
  const float special = bits_to_float(0x7f800000u | (magnitude << 13));
  const float value = magnitude < 0x400u ? subnormal : magnitude >= 0x7c00u ? special : normal;
  return bits_to_float(float_to_bits(value) | sign);
}

inline void load_row(const void* source, DType dtype, int64_t offset, int64_t count, float* to) {
  if (dtype == DType::f32) memcpy(to, static_cast<const float*>(source) + offset, count * 4);
  const uint16_t* half = static_cast<const uint16_t*>(source) + offset;
  if (dtype == DType::bf16)
    for (int64_t i = 0; i < count; i++) to[i] = bf16_to_float(half[i]);
  if (dtype == DType::f16)
    for (int64_t i = 0; i < count; i++) to[i] = f16_to_float(half[i]);
}

// values[column][lane], zero beyond the matrix.
inline void load_lanes(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, float* values) {
  constexpr int kChunk = 64;
  const int64_t cols = layout.padded_cols();
  float chunk[kLanes][kChunk];
  for (int64_t begin = 0; begin < cols; begin += kChunk) {
    const int64_t there = layout.cols - begin < kChunk ? layout.cols - begin : kChunk;
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t row = panel * kLanes + lane, count = row < layout.rows && there > 0 ? there : 0;
      if (count) load_row(source, dtype, row * stride + begin, count, chunk[lane]);
      for (int64_t i = count; i < kChunk; i++) chunk[lane][i] = 0.0f;
    }
    for (int i = 0; i < kChunk; i++)
      for (int lane = 0; lane < kLanes; lane++) values[(begin + i) * kLanes + lane] = chunk[lane][i];
  }
}

constexpr float kRound = 12582912.0f;  // adding it rounds to an integer, ties to even, for |x| < 2^22

inline float round_between(float x, float low, float high) {
  const float r = (x + kRound) - kRound;
  return r < low ? low : r > high ? high : r;
}

// As many lanes as an instruction takes, so that sums over columns stay in registers.
#ifdef __AVX512F__
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));

inline Vector load(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

inline void store(float* to, Vector v) { memcpy(to, &v, sizeof v); }

constexpr int kTogether = 3;  // candidates tried in one pass: their sums over columns fit in the registers

// For each candidate (inverse scale, zero point) per lane: the projection of w on its codes, <w,q>^2 / <q,q>, which the best candidate maximises
// (least squares error = <w,w> minus it), and the scale <w,q> / <q,q> that attains it.
inline void project(const float* values, int64_t count, const Lanes* inverse, const Lanes* zero, float levels, Lanes* gain, Lanes* scale) {
  for (int lane = 0; lane < kLanes; lane += kWidth) {
    Vector inv[kTogether], offset[kTogether], wq[kTogether] = {}, qq[kTogether] = {};
    for (int c = 0; c < kTogether; c++) inv[c] = load(&inverse[c][lane]), offset[c] = load(&zero[c][lane]);
    const Vector low = Vector{} + kRound, high = low + levels;  // codes are rounded, and bounded, with kRound on top of them: exact
    for (int64_t k = 0; k < count; k++) {
      const Vector w = load(values + k * kLanes + lane);
#pragma GCC unroll 3
      for (int c = 0; c < kTogether; c++) {
        const Vector rounded = w * inv[c] + offset[c] + kRound, raised = low > rounded ? low : rounded;
        const Vector q = (high < raised ? high : raised) - (low + offset[c]);
        wq[c] += w * q;
        qq[c] += q * q;
      }
    }
    for (int c = 0; c < kTogether; c++) {
      const Vector fitted = qq[c] > 0.0f ? wq[c] / qq[c] : Vector{};
      store(&scale[c][lane], fitted);
      store(&gain[c][lane], fitted * wq[c]);
    }
  }
}

// Keeps the scale and zero point of the first of the candidates that gains more than `best`.
inline void keep_best(const Lanes* gain, const Lanes* fitted, const Lanes* offset, Lanes& best, Lanes& scale, Lanes& zero) {
  for (int c = 0; c < kTogether; c++)
    for (int lane = 0; lane < kLanes; lane++) {
      const bool better = gain[c][lane] > best[lane];
      scale[lane] = better ? fitted[c][lane] : scale[lane];
      zero[lane] = better ? offset[c][lane] : zero[lane];
      best[lane] = better ? gain[c][lane] : best[lane];
    }
}

// Symmetric 4-bit: the extreme value goes to code -8, or near it if that lowers the squared error. The scale may be negative.
inline void scale_symmetric(const float* values, int64_t count, bool search, Lanes& scale, Lanes& zero) {
  Lanes extreme = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) {
      const float w = values[k * kLanes + lane], a = w < 0 ? -w : w, b = extreme[lane] < 0 ? -extreme[lane] : extreme[lane];
      extreme[lane] = a > b ? w : extreme[lane];
    }
  Lanes best;
  for (int lane = 0; lane < kLanes; lane++) {
    scale[lane] = extreme[lane] / -8.0f;
    zero[lane] = 8.0f;
    best[lane] = -1.0f;
  }
  if (!search) return;
  constexpr float kCodes[][kTogether] = {{7.0f, 7.3f, 7.6f}, {7.9f, 8.2f, 8.6f}, {9.0f, 9.5f, 10.0f}};
  Lanes inverse[kTogether], offset[kTogether], gain[kTogether], fitted[kTogether];
  for (int c = 0; c < kTogether; c++)
    for (int lane = 0; lane < kLanes; lane++) offset[c][lane] = 8.0f;
  for (const auto& codes : kCodes) {
    for (int c = 0; c < kTogether; c++)
      for (int lane = 0; lane < kLanes; lane++) inverse[c][lane] = extreme[lane] != 0.0f ? -codes[c] / extreme[lane] : 0.0f;
    project(values, count, inverse, offset, 15.0f, gain, fitted);
    keep_best(gain, fitted, offset, best, scale, zero);
  }
}

// 4-bit with zero point: codes 0..15 over [min, max] widened to hold 0, or over a narrower range if that lowers the squared error.
inline void scale_zero_point(const float* values, int64_t count, bool search, Lanes& scale, Lanes& zero) {
  Lanes low = {}, high = {}, best;
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) {
      const float w = values[k * kLanes + lane];
      low[lane] = w < low[lane] ? w : low[lane];
      high[lane] = w > high[lane] ? w : high[lane];
    }
  for (int lane = 0; lane < kLanes; lane++) {
    scale[lane] = (high[lane] - low[lane]) / 15.0f;
    zero[lane] = scale[lane] > 0.0f ? round_between(-low[lane] / scale[lane], 0.0f, 15.0f) : 8.0f;
    best[lane] = -1.0f;
  }
  if (!search) return;
  constexpr float kShrink[] = {1.0f, 0.94f, 0.88f, 0.82f, 0.76f}, kShift[kTogether] = {0.0f, 0.5f, 1.0f};
  Lanes inverse[kTogether], offset[kTogether], gain[kTogether], fitted[kTogether];
  for (float shrink : kShrink) {
    for (int c = 0; c < kTogether; c++)
      for (int lane = 0; lane < kLanes; lane++) {
        const float range = high[lane] - low[lane], start = low[lane] + range * (1.0f - shrink) * kShift[c];
        inverse[c][lane] = range > 0.0f ? 15.0f / (range * shrink) : 0.0f;
        offset[c][lane] = round_between(-start * inverse[c][lane], 0.0f, 15.0f);
      }
    project(values, count, inverse, offset, 15.0f, gain, fitted);
    keep_best(gain, fitted, offset, best, scale, zero);
  }
}

inline void scale_int8(const float* values, int64_t count, Lanes& scale, Lanes& zero) {
  Lanes largest = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) {
      const float w = values[k * kLanes + lane], a = w < 0 ? -w : w;
      largest[lane] = a > largest[lane] ? a : largest[lane];
    }
  for (int lane = 0; lane < kLanes; lane++) {
    scale[lane] = largest[lane] / 127.0f;
    zero[lane] = 128.0f;
  }
}

// Four columns as one little-endian word per lane, in the order of kQuadOrder.
inline void quad_words(const float* values, const Lanes& inverse, const Lanes& zero, float low, float high, uint32_t* words) {
  for (int lane = 0; lane < kLanes; lane++) {
    uint32_t word = 0;
    for (int i = 0; i < 4; i++) {
      const float q = round_between(values[kQuadOrder[i] * kLanes + lane] * inverse[lane] + zero[lane], low, high);
      word |= static_cast<uint32_t>(static_cast<int32_t>(q)) << (8 * i);
    }
    words[lane] = word;
  }
}

inline bool all_finite(const float* values, int64_t count) {
  Lanes poison = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) poison[lane] += values[k * kLanes + lane] * 0.0f;
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; lane++) sum += poison[lane];
  return sum == 0.0f;
}

// The scale as it is stored.
inline float stored_scale(const Layout& layout, float scale) { return layout.group ? bf16_to_float(float_to_bf16(scale)) : scale; }

inline void squared_error(const Layout& layout, const float* values, int64_t count, const Lanes& scale, const Lanes& zero, Lanes& sum) {
  const bool bytes = layout.format == Format::int8;
  const float low = bytes ? 1.0f : 0.0f, high = bytes ? 255.0f : 15.0f;
  Lanes s, inverse;
  for (int lane = 0; lane < kLanes; lane++) {
    s[lane] = stored_scale(layout, scale[lane]);
    inverse[lane] = s[lane] != 0.0f ? 1.0f / s[lane] : 0.0f;
    sum[lane] = 0.0f;
  }
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) {
      const float w = values[k * kLanes + lane];
      const float off = w - s[lane] * (round_between(w * inverse[lane] + zero[lane], low, high) - zero[lane]);
      sum[lane] += off * off;
    }
}

inline void add_squares(const float* values, int64_t count, double& sum) {
  Lanes squares = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) squares[lane] += values[k * kLanes + lane] * values[k * kLanes + lane];
  for (float square : squares) sum += square;
}

inline void scale_int4(const Layout& layout, const float* values, int64_t count, bool search, Lanes& scale, Lanes& zero) {
  const auto choose = layout.zero_point ? scale_zero_point : scale_symmetric;
  choose(values, count, false, scale, zero);
  if (!search) return;
  // Rounding the scale for storage can undo what the search gained.
  Lanes fitted, fitted_zero, before, after;
  choose(values, count, true, fitted, fitted_zero);
  squared_error(layout, values, count, scale, zero, before);
  squared_error(layout, values, count, fitted, fitted_zero, after);
  for (int lane = 0; lane < kLanes; lane++) {
    const bool better = after[lane] < before[lane];
    scale[lane] = better ? fitted[lane] : scale[lane];
    zero[lane] = better ? fitted_zero[lane] : zero[lane];
  }
}

// Returns false, having written nothing, if a quantised format is asked to hold a NaN or Inf. `scratch`: 16 floats per padded column.
// `error` is added to.
inline bool pack_panel(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, bool search, uint8_t* weight,
                       uint8_t* scale, uint8_t* zero, float* scratch, PackError& error) {
  const int64_t cols = layout.padded_cols();
  load_lanes(layout, panel, source, dtype, stride, scratch);
  uint32_t* words = reinterpret_cast<uint32_t*>(weight + panel * layout.weight_panel_bytes());
  if (layout.format == Format::bf16) {
    for (int64_t k = 0; k < cols; k += 2, words += kLanes)
      for (int lane = 0; lane < kLanes; lane++)
        words[lane] = float_to_bf16(scratch[k * kLanes + lane]) | static_cast<uint32_t>(float_to_bf16(scratch[(k + 1) * kLanes + lane])) << 16;
    if (dtype == DType::bf16) return true;
    add_squares(scratch, cols, error.total);
    for (int64_t i = 0; i < cols * kLanes; i++) scratch[i] -= bf16_to_float(float_to_bf16(scratch[i]));
    add_squares(scratch, cols, error.difference);
    return true;
  }
  if (!all_finite(scratch, cols)) return false;
  add_squares(scratch, cols, error.total);
  const int64_t group = layout.group ? layout.group : cols;
  uint8_t* scales = scale + panel * layout.scale_panel_bytes();
  uint8_t* zeros = zero + panel * layout.zero_panel_bytes();
  for (int64_t g = 0; g < layout.groups(); g++) {
    const float* values = scratch + g * group * kLanes;
    Lanes s, z, inverse;
    if (layout.format == Format::int8)
      scale_int8(values, group, s, z);
    else
      scale_int4(layout, values, group, search, s, z);
    for (int lane = 0; lane < kLanes; lane++) {
      s[lane] = stored_scale(layout, s[lane]);
      const uint16_t half = float_to_bf16(s[lane]);
      if (layout.group)
        memcpy(scales + (g * kLanes + lane) * 2, &half, 2);
      else
        memcpy(scales + lane * 4, &s[lane], 4);
      inverse[lane] = s[lane] != 0.0f ? 1.0f / s[lane] : 0.0f;
      if (layout.zero_point) zeros[g * kLanes + lane] = static_cast<uint8_t>(z[lane]);
    }
    Lanes off;
    squared_error(layout, values, group, s, z, off);
    for (float square : off) error.difference += square;
    if (layout.format == Format::int8) {
      for (int64_t k = 0; k < group; k += 4, words += kLanes) quad_words(values + k * kLanes, inverse, z, 1.0f, 255.0f, words);
    } else {
      for (int64_t k = 0; k < group; k += 8, words += kLanes) {
        uint32_t high[kLanes];
        quad_words(values + k * kLanes, inverse, z, 0.0f, 15.0f, words);
        quad_words(values + (k + 4) * kLanes, inverse, z, 0.0f, 15.0f, high);
        for (int lane = 0; lane < kLanes; lane++) words[lane] |= high[lane] << 4;
      }
    }
  }
  return true;
}

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
