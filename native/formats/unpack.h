// Plain C++ out of a packed matrix to the values that it stands for, element by element: the other direction of isa/pack.h and pack_codes.h.
#pragma once
#include "formats/layout.h"

namespace coterie {

// The float32 values that blocks [begin, end) stand for; `to` is [rows, cols], row-major.
void unpack_blocks(const Layout& layout, const uint8_t* matrix, int64_t begin, int64_t end, float* to);

}  // namespace coterie
