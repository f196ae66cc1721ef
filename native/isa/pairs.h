// Any weights as lines of bf16 pairs: what training multiplies with, forwards and (transposed) backwards.
#pragma once
#include "isa/pack.h"

namespace coterie {
namespace {

struct Square {
  alignas(64) uint16_t value[kLanes][kLanes];  // bf16
};

// (q - centre) * scale of the fields at `shift` and 16 bits above it, as a line.
template <class Isa, int shift, uint32_t mask>
inline void decode_line(typename Isa::I words, typename Isa::F minus_centre, typename Isa::F scale, uint8_t* to) {
  auto value = [&](typename Isa::I field) { return Isa::mul(Isa::add(Isa::to_float(field), minus_centre), scale); };
  Isa::store_pairs(to, value(Isa::template field<shift, mask>(words)), value(Isa::template field<shift + 16, mask>(words)));
}

// Columns [begin, end), a multiple of 64 apart, of one packed int8 or int4 panel as lines [columns / 2][16][2] of bf16.
template <class Isa>
void decode_pairs(const Layout& layout, const uint8_t* weight, const uint8_t* scale, const uint8_t* zero, int64_t begin, int64_t end,
                         uint8_t* to) {
  const bool nibbles = layout.format == Format::int4;
  const int64_t step = layout.columns_per_line(), group = layout.group ? layout.group : layout.padded_cols();
  const auto fixed_centre = Isa::set1(nibbles ? -8.0f : -128.0f);
  for (int64_t start = begin; start < end;) {
    const int64_t g = start / group, stop = (g + 1) * group < end ? (g + 1) * group : end;
    const auto s = layout.group ? Isa::load_bf16(scale + g * kPanelRows * 2) : Isa::load(reinterpret_cast<const float*>(scale));
    const auto centre = layout.zero_point ? Isa::mul(Isa::load_bytes(zero + g * kPanelRows), Isa::set1(-1.0f)) : fixed_centre;
    for (const uint8_t* from = weight + start / step * kLine; start < stop; start += step, from += kLine, to += step / 2 * kLine) {
      const auto words = Isa::load_integers(from);
      if (nibbles) {
        decode_line<Isa, 0, 15>(words, centre, s, to);
        decode_line<Isa, 8, 15>(words, centre, s, to + kLine);
        decode_line<Isa, 4, 15>(words, centre, s, to + 2 * kLine);
        decode_line<Isa, 12, 15>(words, centre, s, to + 3 * kLine);
      } else {
        decode_line<Isa, 0, 255>(words, centre, s, to);
        decode_line<Isa, 8, 255>(words, centre, s, to + kLine);
      }
    }
  }
}

// One panel of a small dense matrix: rows x cols values, strides in elements (one of them 1), as lines [lines][16][2] of bf16, zero beyond.
template <class Isa>
void pack_pairs(const void* source, DType dtype, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, int64_t lines, uint8_t* to) {
  const bool lanes_adjacent = row_stride == 1;
  const int64_t stride = lanes_adjacent ? col_stride : row_stride;
  for (int64_t column = 0; column < lines * 2; column += kLanes, to += kLanes / 2 * kLine) {
    const int64_t left = cols - column < kLanes ? cols - column : kLanes;
    const int64_t outer = lanes_adjacent ? left : rows < kLanes ? rows : kLanes, inner = lanes_adjacent ? (rows < kLanes ? rows : kLanes) : left;
    Square square;
    if (outer < kLanes || inner < kLanes) memset(&square, 0, sizeof square);
    for (int64_t i = 0; i < outer; i++) {
      const int64_t at = i * stride + column * col_stride;
      if (dtype == DType::f32)
        for (int64_t j = 0; j < inner; j++) square.value[i][j] = float_to_bf16(static_cast<const float*>(source)[at + j]);
      else if (inner == kLanes)
        memcpy(square.value[i], static_cast<const uint16_t*>(source) + at, sizeof square.value[i]);
      else
        for (int64_t j = 0; j < inner; j++) square.value[i][j] = static_cast<const uint16_t*>(source)[at + j];
    }
    lanes_adjacent ? Isa::pair_rows(square, to) : Isa::pair_columns(square, to);
  }
}

// Lines of a square whose rows are columns of weights.
inline void pair_rows_portable(const Square& square, uint8_t* to) {
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  for (int k = 0; k < kLanes; k++)
    for (int lane = 0; lane < kLanes; lane++) out[(k / 2 * kLanes + lane) * 2 + k % 2] = square.value[k][lane];
}

// Lines of a square whose rows are lanes, rows of weights.
inline void pair_columns_portable(const Square& square, uint8_t* to) {
  for (int lane = 0; lane < kLanes; lane++)
    for (int k = 0; k < kLanes; k += 2) memcpy(to + (k / 2 * kLanes + lane) * 4, &square.value[lane][k], 4);
}

// Eight lines, 16 rows by 16 columns of weights, turned into those of their transpose.
inline void transpose_portable(const uint8_t* from, uint8_t* to) {
  const uint16_t* in = reinterpret_cast<const uint16_t*>(from);
  uint16_t* out = reinterpret_cast<uint16_t*>(to);
  for (int n = 0; n < kLanes; n++)
    for (int k = 0; k < kLanes; k++) out[(n / 2 * kLanes + k) * 2 + n % 2] = in[(k / 2 * kLanes + n) * 2 + k % 2];
}

}  // namespace
}  // namespace coterie
