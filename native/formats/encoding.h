// An encoding as the kernels see it, known when they are compiled: codes, scales, and where they stand.
#pragma once
#include "formats/scales.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

// Step: columns of a step; 0: the layout says. Zero: zero points are stored where the scales are, a byte a row.
// RowScale: an f32 for each row at the end of a block; where there is a scale in the steps as well, both are multiplied.
template <class CodesOf, class ScaleOf, int Step, bool Zero, bool RowScale, class FamilyOf>
struct Encoding {
  using Codes = CodesOf;
  using Scale = ScaleOf;
  using Family = FamilyOf;  // how weights are rounded to it: `choose`, for kWidth rows of a group, or of a step where its scales are a record
  static constexpr int kStep = Step;
  static constexpr bool kStepScale = Scale::kRowBytes + Scale::kBlockBytes > 0;
  static constexpr bool kRowScale = RowScale;
  static constexpr bool kZero = Zero, kStepZero = Zero && kStepScale, kRowZero = Zero && !kStepScale;
  static constexpr int kRunColumns = 32 / (Codes::kHighBits ? Codes::kHighBits : Codes::kBits), kRunLines = kRunColumns * Codes::kBits / 32;
  static constexpr int kScales = Scale::kCount;  // of a row in a step
  static constexpr int kRunScales = Step && Step / kScales < kRunColumns ? kRunColumns * kScales / Step : 1;  // of a row in a run, each of as many columns
  static_assert(Step == 0 || Step / kScales * kRunScales % kRunColumns == 0, "the columns of a scale are whole runs, or those of a run are of whole scales");
  static constexpr bool kMinimum = Scale::kMinimum;
  static constexpr bool kNarrow = Codes::kBits < 8 && kStepScale;
  static constexpr bool kRecord = Scale::kRecord;
  // Products need the sums of activations.
  static constexpr bool kSums = kZero || kMinimum;
  // Codes with stored zero points are no pairs without them.
  static constexpr bool kFused = !Zero;

  // What stands beside the codes of a step, at `tail`, and at the end of a block of `panels`, for a panel.
  static const uint8_t* step_scale(const uint8_t* tail, int panel) { return tail + panel * kPanelRows * Scale::kRowBytes; }
  static const uint8_t* step_zero(const uint8_t* tail, int panels, int panel) {
    return tail + Scale::kBlockBytes + panels * kPanelRows * Scale::kRowBytes + panel * kPanelRows;
  }
  // Number `group` of a panel's scales in a step, and the minimum that is taken off, 0 where there are none.
  template <class Isa>
  static typename Isa::F scale(const uint8_t* tail, int panel, int group) {
    if constexpr (kRecord)
      return typename Scale::template Panel<Isa>(step_scale(tail, panel)).scale(group);
    else
      return Scale::template load<Isa>(step_scale(tail, panel));
  }
  template <class Isa>
  static typename Isa::F minimum(const uint8_t* tail, int panel, int group) {
    if constexpr (kMinimum)
      return typename Scale::template Panel<Isa>(step_scale(tail, panel)).minimum(group);
    else
      return Isa::zero();
  }
  static const uint8_t* row_scale(const uint8_t* end, int panel) { return end + panel * kPanelRows * 4; }
  static const uint8_t* row_zero(const uint8_t* end, int panels, int panel) { return end + panels * kPanelRows * 4 + panel * kPanelRows; }
};

// What weights are rounded with, besides themselves.
struct Choice {
  bool search;               // look for better scales than those of the extreme values
  const float* tile_largest; // largest magnitude of each tile of 128 rows and a step's columns, for these rows
  float largest;             // of the matrix
  bool exact;                // products of weights and small integers are exact in float32: weights were bf16 or fp16
};

// Rows of a group, the columns that share a scale, become codes round(w / scale, zero), which stand for scale * rounded(w / scale, zero). Where there are
// minima, w is w + minimum, and what the codes stand for less minimum.
struct Grid {
  Vector scale, zero, minimum{};

  Vector inverse() const { return quotient(1.0f, scale); }
};

// The smallest and largest weight of each row of a group, with 0 among them, and the first of largest magnitude.
struct Reach {
  Vector low{}, high{}, extreme{};
  Ints magnitude{};  // as bits: those of a NaN or Inf are larger than any number's

  Vector largest() const { return reinterpret_cast<Vector>(magnitude); }
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

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
