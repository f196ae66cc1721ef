// bf16: no scales.
#pragma once
#include "formats/encoding.h"

namespace coterie {
namespace {

struct Bf16 {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Bf16Codes, NoScale, 0, false, false, Bf16>{});
  }
};

}  // namespace
}  // namespace coterie
