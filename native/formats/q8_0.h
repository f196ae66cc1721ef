// q8_0: int8 in groups of 32, its scales in f16.
#pragma once
#include "formats/int8.h"

namespace coterie {
namespace {

struct Q8_0 {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<ByteCodes, F16Scale, 32, false, false, Int8>{});
  }
};

}  // namespace
}  // namespace coterie
