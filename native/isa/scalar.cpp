#include "isa/simd_scalar.h"
#include "isa/variant.h"

namespace coterie {

const Kernels kScalar = kernels_of<Scalar>("scalar");

}  // namespace coterie
