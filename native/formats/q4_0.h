// q4_0: int4 without zero points in groups of 32, its scales in f16.
#pragma once
#include "formats/int4.h"

namespace coterie {
namespace {

struct Q4_0 {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<NibbleCodes, F16Scale, 32, false, false, Int4>{});
  }
};

}  // namespace
}  // namespace coterie
