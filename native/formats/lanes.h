// Packing works on 16 rows side by side as lanes, so that every loop over `lane` is one vector operation.
#pragma once
#include <cstdint>
#include <cstring>

#include "formats/bfloat16.h"
#include "formats/layout.h"

namespace coterie {
namespace {

constexpr int kLanes = kPanelRows;
using Lanes = float[kLanes];

constexpr float kRound = 12582912.0f;  // adding it rounds to an integer, ties to even, for |x| < 2^22

inline float round_between(float x, float low, float high) {
  const float r = (x + kRound) - kRound;
  return r < low ? low : r > high ? high : r;
}

inline float bits_to_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

inline float magnitude(float x) { return x < 0 ? -x : x; }

// largest[lane] = the largest magnitude of the lane's `count` values.
inline void largest_magnitude(const float* values, int64_t count, Lanes& largest) {
  for (int lane = 0; lane < kLanes; lane++) largest[lane] = 0.0f;
  for (int64_t k = 0; k < count; k++)
    for (int lane = 0; lane < kLanes; lane++) {
      const float a = magnitude(values[k * kLanes + lane]);
      largest[lane] = a > largest[lane] ? a : largest[lane];
    }
}

}  // namespace
}  // namespace coterie
