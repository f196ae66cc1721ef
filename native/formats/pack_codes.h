// Codes of somebody else's into a packed matrix, without loss. isa/pack.h packs floats.
#pragma once
#include "formats/layout.h"

namespace coterie {

// Codes, scales and zero points, row-major: codes one to an element, scales as the encoding stores them, those of a row in a step together.
struct Codes {
  const uint8_t* codes;    // [rows, cols], a byte or, for 16 bits, two
  const uint8_t* scale;    // [rows, or tiles of 128 rows][steps of the unpadded columns]; null where there are none in steps
  const uint8_t* zero;     // [rows][steps], or [rows]
  const float* row_scale;  // [rows]
};

// Packs a block; false where a code or scale stands for no finite number: what was written is of no use then.
bool pack_codes_of_block(const Layout& layout, const Codes& source, int64_t block, uint8_t* matrix);

}  // namespace coterie
