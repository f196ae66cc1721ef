// Least squares: the scale that suits codes best, and how far codes are from their weights.
#pragma once
#include "formats/encoding.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

// Of the codes that weights have by the inverse of a scale: the scale s whose error is least, <w,q> / <q,q>, and by how much it is less than that of
// zeros, s <w,q>.
struct Fit {
  Vector scale, gain;
};

template <class Codes>
inline Fit fitted(const float* values, int64_t columns, Vector inverse) {
  Vector wq{}, qq{};
  for (int64_t k = 0; k < columns; k++) {
    const Vector w = load<Vector>(values + k * kLanes), q = Codes::rounded(w * inverse, splat(Codes::kOffset));
    wq += w * q;
    qq += q * q;
  }
  const Vector scale = wq / qq;
  return {scale, scale * wq};
}

// The squared error of each row, `columns` on each of grid(0), grid(1), ... grid(groups - 1).
template <class Codes, int groups, class GridOf>
inline Vector squared_error(const float* values, int64_t columns, const GridOf& grid_of) {
  Vector sum{};
  for (int g = 0; g < groups; g++) {
    const Grid grid = grid_of(g);
    const Vector inverse = grid.inverse();
    for (int64_t k = 0; k < columns; k++, values += kLanes) {
      const Vector w = load<Vector>(values) + grid.minimum, off = w - grid.scale * Codes::rounded(w * inverse, grid.zero);
      sum += off * off;
    }
  }
  return sum;
}

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
