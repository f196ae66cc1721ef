#include "isa/simd_avx2.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kAvx2 = kernels_of<Avx2>("avx2");

}  // namespace coterie
