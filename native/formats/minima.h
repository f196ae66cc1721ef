// Weights in a range of their own for a few columns: a scale and a minimum, which are whole numbers times those of 256 columns, or f16.
#pragma once
#include "formats/fit.h"

#pragma GCC push_options
#pragma GCC optimize("fp-contract=off")

namespace coterie {
namespace {

// Of ranges that begin with the smallest weight, the scale and minimum that suit their codes best, by least squares.
template <class Codes, int kColumns>
inline void fit_range(const float* values, const Reach& reach, Vector& scale, Vector& minimum) {
  constexpr float kMore[] = {-1.25f, -1.0f, -0.75f, -0.5f, -0.25f, 0.0f, 0.25f, 0.5f, 0.75f}, kCount = kColumns;
  Vector best = splat(-1.0f);
  for (const float more : kMore) {
    const Vector inverse = quotient(Codes::kMost + more, reach.high - reach.low);
    Vector q_sum{}, qq{}, w_sum{}, wq{};
    for (int64_t k = 0; k < kColumns; k++) {
      const Vector w = load<Vector>(values + k * kLanes), q = nearest((w - reach.low) * inverse, 0.0f, Codes::kMost) - kRound;
      q_sum += q;
      qq += q * q;
      w_sum += w;
      wq += w * q;
    }
    const Vector spread = kCount * qq - q_sum * q_sum, slope = (kCount * wq - q_sum * w_sum) / spread, below = (slope * q_sum - w_sum) / kCount;
    const auto positive = below > 0.0f;
    const Vector s = positive ? slope : wq / qq, m = positive ? below : Vector{};
    // By how much that is better than zeros.
    const Vector gain = s * (2.0f * wq - s * qq) + m * (2.0f * (s * q_sum - w_sum) - kCount * m);
    const auto better = gain > best;
    scale = better ? s : scale;
    minimum = better ? m : minimum;
    best = better ? gain : best;
  }
}

template <class Family, class Codes, class Scales = ScalesAndMinima>
struct WithMinima {
  static constexpr int kGroups = Scales::kCount, kColumns = 256 / kGroups;

  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Codes, Scales, 256, false, false, Family>{});
  }

  // The range from the smallest to the largest weight, widened to hold 0, has all codes. With `search`, ranges that suit the weights better are looked for,
  // and kept in the rows whose error they make smaller.
  template <class E>
  static void choose(const float* values, bool search, const Reach (&reaches)[kGroups], Grid (&grids)[kGroups], uint8_t* panel, int lane) {
    Vector scale[kGroups], minimum[kGroups];
    for (int g = 0; g < kGroups; g++) scale[g] = (reaches[g].high - reaches[g].low) / Codes::kMost, minimum[g] = -reaches[g].low;
    Whole best = whole(scale, minimum);
    if (search) {
      for (int g = 0; g < kGroups; g++) fit_range<Codes, kColumns>(values + g * kColumns * kLanes, reaches[g], scale[g], minimum[g]);
      Whole found = whole(scale, minimum);
      for (int g = 0; g < kGroups; g++) settle(values + g * kColumns * kLanes, found, g);
      const auto better = error(values, found) < error(values, best);
      auto take = [&](auto& to, auto from) { to = better ? from : to; };
      take(best.scale, found.scale), take(best.minimum, found.minimum);
      for (int g = 0; g < kGroups; g++) take(best.of_scale[g], found.of_scale[g]), take(best.of_minimum[g], found.of_minimum[g]);
    }
    for (int g = 0; g < kGroups; g++) grids[g] = best.grid(g);
    Words of_scale[kGroups], of_minimum[kGroups];
    for (int g = 0; g < kGroups; g++) of_scale[g] = without_round(best.of_scale[g] + kRound), of_minimum[g] = without_round(best.of_minimum[g] + kRound);
    Scales::store(best.scale, best.minimum, of_scale, of_minimum, panel, lane);
  }

 private:
  static constexpr float kFactor = Scales::kFactor;

  // Scales and minima as they are stored, the whole numbers as floats.
  struct Whole {
    Vector scale, minimum, of_scale[kGroups], of_minimum[kGroups];

    Grid grid(int g) const { return {scale * of_scale[g], Vector{}, minimum * of_minimum[g]}; }
  };

  static Vector factor(Vector part, Vector inverse) { return nearest(part * inverse, 0.0f, kFactor) - kRound; }

  static Whole whole(const Vector (&scale)[kGroups], const Vector (&minimum)[kGroups]) {
    auto largest = [](const Vector(&of)[kGroups]) {
      Vector most{};
      for (const Vector& v : of) most = v > most ? v : most;
      return F16Scale::stored(most / kFactor);
    };
    Whole w{largest(scale), largest(minimum), {}, {}};
    const Vector inverse = quotient(1.0f, w.scale), inverse_minimum = quotient(1.0f, w.minimum);
    for (int g = 0; g < kGroups; g++) w.of_scale[g] = factor(scale[g], inverse), w.of_minimum[g] = factor(minimum[g], inverse_minimum);
    return w;
  }

  // The minimum of a group that suits its codes best, now that its scale is rounded.
  static void settle(const float* values, Whole& of, int g) {
    const Grid grid = of.grid(g);
    const Vector inverse = grid.inverse();
    Vector above{};
    for (int64_t k = 0; k < kColumns; k++) {
      const Vector w = load<Vector>(values + k * kLanes);
      above += grid.scale * Codes::rounded((w + grid.minimum) * inverse, Vector{}) - w;
    }
    of.of_minimum[g] = factor(above / static_cast<float>(kColumns), quotient(1.0f, of.minimum));
  }

  static Vector error(const float* values, const Whole& of) {
    return squared_error<Codes, kGroups>(values, kColumns, [&](int g) { return of.grid(g); });
  }
};

// The same with a scale and a minimum in f16 for each 32 columns.
template <class Family, class Codes>
struct WithStart {
  template <class F>
  static decltype(auto) with(const Layout&, const F& f) {
    return f(Encoding<Codes, ScaleAndStart, 32, false, false, Family>{});
  }

  template <class E>
  static void choose(const float* values, bool search, const Reach (&reaches)[1], Grid (&grids)[1], uint8_t* panel, int lane) {
    const Reach& reach = reaches[0];
    grids[0] = stored((reach.high - reach.low) / Codes::kMost, -reach.low);
    if (search) {
      Vector scale = grids[0].scale, minimum = grids[0].minimum;
      fit_range<Codes, 32>(values, reach, scale, minimum);
      const Grid found = stored(scale, minimum);
      const auto better = error(values, found) < error(values, grids[0]);
      grids[0].scale = better ? found.scale : grids[0].scale;
      grids[0].minimum = better ? found.minimum : grids[0].minimum;
    }
    ScaleAndStart::store(grids[0].scale, grids[0].minimum, panel, lane);
  }

 private:
  static Grid stored(Vector scale, Vector minimum) { return {F16Scale::stored(scale), Vector{}, F16Scale::stored(minimum)}; }

  static Vector error(const float* values, const Grid& grid) {
    return squared_error<Codes, 1>(values, 32, [&](int) { return grid; });
  }
};

}  // namespace
}  // namespace coterie

#pragma GCC pop_options
