#include "isa/simd_avx2_vnni.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kAvx2Vnni = kernels_of<Avx2Vnni>("avx2_vnni");

}  // namespace coterie
