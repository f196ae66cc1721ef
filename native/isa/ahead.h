// What a tile fetches into the caches while it multiplies: lines that will be wanted later, `runs` of them every 2^shift lines of weights.
#pragma once
#include "isa/kernels.h"

namespace coterie {
namespace {

struct Ahead {
  const uint8_t* from = nullptr;
  int runs = 0, shift = 0;

  template <class Isa>
  void line(int64_t line) const {
    for (int r = 0; r < runs; r++) Isa::prefetch(from + ((line >> shift) * runs + r) * kLine);
  }
};

}  // namespace
}  // namespace coterie
