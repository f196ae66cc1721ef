// iq4_xs: iq4_nl's codes with a scale for 32 columns, a whole number of 6 bits times that of 256 columns.
#pragma once
#include "formats/factors.h"

namespace coterie {
namespace {

struct Iq4Xs : WithFactors<Iq4Xs, Iq4Codes, SixBitScales<EightPlaces>, -127, -32> {
  static constexpr float kExtremes[] = {-107.0f, -111.0f, -115.0f, -119.0f, -123.0f, -127.0f, -131.0f, -135.0f, 104.0f, 109.0f, 113.0f, 117.0f};
};

}  // namespace
}  // namespace coterie
