// q5_0: 5 bits with an f16 scale for 32 columns. The scale is searched for.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

struct Q5_0 {
  using Codes = SplitCodes<5, 16>;

  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Codes, F16Scale, 32, false, false, Q5_0>{});
  }

  // The extreme has code 0, or one near it: of the scales tried, and fitted by least squares to the codes that they give, the one whose error is
  // smallest as it will be stored.
  template <class E>
  static Grid choose(const float* values, int64_t count, int64_t, const Choice& choice, const Reach& reach) {
    constexpr float kExtremes[] = {-14.6f, -15.0f, -15.4f, -15.8f, -16.2f, -16.6f};
    Grid best{reach.extreme / -16.0f, splat(16.0f)};
    if (!choice.search) return best;
    Vector least = error(values, count, best.scale);
    for (const float extreme : kExtremes) {
      const Vector fitted = fit(values, count, quotient(extreme, reach.extreme)), found = error(values, count, fitted);
      best.scale = found < least ? fitted : best.scale;
      least = found < least ? found : least;
    }
    return best;
  }

 private:
  static Vector fit(const float* values, int64_t count, Vector inverse) {
    Vector wq{}, qq{};
    for (int64_t k = 0; k < count; k++) {
      const Vector w = load<Vector>(values + k * kLanes), q = Codes::rounded(w * inverse, splat(16.0f));
      wq += w * q;
      qq += q * q;
    }
    return wq / qq;
  }

  static Vector error(const float* values, int64_t count, Vector scale) {
    const Grid stored{F16Scale::stored(scale), splat(16.0f)};
    const Vector inverse = stored.inverse();
    Vector sum{};
    for (int64_t k = 0; k < count; k++) {
      const Vector w = load<Vector>(values + k * kLanes), off = w - stored.scale * Codes::rounded(w * inverse, stored.zero);
      sum += off * off;
    }
    return sum;
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
