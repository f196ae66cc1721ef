// q5_0: 5 bits with an f16 scale for 32 columns.
#pragma once
#include "formats/searched.h"

namespace coterie {
namespace {

struct Q5_0 : Searched<Q5_0, SplitCodes<5, 16>, -16> {
  static constexpr float kExtremes[] = {-14.6f, -15.0f, -15.4f, -15.8f, -16.2f, -16.6f};
};

}  // namespace
}  // namespace coterie
