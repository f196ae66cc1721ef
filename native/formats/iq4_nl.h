// iq4_nl: codes of a table that is not linear, an f16 scale for 32 columns.
#pragma once
#include "formats/searched.h"

namespace coterie {
namespace {

struct Iq4Nl : Searched<Iq4Nl, Iq4Codes, -127> {
  static constexpr float kExtremes[] = {-107.0f, -111.0f, -115.0f, -119.0f, -123.0f, -131.0f, -135.0f, 104.0f, 109.0f, 113.0f, 117.0f};
};

}  // namespace
}  // namespace coterie
