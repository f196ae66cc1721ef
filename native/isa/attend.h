// Attention of one query to cached keys and values: a group of heads that share them, a part of the keys at a time (see layer/attention.h).
#pragma once
#include <type_traits>

#include "isa/activation.h"
#include "isa/kernels.h"

namespace coterie {
namespace {

template <class Isa>
struct Attend {
  using F = typename Isa::F;

  // Where dot products take pairs of bf16, keys and queries of bf16 are multiplied as they are.
  static bool in_pairs(const KeysPart& part) { return Isa::kFloatBytes == 2 && part.dtype == DType::bf16 && part.key_dim % 32 == 0 && part.more_dim % 32 == 0; }

  static F load(const uint8_t* row, int64_t i, DType dtype) {
    return dtype == DType::bf16 ? Isa::load_bf16(row + 2 * i) : Isa::load(reinterpret_cast<const float*>(row) + i);
  }

  // Sums of products that are under way at a time.
  static constexpr int kSums = Isa::kRegistersPerVector == 1 ? 16 : 8;

  // to[i]: the product of key i / Heads and query i % Heads, of `key` and what stands behind it in `more`.
  template <int Heads>
  static void products_of(const KeysPart& part, const uint8_t* const (&query)[Heads], const uint8_t* const (&key)[kSums / Heads],
                          const uint8_t* const (&more)[kSums / Heads], bool pairs, float* to) {
    F acc[kSums];
#pragma GCC unroll 16
    for (F& a : acc) a = Isa::zero();
    int64_t before = 0;
    for (int64_t dim = part.key_dim; before < part.key_dim + part.more_dim; before += dim, dim = part.more_dim) {
      const auto& row = before ? more : key;
      if (pairs) {
        if constexpr (Isa::kFloatBytes == 2) {
          for (int64_t i = 0; i < dim * 2; i += kLine) {
#pragma GCC unroll 16
            for (int k = 0; k < kSums / Heads; k++) {
              const auto line = Isa::pair(Isa::load_integers(row[k] + i));
#pragma GCC unroll 8
              for (int h = 0; h < Heads; h++) acc[k * Heads + h] = Isa::dot(acc[k * Heads + h], line, Isa::pair(Isa::load_integers(query[h] + before * 2 + i)));
            }
          }
        }
      } else {
        for (int64_t i = 0; i < dim; i += kLanes) {
#pragma GCC unroll 16
          for (int k = 0; k < kSums / Heads; k++) {
            const F column = load(row[k], i, part.dtype);
#pragma GCC unroll 8
            for (int h = 0; h < Heads; h++)
              acc[k * Heads + h] = Isa::fma(column, Isa::load(reinterpret_cast<const float*>(query[h]) + before + i), acc[k * Heads + h]);
          }
        }
      }
    }
    for (int i = 0; i < kSums; i += 8) Isa::eight_sums(acc + i, to + i);
  }

  // `Vectors` times 16 columns of every value, from `column` on, times the weights [count][Heads].
  template <int Heads, int Vectors>
  static void add_values(const KeysPart& part, int64_t column, const float* weight, float* const (&to)[Heads]) {
    F acc[Heads][Vectors];
#pragma GCC unroll 8
    for (auto& row : acc)
#pragma GCC unroll 8
      for (F& a : row) a = Isa::zero();
    const uint8_t* value = part.values;
    for (int64_t s = 0; s < part.count; s++, value += part.value_stride) {
      F columns[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; v++) columns[v] = load(value, column + v * kLanes, part.dtype);
#pragma GCC unroll 8
      for (int h = 0; h < Heads; h++) {
        const F w = Isa::set1(weight[s * Heads + h]);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; v++) acc[h][v] = Isa::fma(w, columns[v], acc[h][v]);
      }
    }
    for (int h = 0; h < Heads; h++)
      for (int v = 0; v < Vectors; v++) Isa::store(to[h] + column + v * kLanes, acc[h][v]);
  }

  // The same for bf16, in pairs of positions: `Lines` times 32 columns, the weights as pairs of bf16 [count / 2, rounded up][Heads].
  template <int Heads, int Lines>
  static void add_value_pairs(const KeysPart& part, int64_t column, const uint32_t* weight, float* const (&to)[Heads]) {
    F acc[Heads][Lines * 2];
#pragma GCC unroll 8
    for (auto& row : acc)
#pragma GCC unroll 8
      for (F& a : row) a = Isa::zero();
    for (int64_t s = 0; s < part.count; s += 2) {
      const uint8_t* value = part.values + s * part.value_stride + column * 2;
      const int64_t next = s + 1 < part.count ? part.value_stride : 0;
      typename Isa::I lines[Lines * 2];
#pragma GCC unroll 8
      for (int l = 0; l < Lines; l++) Isa::interleave_rows(value + l * kLine, value + next + l * kLine, lines[2 * l], lines[2 * l + 1]);
#pragma GCC unroll 8
      for (int h = 0; h < Heads; h++) {
        const auto w = Isa::broadcast_pair(reinterpret_cast<const uint8_t*>(weight + s / 2 * Heads + h));
#pragma GCC unroll 8
        for (int l = 0; l < Lines * 2; l++) acc[h][l] = Isa::dot(acc[h][l], Isa::pair(lines[l]), w);
      }
    }
    for (int h = 0; h < Heads; h++)
      for (int l = 0; l < Lines; l++) Isa::store_interleaved(to[h] + column + l * 32, acc[h][2 * l], acc[h][2 * l + 1]);
  }

  // The weights [count][Heads] rounded to bf16, where they are and as pairs.
  template <int Heads>
  static const uint32_t* paired(int64_t count, float* weight) {
    auto* pairs = reinterpret_cast<uint32_t*>(weight + round_up(count, kSums) * Heads);
    if (count % 2)
      for (int h = 0; h < Heads; h++) weight[count * Heads + h] = 0.0f;
    for (int64_t s = 0; s < count; s += 2)
      for (int h = 0; h < Heads; h++) {
        float &first = weight[s * Heads + h], &second = weight[(s + 1) * Heads + h];
        const uint32_t low = float_to_bf16(first), high = float_to_bf16(second);
        pairs[s / 2 * Heads + h] = low | high << 16;
        first = bf16_to_float(static_cast<uint16_t>(low));
        second = bf16_to_float(static_cast<uint16_t>(high));
      }
    return pairs;
  }

  // The products of `Heads` queries, from `first` on, and every key: [keys][Heads], in scratch.
  template <int Heads>
  static float* products(const KeysPart& part, int64_t first, float* scratch) {
    constexpr int kKeys = kSums / Heads;
    const int64_t value_bytes = part.value_dim * (part.dtype == DType::f32 ? 4 : 2);
    const bool pairs = in_pairs(part);
    const int64_t columns = part.key_dim + part.more_dim;
    const uint8_t* query[Heads];
    for (int h = 0; h < Heads; h++) {
      query[h] = part.queries + (first + h) * part.query_stride;
      if (pairs) continue;
      float* row = scratch + h * columns;
      for (int64_t i = 0; i < columns; i += kLanes) Isa::store(row + i, load(query[h], i, part.dtype));
      query[h] = reinterpret_cast<const uint8_t*>(row);
    }
    float* to = scratch + Heads * columns;
    for (int64_t s = 0; s < part.count; s += kKeys) {
      const uint8_t *key[kKeys], *more[kKeys];
      for (int k = 0; k < kKeys; k++) {
        const int64_t at = s + k < part.count ? s + k : part.count - 1;
        key[k] = part.keys + at * part.key_stride;
        more[k] = part.more_keys + at * part.more_stride;
        for (int64_t byte = 0; byte < value_bytes; byte += kLine) Isa::prefetch(part.values + at * part.value_stride + byte);
      }
      products_of<Heads>(part, query, key, more, pairs, to + s * Heads);
    }
    return to;
  }

  template <int Heads>
  static void heads(const KeysPart& part, int64_t first, float* scratch) {
    constexpr int kVectors = Heads <= 2 ? 8 : 16 / Heads;
    const bool in_value_pairs = Isa::kFloatBytes == 2 && part.dtype == DType::bf16 && part.value_dim % 32 == 0;
    float* weight = products<Heads>(part, first, scratch);
    float largest[Heads], sum[Heads];
    for (int h = 0; h < Heads; h++) largest[h] = -kNoScore, sum[h] = 0.0f;
    for (int64_t s = 0; s < part.count; s++)
      for (int h = 0; h < Heads; h++) {
        float& score = weight[s * Heads + h];
        score = part.mask && !part.mask[s] ? -2.0f * kNoScore : score * part.scale;
        largest[h] = score > largest[h] ? score : largest[h];
      }
    for (int64_t s = 0; s < part.count; s++)
      for (int h = 0; h < Heads; h++) weight[s * Heads + h] = exp_f32(weight[s * Heads + h] - largest[h]);
    const uint32_t* pairs = in_value_pairs ? paired<Heads>(part.count, weight) : nullptr;
    for (int64_t s = 0; s < part.count; s++)
      for (int h = 0; h < Heads; h++) sum[h] += weight[s * Heads + h];
    float* out[Heads];
    for (int h = 0; h < Heads; h++) {
      out[h] = part.sums + (first + h) * part.value_dim;
      part.largest[first + h] = largest[h];
      part.total[first + h] = sum[h];
    }
    int64_t column = 0;
    if constexpr (Isa::kFloatBytes == 2) {
      constexpr int kLines = kVectors / 2;
      for (; pairs && column + kLines * 32 <= part.value_dim; column += kLines * 32) add_value_pairs<Heads, kLines>(part, column, pairs, out);
      for (; pairs && column < part.value_dim; column += 32) add_value_pairs<Heads, 1>(part, column, pairs, out);
    }
    for (; column + kVectors * kLanes <= part.value_dim; column += kVectors * kLanes) add_values<Heads, kVectors>(part, column, weight, out);
    for (; column < part.value_dim; column += kLanes) add_values<Heads, 1>(part, column, weight, out);
  }

  // f<Heads>(first) for groups of 8, 4, 2 and 1 of all heads.
  template <class Do>
  static void in_groups(int64_t heads, const Do& f) {
    int64_t h = 0;
    for (; h + 8 <= heads; h += 8) f(std::integral_constant<int, 8>(), h);
    for (; h + 4 <= heads; h += 4) f(std::integral_constant<int, 4>(), h);
    for (; h + 2 <= heads; h += 2) f(std::integral_constant<int, 2>(), h);
    for (; h < heads; h++) f(std::integral_constant<int, 1>(), h);
  }

  static void attend(const KeysPart& part, float* scratch) {
    in_groups(part.heads, [&](auto group, int64_t first) { heads<group()>(part, first, scratch); });
  }
};

}  // namespace
}  // namespace coterie
