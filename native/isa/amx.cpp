#include "isa/amx_tiles.h"
#include "isa/generic.h"
#include "isa/simd_amx.h"

namespace coterie {

const Kernels kAmx = Engine<Amx<AmxTiles>>::kernels("amx");

}  // namespace coterie
