// q5_k: 5 bits with a scale and a minimum for 32 columns, as q4_k has them.
#pragma once
#include "formats/minima.h"

namespace coterie {
namespace {

struct Q5K : WithMinima<Q5K, SplitCodes<5, 0>> {};

}  // namespace
}  // namespace coterie
