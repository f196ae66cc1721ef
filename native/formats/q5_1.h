// q5_1: 5 bits with a scale and a minimum in f16 for 32 columns.
#pragma once
#include "formats/minima.h"

namespace coterie {
namespace {

struct Q5_1 : WithStart<Q5_1, SplitCodes<5, 0>> {};

}  // namespace
}  // namespace coterie
