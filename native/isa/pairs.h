// Small dense matrices, and transposes of blocks, as lines of bf16 pairs: what training multiplies with.
#pragma once
#include "isa/pack.h"

namespace coterie {
namespace {

struct Square {
  alignas(64) uint16_t value[kLanes][kLanes];  // bf16
};

constexpr int kSquareLines = kLanes / 2;

// One panel of a small dense matrix: rows x cols values, strides in elements (one of them 1), as lines [lines][16][2] of bf16 that lie `to_stride` bytes
// apart; zero beyond.
template <class Isa>
void pack_pairs(const void* source, DType dtype, int64_t row_stride, int64_t col_stride, int64_t rows, int64_t cols, int64_t lines, uint8_t* to,
                int64_t to_stride) {
  const bool lanes_adjacent = row_stride == 1;
  const int64_t stride = lanes_adjacent ? col_stride : row_stride;
  for (int64_t column = 0; column < lines * 2; column += kLanes, to += kSquareLines * to_stride) {
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
    lanes_adjacent ? Isa::pair_rows(square, to, to_stride) : Isa::pair_columns(square, to, to_stride);
  }
}

// Lines of a square whose rows are columns of weights.
inline void pair_rows_portable(const Square& square, uint8_t* to, int64_t stride) {
  for (int k = 0; k < kLanes; k++)
    for (int lane = 0; lane < kLanes; lane++) memcpy(to + k / 2 * stride + (lane * 2 + k % 2) * 2, &square.value[k][lane], 2);
}

// Lines of a square whose rows are lanes, rows of weights.
inline void pair_columns_portable(const Square& square, uint8_t* to, int64_t stride) {
  for (int lane = 0; lane < kLanes; lane++)
    for (int k = 0; k < kLanes; k += 2) memcpy(to + k / 2 * stride + lane * 4, &square.value[lane][k], 4);
}

// Eight lines, 16 rows by 16 columns of weights, turned into those of their transpose; strides are those from line to line, in bytes.
inline void transpose_portable(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) {
  for (int n = 0; n < kLanes; n++)
    for (int k = 0; k < kLanes; k++) memcpy(to + n / 2 * to_stride + (k * 2 + n % 2) * 2, from + k / 2 * from_stride + (n * 2 + k % 2) * 2, 2);
}

}  // namespace
}  // namespace coterie
