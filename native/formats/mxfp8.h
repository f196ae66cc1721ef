// mxfp8: e4m3 codes, a power of two for 32 columns.
#pragma once
#include "formats/mx.h"

namespace coterie {
namespace {

struct Mxfp8 : Microscaled<Mxfp8, E4m3Codes> {};

}  // namespace
}  // namespace coterie
