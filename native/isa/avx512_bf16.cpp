#include "isa/generic.h"
#include "isa/simd_avx512_bf16.h"

namespace coterie {

const Kernels kAvx512Bf16 = Engine<Avx512Bf16>::kernels("avx512_bf16");

}  // namespace coterie
