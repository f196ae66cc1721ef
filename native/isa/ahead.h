// What a tile fetches into the caches while it multiplies.
#pragma once
#include "isa/kernels.h"

namespace coterie {
namespace {

// Lines that will be wanted later: `runs` of them every 2^shift lines of weights, from `from` on.
struct Ahead {
  const uint8_t* from = nullptr;
  int runs = 0, shift = 0;

  // For `wanted` lines, shared out over `lines` of weights.
  void spread(int64_t wanted, int64_t lines) {
    runs = shift = 0;
    while (runs < kBlockPanels && wanted > runs * lines) runs++;
    while (wanted && (lines >> (shift + 1)) * runs >= wanted) shift++;
  }

  template <class Isa>
  void line(int64_t line) const {
    for (int r = 0; r < runs; r++) Isa::prefetch(from + ((line >> shift) * runs + r) * kLine);
  }
};

}  // namespace
}  // namespace coterie
