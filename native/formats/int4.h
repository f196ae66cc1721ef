// int4: nibbles with a scale, and perhaps a zero point, for a group of columns or a row. The scale is searched for.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

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

struct Int4 {
  static constexpr const char* kName = "int4";
  template <class F>
  static decltype(auto) with(const Layout& l, const F& f) {
    if (l.zero_point)
      return l.group ? f(Encoding<NibbleCodes, Bf16Scale, 0, true, false, Int4>{}) : f(Encoding<NibbleCodes, NoScale, 0, true, true, Int4>{});
    return l.group == 32 ? f(Encoding<NibbleCodes, Bf16Scale, 32, false, false, Int4>{})
           : l.group     ? f(Encoding<NibbleCodes, Bf16Scale, 0, false, false, Int4>{})
                         : f(Encoding<NibbleCodes, NoScale, 0, false, true, Int4>{});
  }

  template <class E>
  static void choose(const float* values, int64_t count, int64_t, const Choice& choice, Lanes& scale, Lanes& zero) {
    const auto pick = E::kZero ? scale_zero_point : scale_symmetric;
    pick(values, count, false, scale, zero);
    if (!choice.search) return;
    // Rounding the scale for storage can undo what the search gained.
    Lanes fitted, fitted_zero, before, after;
    pick(values, count, true, fitted, fitted_zero);
    squared_error<E>(values, count, scale, zero, before);
    squared_error<E>(values, count, fitted, fitted_zero, after);
    for (int lane = 0; lane < kLanes; lane++) {
      const bool better = after[lane] < before[lane];
      scale[lane] = better ? fitted[lane] : scale[lane];
      zero[lane] = better ? fitted_zero[lane] : zero[lane];
    }
  }

 private:
  template <class E>
  static void squared_error(const float* values, int64_t count, const Lanes& scale, const Lanes& zero, Lanes& sum) {
    Lanes stored;
    for (int lane = 0; lane < kLanes; lane++) stored[lane] = stored_scale<E>(scale[lane]);
    coterie::squared_error<typename E::Codes>(values, count, stored, zero, sum);
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
