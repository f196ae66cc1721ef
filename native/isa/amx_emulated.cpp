#include "isa/amx_tiles_emulated.h"
#include "isa/simd_amx.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kAmxEmulated = kernels_of<Amx<EmulatedTiles>>("amx_emulated");

}  // namespace coterie
