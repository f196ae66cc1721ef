#include "isa/simd_avx512_vnni.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kAvx512Vnni = kernels_of<Avx512Vnni>("avx512_vnni");

}  // namespace coterie
