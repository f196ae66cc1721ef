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
  static Grid choose(const float*, int64_t, int64_t, const Choice&, const Reach& reach) {
    const Ints exponent = (reach.magnitude >> 23) - Codes::kMostExponent, least = Ints{} + 1;
    return {reinterpret_cast<Vector>((exponent < least ? least : exponent) << 23), Vector{}};
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
