// fp8_block: e4m3 codes, one f32 scale for each tile of 128 rows and 128 columns.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

struct Fp8Block {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<E4m3Codes, BlockScale, 128, false, false, Fp8Block>{});
  }

  template <class E>
  static Grid choose(const float*, int64_t, int64_t step, const Choice& choice, const Reach&) {
    return {splat(choice.tile_largest[step] / E4m3Codes::kMost), Vector{}};
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
