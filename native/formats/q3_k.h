// q3_k: 3 bits with a scale for 16 columns, a whole number of 6 bits times that of 256 columns.
#pragma once
#include "formats/factors.h"

namespace coterie {
namespace {

struct Q3K : WithFactors<Q3K, SplitCodes<3, 4>, SixBitScales<SixteenPlaces>, -4, -32> {
  static constexpr float kExtremes[] = {-2.7f, -3.1f, -3.5f, -3.9f, -4.3f, -4.7f};
};

}  // namespace
}  // namespace coterie
