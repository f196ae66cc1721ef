#include "bind_linear.h"

#include <nanobind/stl/tuple.h>

namespace nb = nanobind;

namespace coterie {

void bind_linear(nb::module_& m) {
  nb::class_<PackedLinear>(m, "Linear")
      .def(nb::init<int64_t, const LayoutTuple&, uintptr_t, uintptr_t, nb::object>())
      .def("handle", &PackedLinear::handle)
      .def("compute", &PackedLinear::compute)
      .def("forward", &PackedLinear::forward)
      .def("backward", &PackedLinear::backward);
}

}  // namespace coterie
