#include "isa/simd_avx512_bf16.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kAvx512Bf16 = kernels_of<Avx512Bf16>("avx512_bf16");

}  // namespace coterie
