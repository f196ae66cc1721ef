// Weights around 0: a scale for a few columns, which is a whole number, of either sign, times an f16 for 256 columns. The scales are searched for.
#pragma once
#include "formats/fit.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

// The extreme of a group becomes `extreme`, so that its scale may be negative, and the extreme scale is `least` times the f16, the others at most
// -least - 1 times.
template <class Family, class CodesOf, class Scales, int extreme, int least>
struct WithFactors {
  using Codes = CodesOf;
  static constexpr int kGroups = Scales::kCount, kColumns = 256 / kGroups;

  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Codes, Scales, 256, false, false, Family>{});
  }

  // With `search`, scales that suit the weights better are looked for, and kept in the rows whose error they make smaller.
  template <class E>
  static void choose(const float* values, bool search, const Reach (&reaches)[kGroups], Grid (&grids)[kGroups], uint8_t* panel, int lane) {
    Vector scale[kGroups];
    for (int g = 0; g < kGroups; g++) scale[g] = reaches[g].extreme / static_cast<float>(extreme);
    Whole best = whole(scale);
    if (search) {
      for (int g = 0; g < kGroups; g++) fit(values + g * kColumns * kLanes, reaches[g], scale[g]);
      const Whole found = whole(scale);
      const auto better = error(values, found) < error(values, best);
      best.scale = better ? found.scale : best.scale;
      for (int g = 0; g < kGroups; g++) best.factor[g] = better ? found.factor[g] : best.factor[g];
    }
    Words factors[kGroups];
    for (int g = 0; g < kGroups; g++) {
      grids[g] = best.grid(g);
      factors[g] = without_round(best.factor[g] - static_cast<float>(least) + kRound);
    }
    Scales::store(best.scale, factors, panel, lane);
  }

 private:
  // Scales as they are stored, the whole numbers as floats.
  struct Whole {
    Vector scale, factor[kGroups];

    Grid grid(int g) const { return {scale * factor[g], splat(Codes::kOffset)}; }
  };

  static Whole whole(const Vector (&scale)[kGroups]) {
    constexpr float kLeast = least;
    Vector largest{}, most{};
    for (const Vector& v : scale) {
      const Vector size = from_bits(bits_of(v) & 0x7fffffffu);
      largest = size > most ? v : largest;
      most = size > most ? size : most;
    }
    Whole w{F16Scale::stored(largest / kLeast), {}};
    const Vector inverse = quotient(1.0f, w.scale);
    for (int g = 0; g < kGroups; g++) w.factor[g] = nearest(scale[g] * inverse - kLeast, 0.0f, -2.0f * kLeast - 1.0f) - (kRound - kLeast);
    return w;
  }

  // Of scales that bring the extreme near what it becomes, the one that suits its codes best, by least squares.
  static void fit(const float* values, const Reach& reach, Vector& scale) {
    Vector best = splat(-1.0f);
    for (const float value : Family::kExtremes) {
      const Fit found = fitted<Codes>(values, kColumns, quotient(value, reach.extreme));
      const auto better = found.gain > best;
      scale = better ? found.scale : scale;
      best = better ? found.gain : best;
    }
  }

  static Vector error(const float* values, const Whole& of) {
    return squared_error<Codes, kGroups>(values, kColumns, [&](int g) { return of.grid(g); });
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
