// int8: the largest magnitude of a row, or of a group of its columns, is code 127.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

struct Int8 {
  template <class F>
  static decltype(auto) with(const Layout& l, const F& f) {
    return l.group ? f(Encoding<ByteCodes, Bf16Scale, 0, false, false, Int8>{}) : f(Encoding<ByteCodes, NoScale, 0, false, true, Int8>{});
  }

  template <class E>
  static Grid choose(const float*, int64_t, int64_t, const Choice&, const Reach& reach) {
    return {reach.largest() / 127.0f, splat(128.0f)};
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
