#include "isa/generic.h"
#include "isa/simd_avx2.h"

namespace coterie {

const Kernels kAvx2 = Engine<Avx2>::kernels("avx2");

}  // namespace coterie
