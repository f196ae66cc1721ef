#include "isa/amx_tiles.h"
#include "isa/simd_amx.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kAmx = kernels_of<Amx<AmxTiles>>("amx");

}  // namespace coterie
