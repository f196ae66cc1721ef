// What the parts of the Python module share.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <tuple>

#include "formats/layout.h"

namespace coterie {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using LayoutTuple = std::tuple<int, int64_t, int64_t, int64_t, bool>;  // format, rows, cols, group, zero point

inline Layout layout_of(const LayoutTuple& t) {
  return {static_cast<Format>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

void bind_layer(nanobind::module_& m);

}  // namespace coterie
