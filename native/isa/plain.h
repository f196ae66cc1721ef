// A few tokens times the rows of a plain matrix, or times its columns; it is read once, row by row, as it lies (see PlainRows, PlainSums).
#pragma once
#include "isa/kernels.h"

namespace coterie {
namespace {

template <class Isa>
struct Plain {
  using F = typename Isa::F;

  static constexpr int kRows = 8;                // whose sums are added up together
  static constexpr int64_t kAheadBytes = 4096;   // a page of 4 kB ends what the CPU fetches by itself

  // Where dot products take pairs of bf16, rows and tokens of bf16 are multiplied as they are.
  static bool in_pairs(const PlainRows& p) { return Isa::kFloatBytes == 2 && p.dtype == DType::bf16 && p.cols % 32 == 0; }

  // Lanes whose sums are the products of one row and each token.
  template <int Tokens, bool Pairs>
  static void row_of(const PlainRows& p, const uint8_t* row, const uint8_t* const (&x)[Tokens], F (&sum)[Tokens]) {
    constexpr int kLines = Tokens == 1 ? 4 : Tokens == 2 ? 2 : 1;
    F acc[Tokens][kLines];
#pragma GCC unroll 4
    for (auto& token : acc)
#pragma GCC unroll 4
      for (F& a : token) a = Isa::zero();
    const auto line = [&](int64_t i, int at) {
      if constexpr (Pairs) {
        const auto weights = Isa::pair(Isa::load_integers(row + i * 2));
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; t++) acc[t][at] = Isa::dot(acc[t][at], weights, Isa::pair(Isa::load_integers(x[t] + i * 2)));
      } else {
        const F weights = p.dtype == DType::bf16 ? Isa::load_bf16(row + i * 2) : Isa::load(reinterpret_cast<const float*>(row) + i);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; t++) acc[t][at] = Isa::fma(weights, Isa::load(reinterpret_cast<const float*>(x[t]) + i), acc[t][at]);
      }
    };
    constexpr int64_t kColumns = Pairs ? 2 * kLanes : kLanes;
    const int64_t element = p.dtype == DType::f32 ? 4 : 2;
    int64_t i = 0;
    for (; i + kLines * kColumns <= p.cols; i += kLines * kColumns) {
      for (int64_t byte = 0; byte < kLines * kColumns * element; byte += kLine) Isa::prefetch(row + i * element + byte + kAheadBytes);
#pragma GCC unroll 4
      for (int l = 0; l < kLines; l++) line(i + l * kColumns, l);
    }
    for (; i < p.cols; i += kColumns) line(i, 0);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; t++) {
      sum[t] = acc[t][0];
#pragma GCC unroll 4
      for (int l = 1; l < kLines; l++) sum[t] = Isa::add(sum[t], acc[t][l]);
    }
  }

  template <int Tokens, bool Pairs>
  static void tokens_of(const PlainRows& p, int64_t first, const float* wide) {
    const int64_t element = p.dtype == DType::f32 ? 4 : 2;
    const uint8_t* x[Tokens];
    for (int t = 0; t < Tokens; t++)
      x[t] = Pairs ? p.x + (first + t) * p.cols * element : reinterpret_cast<const uint8_t*>(wide + (first + t) * p.cols);
    for (int64_t r = 0; r < p.rows; r += kRows) {
      const int64_t count = p.rows - r < kRows ? p.rows - r : kRows;
      F sums[Tokens][kRows], of_row[Tokens];
      for (auto& token : sums)
        for (F& s : token) s = Isa::zero();
      for (int64_t k = 0; k < count; k++) {
        row_of<Tokens, Pairs>(p, p.weight + (r + k) * p.cols * element, x, of_row);
        for (int t = 0; t < Tokens; t++) sums[t][k] = of_row[t];
      }
      for (int t = 0; t < Tokens; t++) {
        float found[kRows];
        Isa::eight_sums(sums[t], found);
        for (int64_t k = 0; k < count; k++) p.to[(first + t) * p.stride + r + k] = found[k];
      }
    }
  }

  template <bool Pairs>
  static void all(const PlainRows& p, const float* wide) {
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) tokens_of<4, Pairs>(p, t, wide);
    for (; t + 2 <= p.tokens; t += 2) tokens_of<2, Pairs>(p, t, wide);
    for (; t < p.tokens; t++) tokens_of<1, Pairs>(p, t, wide);
  }

  static void sum(const PlainSums& p) {
    const int64_t element = p.dtype == DType::f32 ? 4 : 2, row_bytes = p.cols * element;
    for (int64_t r = 0; r < p.rows; r += kRows)
      for (int64_t t = 0; t < p.tokens; t++) {
        const uint8_t* row[kRows];
        F weight[kRows];
        for (int64_t k = 0; k < kRows; k++) {
          const bool there = r + k < p.rows;
          row[k] = p.weight + (there ? r + k : r) * row_bytes;
          weight[k] = Isa::set1(there ? p.x[t * p.rows + r + k] : 0.0f);
        }
        float* to = p.to + t * p.stride;
        for (int64_t i = 0; i < p.cols; i += kLanes) {
          F acc = r ? Isa::load(to + i) : Isa::zero();
#pragma GCC unroll 8
          for (int k = 0; k < kRows; k++) {
            if (!t && i % (kLine / element) == 0) Isa::prefetch(row[k] + i * element + kRows * row_bytes);
            acc = Isa::fma(weight[k], p.dtype == DType::bf16 ? Isa::load_bf16(row[k] + i * 2) : Isa::load(reinterpret_cast<const float*>(row[k]) + i), acc);
          }
          Isa::store(to + i, acc);
        }
      }
  }

  static void multiply(const PlainRows& p, float* scratch) {
    if constexpr (Isa::kFloatBytes == 2)
      if (in_pairs(p)) return all<true>(p, nullptr);
    if (p.dtype == DType::f32) return all<false>(p, reinterpret_cast<const float*>(p.x));
    for (int64_t i = 0; i < p.tokens * p.cols; i += kLanes) Isa::store(scratch + i, Isa::load_bf16(p.x + 2 * i));
    all<false>(p, scratch);
  }
};

}  // namespace
}  // namespace coterie
