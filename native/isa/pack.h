// Packing one panel: 16 rows side by side as lanes, as many at a time as an instruction takes.
// Scales: docs/format.md says how they are chosen.
#pragma once
#include <cstdint>
#include <utility>

#include "formats/bfloat16.h"
#include "isa/activation.h"
#include "isa/kernels.h"

// The bytes are the same on every CPU: no product and sum may be fused into one rounding where the instruction set happens to offer it.
#ifdef __clang__
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")
#endif

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

// As many lanes as an instruction takes: whatever is known of that many rows of a group stays in registers.
#ifdef __AVX512F__
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kWidth * sizeof(uint32_t))));
typedef int32_t Ints __attribute__((vector_size(kWidth * sizeof(int32_t))));
typedef uint16_t Halves __attribute__((vector_size(kWidth * sizeof(uint16_t))));
typedef uint8_t Bytes __attribute__((vector_size(kWidth)));

template <class To, class From>
inline To load(const From* from) {
  To v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class To, class From>
inline void store(To* to, From v) {
  memcpy(to, &v, sizeof v);
}

inline Words bits_of(Vector v) { return reinterpret_cast<Words>(v); }
inline Vector from_bits(Words bits) { return reinterpret_cast<Vector>(bits); }

// A step in transposing a square of words: row a's words at odd multiples of `distance` for those of row b before them.
template <int distance, int... i>
inline void exchange(Words& a, Words& b, std::integer_sequence<int, i...>) {
  const Words before = a;
#ifdef __clang__
  a = __builtin_shufflevector(before, b, (i & distance ? kWidth + i - distance : i)...);
  b = __builtin_shufflevector(before, b, (i & distance ? kWidth + i : i + distance)...);
#else
  a = __builtin_shuffle(before, b, Words{(i & distance ? kWidth + i - distance : i)...});
  b = __builtin_shuffle(before, b, Words{(i & distance ? kWidth + i : i + distance)...});
#endif
}

template <int distance = 1>
inline void transpose(Words (&rows)[kWidth]) {
  if constexpr (distance < kWidth) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; i++)
      if (!(i & distance)) exchange<distance>(rows[i], rows[i + distance], std::make_integer_sequence<int, kWidth>());
    transpose<2 * distance>(rows);
  }
}

// The words of kLanes rows as columns: to[word][lane], or two columns a word (bf16), to[2 * word + half][lane].
template <bool pairs, int words>
inline void store_columns(const uint32_t (&rows)[kLanes][words], float* to) {
  constexpr int columns = pairs ? 2 : 1;
  for (int lane = 0; lane < kLanes; lane += kWidth)
    for (int word = 0; word < words / columns; word += kWidth) {
      Words square[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++) square[i] = load<Words>(&rows[lane + i][word]);
      transpose(square);
      float* column = to + word * columns * kLanes + lane;
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; i++, column += columns * kLanes) {
        store(column, pairs ? square[i] << 16 : square[i]);
        if (pairs) store(column + kLanes, square[i] & 0xffff0000u);
      }
    }
}

// to[column][lane], columns [begin, begin + count) of a panel, zero beyond the matrix; `count` is a multiple of 64.
inline void load_lanes(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, int64_t begin, int64_t count,
                       float* to) {
  constexpr int kChunk = 64;
  alignas(64) uint32_t rows[kLanes][kChunk];
  for (const int64_t end = begin + count; begin < end; begin += kChunk, to += kChunk * kLanes) {
    const int64_t there = layout.cols - begin < kChunk ? layout.cols - begin : kChunk;
    for (int lane = 0; lane < kLanes; lane++) {
      const int64_t row = panel * kLanes + lane, offset = row * stride + begin, wanted = row < layout.rows && there > 0 ? there : 0;
      if (wanted < kChunk) memset(rows[lane], 0, sizeof rows[lane]);
      if (wanted == 0) continue;
      if (dtype != DType::bf16) {
        load_row(source, dtype, offset, wanted, reinterpret_cast<float*>(rows[lane]));
        continue;
      }
      const uint16_t* from = static_cast<const uint16_t*>(source) + offset;
      if (wanted == kChunk)
        for (int i = 0; i < kChunk; i += 2 * kWidth) store(&rows[lane][i / 2], load<Words>(from + i));
      else
        memcpy(rows[lane], from, wanted * 2);
    }
    if (dtype == DType::bf16)
      store_columns<true>(rows, to);
    else
      store_columns<false>(rows, to);
  }
}

// Adding it rounds to an integer, ties to even, for |x| < 2^22. Codes are bounded, and taken from the bits, with it on top of them: exact.
constexpr float kRound = 12582912.0f;

inline Vector splat(float x) { return Vector{} + x; }

// As integers, which CPUs compare faster: numbers above zero are in the order of their bits. 0 < low <= high.
inline Vector bounded(Vector x, Vector low, Vector high) {
  const Ints bits = reinterpret_cast<Ints>(x), least = reinterpret_cast<Ints>(low), most = reinterpret_cast<Ints>(high);
  const Ints raised = bits > least ? bits : least;
  return reinterpret_cast<Vector>(raised < most ? raised : most);
}

// 0 where the quotient is not a number, or too large for one.
inline Vector quotient(float a, Vector b) {
  const Vector q = a / b;
  return reinterpret_cast<Ints>(bits_of(q) & 0x7fffffffu) < 0x7f800000 ? q : Vector{};
}

// The nearest int4 code.
inline Vector rounded(Vector x) {
  const Vector low = splat(kRound);
  return bounded(x + low, low, low + 15.0f) - low;
}

// a * b + c where a * b is exact in float32, so that one rounding and two give the same.
inline Vector add_exact(Vector a, Vector b, Vector c) {
#ifdef __FP_FAST_FMAF
  for (int i = 0; i < kWidth; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// How the rows of a group become codes: code = round(w * inverse + zero), which stands for (code - zero) * scale.
struct Grid {
  Vector scale, zero;

  Vector inverse() const { return quotient(1.0f, scale); }
};

enum class Scheme { bytes, symmetric, zero_point };

template <Scheme scheme>
struct CodeRange {
  static constexpr float low = scheme == Scheme::bytes ? 1.0f : 0.0f, high = scheme == Scheme::bytes ? 255.0f : 15.0f;
};

// The smallest and largest weight of each row, with 0 among them, and the first of largest magnitude.
struct Reach {
  Vector low{}, high{}, extreme{};
  Ints magnitude{};  // as bits: those of a NaN or Inf are larger than any number's
};

// Adds the weights' squares to `squares`.
inline Reach reach_of(const float* values, int64_t count, Vector& squares) {
  Reach r;
  for (int64_t k = 0; k < count; k++) {
    const Vector w = load<Vector>(values + k * kLanes);
    const Ints magnitude = reinterpret_cast<Ints>(bits_of(w) & 0x7fffffffu);
    r.extreme = magnitude > r.magnitude ? w : r.extreme;
    r.magnitude = magnitude > r.magnitude ? magnitude : r.magnitude;
    r.low = w < r.low ? w : r.low;
    r.high = w > r.high ? w : r.high;
    squares += w * w;
  }
  return r;
}

// Without a search. int8: the largest magnitude is 127 away from the middle. int4: the extreme has code 0, so that the scale may be negative; with zero
// points, the range has codes 0..15.
template <Scheme scheme>
inline Grid plain_grid(const Reach& r) {
  if constexpr (scheme == Scheme::bytes) {
    return {reinterpret_cast<Vector>(r.magnitude) / 127.0f, splat(128.0f)};
  } else if constexpr (scheme == Scheme::symmetric) {
    return {r.extreme / -8.0f, splat(8.0f)};
  } else {
    const Vector scale = (r.high - r.low) / 15.0f, zero = rounded(-r.low / scale);
    return {scale, scale > 0.0f ? zero : splat(8.0f)};
  }
}

constexpr int kTogether = 3;  // candidates tried in one pass: their sums over columns fit in the registers

// The projection of w on a candidate's codes q (around their zero point), <w,q>^2 / <q,q>, is what the best one maximises: the least squared error is
// <w,w> minus it, attained by the scale <w,q> / <q,q>. `best` takes the grid of the first candidate that gains more than `gain`.
template <bool exact>
inline void project(const float* values, int64_t count, const Vector* inverse, const Vector* zero, Vector& gain, Grid& best) {
  Vector wq[kTogether] = {}, qq[kTogether] = {};
  const Vector low = splat(kRound), high = low + 15.0f;
  for (int64_t k = 0; k < count; k++) {
    const Vector w = load<Vector>(values + k * kLanes);
#pragma GCC unroll 3
    for (int c = 0; c < kTogether; c++) {
      const Vector q = bounded(w * inverse[c] + zero[c] + kRound, low, high) - (low + zero[c]);
      wq[c] = exact ? add_exact(w, q, wq[c]) : wq[c] + w * q;
      qq[c] = add_exact(q, q, qq[c]);
    }
  }
#pragma GCC unroll 3
  for (int c = 0; c < kTogether; c++) {
    const Vector scale = qq[c] > 0.0f ? wq[c] / qq[c] : Vector{}, gained = scale * wq[c];
    const auto better = gained > gain;
    best.scale = better ? scale : best.scale;
    best.zero = better ? zero[c] : best.zero;
    gain = better ? gained : gain;
  }
}

// Symmetric: the extreme at code 0, or near it. With zero point: the whole range, and narrower ones.
template <Scheme scheme, bool exact>
inline Grid searched_grid(const float* values, int64_t count, const Reach& r, const Grid& plain) {
  Grid best = plain;
  Vector gain = splat(-1.0f);
  Vector inverse[5][kTogether], zero[5][kTogether];
  if constexpr (scheme == Scheme::symmetric) {
    constexpr float kCodes[][kTogether] = {{7.0f, 7.3f, 7.6f}, {7.9f, 8.2f, 8.6f}, {9.0f, 9.5f, 10.0f}};
    for (int i = 0; i < 3; i++)
      for (int c = 0; c < kTogether; c++) inverse[i][c] = quotient(-kCodes[i][c], r.extreme);
    const Vector eight = splat(8.0f), zeros[kTogether] = {eight, eight, eight};
    for (int i = 0; i < 3; i++) project<exact>(values, count, inverse[i], zeros, gain, best);
  } else {
    constexpr float kShrink[] = {1.0f, 0.94f, 0.88f, 0.82f, 0.76f}, kShift[kTogether] = {0.0f, 0.5f, 1.0f};
    const Vector range = r.high - r.low;
    for (int i = 0; i < 5; i++)
      for (int c = 0; c < kTogether; c++) {
        const Vector start = r.low + range * (1.0f - kShrink[i]) * kShift[c];
        inverse[i][c] = quotient(15.0f, range * kShrink[i]);
        zero[i][c] = rounded(-start * inverse[i][c]);
      }
    for (int i = 0; i < 5; i++) project<exact>(values, count, inverse[i], zero[i], gain, best);
  }
  return best;
}

// A group's scale as it is stored; for numbers.
inline Words rounded_to_bf16(Vector v) {
  const Words bits = bits_of(v);
  return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// sums[i]: the squared error of each row on grid[i].
template <Scheme scheme, int grids>
inline void squared_errors(const float* values, int64_t count, const Grid* grid, Vector* sums) {
  Vector inverse[grids], sum[grids] = {};
  for (int i = 0; i < grids; i++) inverse[i] = grid[i].inverse();
  const Vector low = splat(kRound + CodeRange<scheme>::low), high = splat(kRound + CodeRange<scheme>::high);
  for (int64_t k = 0; k < count; k++) {
    const Vector w = load<Vector>(values + k * kLanes);
#pragma GCC unroll 2
    for (int i = 0; i < grids; i++) {
      const Vector q = bounded(w * inverse[i] + grid[i].zero + kRound, low, high) - (grid[i].zero + kRound);
      const Vector off = w - grid[i].scale * q;
      sum[i] += off * off;
    }
  }
  for (int i = 0; i < grids; i++) sums[i] = sum[i];
}

// The codes of one line's columns (layout.h), a word a row.
template <Scheme scheme>
inline Words code_words(const float* values, const Grid& grid, Vector inverse) {
  constexpr int columns = scheme == Scheme::bytes ? 4 : 8;
  const Vector low = splat(kRound + CodeRange<scheme>::low), high = splat(kRound + CodeRange<scheme>::high);
  Words word = {};
  uint32_t added = 0;  // kRound's bits
#pragma GCC unroll 8
  for (int i = 0; i < columns; i++) {
    const int column = i / 4 * 4 + kQuadOrder[i % 4], shift = i % 4 * 8 + i / 4 * 4;
    const Vector w = load<Vector>(values + column * kLanes);
    word += bits_of(bounded(w * inverse + grid.zero + kRound, low, high)) << shift;
    added += float_to_bits(kRound) << shift;
  }
  return word - added;
}

// The parts of one panel.
struct PanelParts {
  uint8_t *weight, *scale, *zero;
};

// What is summed over a panel, by rows.
struct PanelSums {
  Ints magnitude{};
  Vector squares{}, difference{};
};

// kWidth rows, from `lane` on, of the panel's columns [begin, begin + count), which share a scale. `values`: of those columns and rows.
template <Scheme scheme, bool exact>
inline void pack_group(const Layout& layout, const float* values, int64_t begin, int64_t count, int lane, bool search, const PanelParts& to,
                       PanelSums& sums) {
  const Reach reach = reach_of(values, count, sums.squares);
  sums.magnitude = reach.magnitude > sums.magnitude ? reach.magnitude : sums.magnitude;
  const bool grouped = layout.group != 0;
  const auto stored = [&](Grid grid) { return Grid{grouped ? from_bits(rounded_to_bf16(grid.scale) << 16) : grid.scale, grid.zero}; };
  const Grid plain = plain_grid<scheme>(reach);
  Grid grid = stored(plain);
  Vector error;
  if (scheme == Scheme::bytes || !search) {
    squared_errors<scheme, 1>(values, count, &grid, &error);
  } else {
    // Rounding the scale for storage can undo what the search gained.
    const Grid both[] = {grid, stored(searched_grid<scheme, exact>(values, count, reach, plain))};
    Vector errors[2];
    squared_errors<scheme, 2>(values, count, both, errors);
    const auto better = errors[1] < errors[0];
    grid.scale = better ? both[1].scale : both[0].scale;
    grid.zero = better ? both[1].zero : both[0].zero;
    error = better ? errors[1] : errors[0];
  }
  sums.difference += error;

  const int64_t first = grouped ? begin / layout.group * kLanes + lane : lane;
  if (grouped)
    store(to.scale + first * 2, __builtin_convertvector(bits_of(grid.scale) >> 16, Halves));
  else
    store(to.scale + first * 4, grid.scale);
  if (scheme == Scheme::zero_point) store(to.zero + first, __builtin_convertvector(__builtin_convertvector(grid.zero, Ints), Bytes));

  const int64_t columns = layout.columns_per_line();
  const Vector inverse = grid.inverse();
  uint8_t* line = to.weight + begin / columns * kLine + lane * 4;
  for (int64_t k = 0; k < count; k += columns, line += kLine) store(line, code_words<scheme>(values + k * kLanes, grid, inverse));
}

// Returns false if there is a NaN or Inf, which codes cannot hold.
template <Scheme scheme, bool exact>
inline bool pack_codes(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, bool search, const PanelParts& to,
                       float* scratch, PackError& error) {
  const int64_t cols = layout.padded_cols(), group = layout.group ? layout.group : cols, block = round_up(group, kColumnAlign);
  PanelSums sums[kLanes / kWidth];
  for (int64_t begin = 0; begin < cols; begin += block) {
    load_lanes(layout, panel, source, dtype, stride, begin, block, scratch);
    for (int64_t k = 0; k < block; k += group)
      for (int lane = 0; lane < kLanes; lane += kWidth)
        pack_group<scheme, exact>(layout, scratch + k * kLanes + lane, begin + k, group, lane, search, to, sums[lane / kWidth]);
  }
  bool finite = true;
  for (const PanelSums& s : sums)
    for (int i = 0; i < kWidth; i++) {
      finite &= s.magnitude[i] < 0x7f800000;
      error.total += s.squares[i];
      error.difference += s.difference[i];
    }
  return finite;
}

inline void add_squares(const float* values, int64_t count, double& sum) {
  Lanes squares = {};
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) squares[lane] += values[k * kLanes + lane] * values[k * kLanes + lane];
  for (float square : squares) sum += square;
}

inline void pack_bf16(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, uint8_t* weight, float* scratch,
                      PackError& error) {
  const int64_t cols = layout.padded_cols();
  uint32_t* words = reinterpret_cast<uint32_t*>(weight);
  load_lanes(layout, panel, source, dtype, stride, 0, cols, scratch);
  for (int64_t k = 0; k < cols; k += 2, words += kLanes)
    for (int lane = 0; lane < kLanes; lane++)
      words[lane] = float_to_bf16(scratch[k * kLanes + lane]) | static_cast<uint32_t>(float_to_bf16(scratch[(k + 1) * kLanes + lane])) << 16;
  if (dtype == DType::bf16) return;
  add_squares(scratch, cols, error.total);
  for (int64_t i = 0; i < cols * kLanes; i++) scratch[i] -= bf16_to_float(float_to_bf16(scratch[i]));
  add_squares(scratch, cols, error.difference);
}

// Returns false if a quantised format is asked to hold a NaN or Inf: what was written then means nothing. `scratch`: 16 floats per padded column.
// `error` is added to.
inline bool pack_panel(const Layout& layout, int64_t panel, const void* source, DType dtype, int64_t stride, bool search, uint8_t* weight,
                       uint8_t* scale, uint8_t* zero, float* scratch, PackError& error) {
  const PanelParts to{weight + panel * layout.weight_panel_bytes(), scale + panel * layout.scale_panel_bytes(),
                      zero + panel * layout.zero_panel_bytes()};
  if (layout.format == Format::bf16) {
    pack_bf16(layout, panel, source, dtype, stride, to.weight, scratch, error);
    return true;
  }
  const bool half = dtype != DType::f32;  // at most 11 bits: times a code, exact in float32
  const auto pack = layout.format == Format::int8 ? pack_codes<Scheme::bytes, false>
                    : layout.zero_point           ? (half ? pack_codes<Scheme::zero_point, true> : pack_codes<Scheme::zero_point, false>)
                                                  : (half ? pack_codes<Scheme::symmetric, true> : pack_codes<Scheme::symmetric, false>);
  return pack(layout, panel, source, dtype, stride, search, to, scratch, error);
}

}  // namespace
}  // namespace coterie

#ifdef __clang__
#pragma STDC FP_CONTRACT DEFAULT
#else
#pragma GCC pop_options
#endif
