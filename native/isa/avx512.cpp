#include "isa/generic.h"
#include "isa/simd_avx512.h"

namespace coterie {

const Kernels kAvx512 = Engine<Avx512>::kernels("avx512");

}  // namespace coterie
