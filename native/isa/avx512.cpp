#include "isa/simd_avx512.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kAvx512 = kernels_of<Avx512>("avx512");

}  // namespace coterie
