// int4: nibbles with a scale, and perhaps a zero point, for a group of columns or a row. The scale is searched for.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

// The nearest int4 code.
inline Vector rounded(Vector x) { return NibbleCodes::rounded(x, Vector{}); }

// a * b + c where a * b is exact in float32, so that one rounding and two give the same.
inline Vector add_exact(Vector a, Vector b, Vector c) {
#ifdef __FP_FAST_FMAF
  for (int i = 0; i < kWidth; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// Symmetric: the extreme has code 0, so that the scale may be negative. With zero points: the range has codes 0..15.
template <bool zero_point>
inline Grid plain_grid(const Reach& r) {
  if constexpr (zero_point) {
    const Vector scale = (r.high - r.low) / 15.0f, zero = rounded(-r.low / scale);
    return {scale, scale > 0.0f ? zero : splat(8.0f)};
  } else {
    return {r.extreme / -8.0f, splat(8.0f)};
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
template <bool zero_point, bool exact>
inline Grid searched_grid(const float* values, int64_t count, const Reach& r, const Grid& plain) {
  Grid best = plain;
  Vector gain = splat(-1.0f);
  Vector inverse[5][kTogether], zero[5][kTogether];
  if constexpr (!zero_point) {
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

// sums[i]: the squared error of each row on grid[i].
template <int grids>
inline void nibble_errors(const float* values, int64_t count, const Grid* grid, Vector* sums) {
  Vector inverse[grids], sum[grids] = {};
  for (int i = 0; i < grids; i++) inverse[i] = grid[i].inverse();
  const Vector low = splat(kRound), high = splat(kRound + 15.0f);
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

struct Int4 {
  template <class F>
  static decltype(auto) with(const Layout& l, const F& f) {
    if (l.zero_point)
      return l.group ? f(Encoding<NibbleCodes, Bf16Scale, 0, true, false, Int4>{}) : f(Encoding<NibbleCodes, NoScale, 0, true, true, Int4>{});
    return l.group == 32 ? f(Encoding<NibbleCodes, Bf16Scale, 32, false, false, Int4>{})
           : l.group     ? f(Encoding<NibbleCodes, Bf16Scale, 0, false, false, Int4>{})
                         : f(Encoding<NibbleCodes, NoScale, 0, false, true, Int4>{});
  }

  template <class E>
  static Grid choose(const float* values, int64_t count, int64_t, const Choice& choice, const Reach& reach) {
    return choice.exact ? chosen<E, true>(values, count, choice.search, reach) : chosen<E, false>(values, count, choice.search, reach);
  }

 private:
  // exact: weights of at most 11 bits, whose products with codes are exact in float32.
  template <class E, bool exact>
  static Grid chosen(const float* values, int64_t count, bool search, const Reach& reach) {
    const Grid plain = plain_grid<E::kZero>(reach);
    if (!search) return plain;
    // Rounding the scale for storage can undo what the search gained.
    const Grid fitted = searched_grid<E::kZero, exact>(values, count, reach, plain), both[] = {stored<E>(plain), stored<E>(fitted)};
    Vector errors[2];
    nibble_errors<2>(values, count, both, errors);
    const auto better = errors[1] < errors[0];
    return {better ? fitted.scale : plain.scale, better ? fitted.zero : plain.zero};
  }

  template <class E>
  static Grid stored(Grid grid) {
    if constexpr (E::kStepScale) grid.scale = E::Scale::stored(grid.scale);
    return grid;
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
