// iq4_nl: codes of a table that is not linear, an f16 scale for 32 columns. The scale is searched for.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

struct Iq4Nl {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Iq4Codes, F16Scale, 32, false, false, Iq4Nl>{});
  }

  // The extreme becomes the table's first entry, or one near its value: of the scales tried, and fitted by least squares to the codes that they
  // give, the one whose error is smallest as it will be stored.
  template <class E>
  static Grid choose(const float* values, int64_t count, int64_t, const Choice& choice, const Reach& reach) {
    constexpr float kExtreme[] = {-107.0f, -111.0f, -115.0f, -119.0f, -123.0f, -131.0f, -135.0f, 104.0f, 109.0f, 113.0f, 117.0f};
    Grid best{reach.extreme / -127.0f, Vector{}};
    if (!choice.search) return best;
    Vector least = error<E>(values, count, best.scale);
    for (const float extreme : kExtreme) {
      const Vector fitted = fit(values, count, quotient(extreme, reach.extreme)), found = error<E>(values, count, fitted);
      best.scale = found < least ? fitted : best.scale;
      least = found < least ? found : least;
    }
    return best;
  }

 private:
  // The scale that suits the codes of values / scale best.
  static Vector fit(const float* values, int64_t count, Vector inverse) {
    Vector wq{}, qq{};
    for (int64_t k = 0; k < count; k++) {
      const Vector w = load<Vector>(values + k * kLanes), q = Iq4Codes::rounded(w * inverse, Vector{});
      wq += w * q;
      qq += q * q;
    }
    return wq / qq;
  }

  template <class E>
  static Vector error(const float* values, int64_t count, Vector scale) {
    const Grid stored{E::Scale::stored(scale), Vector{}};
    const Vector inverse = stored.inverse();
    Vector sum{};
    for (int64_t k = 0; k < count; k++) {
      const Vector w = load<Vector>(values + k * kLanes), off = w - stored.scale * Iq4Codes::rounded(w * inverse, Vector{});
      sum += off * off;
    }
    return sum;
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
