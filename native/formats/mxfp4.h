// mxfp4: e2m1 codes, a power of two for 32 columns.
#pragma once
#include "formats/mx.h"

namespace coterie {
namespace {

struct Mxfp4 : Microscaled<Mxfp4, E2m1Codes> {};

}  // namespace
}  // namespace coterie
