#include "isa/amx_tiles_emulated.h"
#include "isa/generic.h"
#include "isa/simd_amx.h"

namespace coterie {

const Kernels kAmxEmulated = Engine<Amx<EmulatedTiles>>::kernels("amx_emulated");

}  // namespace coterie
