// Any weight format as bf16 lines: what training multiplies with, forwards and (transposed) backwards.
#pragma once
#include "isa/pack.h"

namespace coterie {
namespace {

inline uint32_t round_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  return (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

// Columns [begin, end), a multiple of 64 apart, of one packed int8 or int4 panel as lines [columns / 2][16][2] of bf16.
inline void decode_pairs(const Layout& layout, const uint8_t* weight, const uint8_t* scale, const uint8_t* zero, int64_t begin, int64_t end,
                         uint8_t* to) {
  const bool nibbles = layout.format == Format::int4;
  const int64_t step = layout.columns_per_line(), group = layout.group ? layout.group : layout.padded_cols();
  const uint32_t mask = nibbles ? 15 : 255;
  uint32_t* out = reinterpret_cast<uint32_t*>(to);
  for (int64_t start = begin; start < end;) {
    const int64_t g = start / group, stop = (g + 1) * group < end ? (g + 1) * group : end;
    float s[kLanes];
    int32_t centre[kLanes];
    for (int lane = 0; lane < kLanes; lane++) {
      if (layout.group) {
        uint16_t half;
        memcpy(&half, scale + (g * kLanes + lane) * 2, 2);
        s[lane] = bf16_to_float(half);
      } else {
        memcpy(&s[lane], scale + lane * 4, 4);
      }
      centre[lane] = !nibbles ? 128 : layout.zero_point ? zero[g * kLanes + lane] : 8;
    }
    for (; start < stop; start += step) {
      uint32_t words[kLanes];
      memcpy(words, weight + start / step * kLine, kLine);
      for (int shift = 0; shift < (nibbles ? 8 : 4); shift += 4)
        for (int odd = 0; odd < 2; odd++, out += kLanes)
          for (int lane = 0; lane < kLanes; lane++) {
            const int32_t first = (words[lane] >> (shift + 8 * odd)) & mask, second = (words[lane] >> (shift + 8 * odd + 16)) & mask;
            out[lane] = round_to_bf16(static_cast<float>(first - centre[lane]) * s[lane]) |
                        round_to_bf16(static_cast<float>(second - centre[lane]) * s[lane]) << 16;
          }
    }
  }
}

// One panel of a small dense matrix: rows x cols values, strides in elements, as lines [lines][16][2] of bf16, zero beyond.
inline void pack_pairs(const void* source, DType dtype, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, int64_t lines, uint8_t* to) {
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  memset(to, 0, lines * kLine);
  const int64_t n = rows < kLanes ? rows : kLanes;
  if (dtype == DType::bf16 && col_stride == 1 && cols % 2 == 0) {  // pairs are adjacent already
    for (int64_t lane = 0; lane < n; lane++) {
      const uint16_t* from = static_cast<const uint16_t*>(source) + lane * row_stride;
      for (int64_t k = 0; k < cols; k += 2) memcpy(to + (k / 2 * kLanes + lane) * 4, from + k, 4);
    }
    return;
  }
  auto fill = [&](auto value) {
    if (row_stride == 1)
      for (int64_t k = 0; k < cols; k++)
        for (int64_t lane = 0; lane < n; lane++) out[(k / 2 * kLanes + lane) * 2 + k % 2] = value(k * col_stride + lane);
    else
      for (int64_t lane = 0; lane < n; lane++)
        for (int64_t k = 0; k < cols; k++) out[(k / 2 * kLanes + lane) * 2 + k % 2] = value(lane * row_stride + k * col_stride);
  };
  if (dtype == DType::bf16)
    fill([from = static_cast<const uint16_t*>(source)](int64_t i) { return from[i]; });
  else
    fill([from = static_cast<const float*>(source)](int64_t i) { return static_cast<uint16_t>(round_to_bf16(from[i])); });
}

// A 16 x 16 tile of lines [8][16][2] (rows as lanes) turned into lines of its transpose.
inline void transpose_tile(const uint8_t* from, uint8_t* to) {
  const uint16_t* in = reinterpret_cast<const uint16_t*>(from);
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  for (int n = 0; n < kLanes; n++)
    for (int k = 0; k < kLanes; k++) out[(n / 2 * kLanes + k) * 2 + n % 2] = in[(k / 2 * kLanes + n) * 2 + k % 2];
}

}  // namespace
}  // namespace coterie
