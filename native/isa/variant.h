// The kernels of one instruction set as a table. Included by the source file of each, which is compiled with that set's flags; everything behind
// it has internal linkage, so that no code compiled for one instruction set is shared with another.
#pragma once
#include "isa/attend.h"
#include "isa/attend_rows.h"
#include "isa/delta.h"
#include "isa/generic.h"
#include "isa/heads.h"
#include "isa/plain.h"
#include "isa/train.h"

namespace coterie {
namespace {

template <class Isa>
constexpr Kernels kernels_of(const char* name) {
  using E = Engine<Isa>;
  using T = Trainer<Isa>;
  return {name,
          Isa::kFloatBytes,
          Isa::kIntegerBytes + Isa::kShortBytes,
          E::stage,
          E::multiply,
          E::store,
          pack_panel,
          largest_of_tiles,
          T::low_rank,
          T::lora_gradient,
          Attend<Isa>::attend,
          Plain<Isa>::multiply,
          Plain<Isa>::sum,
          turn<Isa>,
          AttendRows<Isa>::pack,
          AttendRows<Isa>::attend,
          Delta<Isa>::convolve,
          Delta<Isa>::rule,
          Isa::dots,
          E::read,
          Isa::kFloatMacs,
          Isa::kIntegerMacs};
}

}  // namespace
}  // namespace coterie
