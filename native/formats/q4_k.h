// q4_k: nibbles with a scale and a minimum for 32 columns.
#pragma once
#include "formats/minima.h"

namespace coterie {
namespace {

struct Q4K : WithMinima<Q4K, PlainNibbleCodes> {};

}  // namespace
}  // namespace coterie
