// A head of queries or keys, normed and turned to its position (see Head).
#pragma once
#include "formats/bfloat16.h"
#include "isa/generic.h"
#include "isa/kernels.h"

namespace coterie {
namespace {

template <class Isa>
void turn(const Head& head, float* scratch) {
  const auto load = [&](const uint8_t* row, int64_t i) {
    return head.dtype == DType::bf16 ? Isa::load_bf16(row + 2 * i) : Isa::load(reinterpret_cast<const float*>(row) + i);
  };
  const auto value = [&](const uint8_t* row, int64_t i) {
    return head.dtype == DType::bf16 ? bf16_to_float(reinterpret_cast<const uint16_t*>(row)[i]) : reinterpret_cast<const float*>(row)[i];
  };
  float *x = scratch, *to = scratch + head.dim;
  for (int64_t i = 0; i < head.dim; i += kLanes) {
    auto columns = Isa::mul(load(head.from, i), Isa::set1(head.scale));
    if (head.weight) columns = Isa::mul(columns, Isa::load(head.weight + i));
    Isa::store(x + i, columns);
    Isa::store(to + i, columns);
  }
  const int64_t half = head.turned / 2;
  const auto minus = Isa::set1(-1.0f);
  int64_t i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const auto a = Isa::load(x + i), b = Isa::load(x + half + i);
    Isa::store(to + i, Isa::fma(Isa::mul(b, minus), load(head.sin, i), Isa::mul(a, load(head.cos, i))));
    Isa::store(to + half + i, Isa::fma(a, load(head.sin, head.twin + i), Isa::mul(b, load(head.cos, head.twin + i))));
  }
  for (; i < half; i++) {
    to[i] = x[i] * value(head.cos, i) - x[half + i] * value(head.sin, i);
    to[half + i] = x[half + i] * value(head.cos, head.twin + i) + x[i] * value(head.sin, head.twin + i);
  }
  Engine<Isa>::store(to, head.dim, head.to, head.dtype);
}

}  // namespace
}  // namespace coterie
