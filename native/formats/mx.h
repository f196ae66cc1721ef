// The microscaling formats of the Open Compute Project: a power of two as the scale of 32 columns, the largest that leaves the exponent of the
// largest value within that of the codes (OCP Microscaling Formats 1.0, section 6.3).
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

template <class Family, class Codes>
struct Microscaled {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Codes, E8m0Scale, 32, false, false, Family>{});
  }

  template <class E>
  static void choose(const float* values, int64_t count, int64_t, const Choice&, Lanes& scale, Lanes& zero) {
    largest_magnitude(values, count, scale);
    for (int lane = 0; lane < kLanes; lane++) {
      const int exponent = static_cast<int>(float_to_bits(scale[lane]) >> 23) - Codes::kMostExponent;
      scale[lane] = bits_to_float(static_cast<uint32_t>(exponent < 1 ? 1 : exponent) << 23);
      zero[lane] = 0.0f;
    }
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
