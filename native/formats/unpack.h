// Plain C++ between a packed matrix and the values and codes it was made of, element by element: the other direction of isa/pack.h.
#pragma once
#include "formats/layout.h"

namespace coterie {

// The float32 values that blocks [begin, end) stand for; `to` is [rows, cols], row-major.
void unpack_blocks(const Layout& layout, const uint8_t* matrix, int64_t begin, int64_t end, float* to);

// Codes, scales and zero points of somebody else's, row-major: codes one to an element, scales as the encoding stores them, those of a row in a step
// together.
struct Codes {
  const uint8_t* codes;   // [rows, cols], a byte or, for 16 bits, two
  const uint8_t* scale;   // [rows, or tiles of 128 rows][steps of the unpadded columns]; null where there are none in steps
  const uint8_t* zero;    // [rows][steps], or [rows]
  const float* row_scale; // [rows]
};

// Packs blocks [begin, end) without loss; false where a code or scale stands for no finite number.
bool pack_codes_of_blocks(const Layout& layout, const Codes& source, int64_t begin, int64_t end, uint8_t* matrix);

}  // namespace coterie
