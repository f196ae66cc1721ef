// What a tile fetches into the caches while it multiplies.
#pragma once
#include "isa/kernels.h"

namespace coterie {
namespace {

struct FetchNothing {
  template <class Isa>
  void line(int64_t) const {}
};

// Runs of memory that will be wanted later; one line of each is fetched every 2^shift lines of weights.
template <int Runs>
struct FetchRuns {
  const uint8_t* from[Runs];
  int shift;

  template <class Isa>
  void line(int64_t line) const {
#pragma GCC unroll 4
    for (int r = 0; r < Runs; r++) Isa::prefetch(from[r] + (line >> shift) * kLine);
  }
};

// What a tile `Panels` wide comes to a little later, in its panels or in those that follow: for weights that are read once.
// Measured over 0.5 to 6 KB of each of four panels: 1.5 is best.
template <int Panels>
struct FetchSoon {
  static constexpr int64_t kDistance = 6144 / Panels;
  const uint8_t *now[Panels], *next[Panels];
  int64_t bytes;  // of a panel

  template <class Isa>
  void line(int64_t line) const {
    const int64_t at = line * kLine + kDistance;
#pragma GCC unroll 4
    for (int p = 0; p < Panels; p++) Isa::prefetch((at < bytes ? now[p] : next[p] - bytes) + at);
  }
};

}  // namespace
}  // namespace coterie
