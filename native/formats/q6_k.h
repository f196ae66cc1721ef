// q6_k: 6 bits with a scale for 16 columns, a whole number of 8 bits times that of 256 columns.
#pragma once
#include "formats/factors.h"

namespace coterie {
namespace {

struct Q6K : WithFactors<Q6K, SplitCodes<6, 32>, ByteScales, -32, -128> {
  static constexpr float kExtremes[] = {-30.5f, -31.0f, -31.5f, -32.0f, -32.4f, -33.0f};
};

}  // namespace
}  // namespace coterie
