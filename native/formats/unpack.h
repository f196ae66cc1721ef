// The float32 values that a packed matrix stands for, element by element: the other direction of isa/pack.h.
#pragma once
#include "formats/layout.h"

namespace coterie {

// `to` is [rows, cols], row-major; rows of panels [begin, end).
void unpack_panels(const Layout& layout, const Matrix& matrix, int64_t begin, int64_t end, float* to);

}  // namespace coterie
