// fp8_channel: e4m3 codes, one f32 scale for each row.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

struct Fp8Channel {
  static constexpr const char* kName = "fp8_channel";
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<E4m3Codes, NoScale, 0, false, true, Fp8Channel>{});
  }

  template <class E>
  static void choose(const float* values, int64_t count, int64_t, const Choice&, Lanes& scale, Lanes& zero) {
    largest_magnitude(values, count, scale);
    for (int lane = 0; lane < kLanes; lane++) scale[lane] /= E4m3Codes::kMost, zero[lane] = 0.0f;
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
