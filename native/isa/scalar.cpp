#include "isa/generic.h"
#include "isa/simd_scalar.h"

namespace coterie {

const Kernels kScalar = Engine<Scalar>::kernels("scalar");

}  // namespace coterie
