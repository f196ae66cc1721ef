// q4_1: nibbles with a scale and a minimum in f16 for 32 columns.
#pragma once
#include "formats/minima.h"

namespace coterie {
namespace {

struct Q4_1 : WithStart<Q4_1, PlainNibbleCodes> {};

}  // namespace
}  // namespace coterie
