// Weights around 0 with an f16 scale for 32 columns, which is searched for.
#pragma once
#include "formats/fit.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

// The extreme becomes `extreme`, or one of Family::kExtremes: of the scales tried, and fitted to the codes that they give, the one whose error is smallest
// as it will be stored.
template <class Family, class Codes, int extreme>
struct Searched {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Codes, F16Scale, 32, false, false, Family>{});
  }

  template <class E>
  static Grid choose(const float* values, int64_t count, int64_t, const Choice& choice, const Reach& reach) {
    Grid best{reach.extreme / static_cast<float>(extreme), splat(Codes::kOffset)};
    if (!choice.search) return best;
    Vector least = error(values, count, best.scale);
    for (const float other : Family::kExtremes) {
      const Vector scale = fitted<Codes>(values, count, quotient(other, reach.extreme)).scale, found = error(values, count, scale);
      best.scale = found < least ? scale : best.scale;
      least = found < least ? found : least;
    }
    return best;
  }

 private:
  static Vector error(const float* values, int64_t count, Vector scale) {
    return squared_error<Codes, 1>(values, count, [&](int) { return Grid{F16Scale::stored(scale), splat(Codes::kOffset)}; });
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
