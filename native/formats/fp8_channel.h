// fp8_channel: e4m3 codes, one f32 scale for each row.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

struct Fp8Channel {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<E4m3Codes, NoScale, 0, false, true, Fp8Channel>{});
  }

  template <class E>
  static Grid choose(const float*, int64_t, int64_t, const Choice&, const Reach& reach) {
    return {reach.largest() / E4m3Codes::kMost, Vector{}};
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
