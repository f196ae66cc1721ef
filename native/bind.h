// What the parts of the Python module share.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <tuple>

#include "formats/encodings.h"

namespace coterie {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using LayoutTuple = std::tuple<int, int64_t, int64_t, int64_t, bool>;  // encoding, rows, cols, group, zero point

inline Layout layout_from(const LayoutTuple& t) { return std::apply([](auto... part) { return layout_of(part...); }, t); }

// How a router chooses from sigmoids: correction [E], groups of experts, how many of them are kept, scale of the weights, whether logits are float32
using ScoresTuple = std::tuple<nanobind::handle, int64_t, int64_t, float, bool>;

void bind_attention(nanobind::module_& m);
void bind_decode(nanobind::module_& m);
void bind_delta(nanobind::module_& m);
void bind_latent(nanobind::module_& m);
void bind_layer(nanobind::module_& m);
void bind_linear(nanobind::module_& m);
void bind_stream_call(nanobind::module_& m);
void bind_tickets(nanobind::module_& m);

}  // namespace coterie
