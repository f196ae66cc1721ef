// nvfp4: e2m1 codes, an e4m3 scale for 16 columns, and one f32 for the matrix, which makes the largest of those scales 448.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

struct Nvfp4 {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<E2m1Codes, E4m3Scale, 16, false, true, Nvfp4>{});
  }

  static float matrix_scale(const Choice& choice) { return choice.largest / (E2m1Codes::kMost * E4m3Codes::kMost); }

  template <class E>
  static Grid choose(const float*, int64_t, int64_t, const Choice& choice, const Reach& reach) {
    const float matrix = matrix_scale(choice);
    return {matrix > 0.0f ? reach.largest() / E2m1Codes::kMost / matrix : Vector{}, Vector{}};
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
