// q2_k: 2 bits with a scale and a minimum for 16 columns.
#pragma once
#include "formats/minima.h"

namespace coterie {
namespace {

struct Q2K : WithMinima<Q2K, SplitCodes<2, 0>, NibblesAndMinima> {};

}  // namespace
}  // namespace coterie
