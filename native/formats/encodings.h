// Every encoding there is. One that is added needs its header, a place in this list, and its row in src/coterie/formats.py, in the same order.
#pragma once
#include <stdexcept>

#include "formats/bf16.h"
#include "formats/fp8_block.h"
#include "formats/fp8_channel.h"
#include "formats/int4.h"
#include "formats/int8.h"
#include "formats/iq4_nl.h"
#include "formats/iq4_xs.h"
#include "formats/mxfp4.h"
#include "formats/mxfp8.h"
#include "formats/nvfp4.h"
#include "formats/q2_k.h"
#include "formats/q3_k.h"
#include "formats/q4_0.h"
#include "formats/q4_1.h"
#include "formats/q4_k.h"
#include "formats/q5_0.h"
#include "formats/q5_1.h"
#include "formats/q5_k.h"
#include "formats/q6_k.h"
#include "formats/q8_0.h"

namespace coterie {
namespace {

template <class... Family>
struct Families {};
using AllFamilies = Families<Bf16, Int8, Int4, Fp8Block, Fp8Channel, Mxfp4, Mxfp8, Nvfp4, Q4_0, Q8_0, Iq4Nl, Q4K, Q6K, Q5K, Q4_1, Q5_0, Q5_1,
                             Iq4Xs, Q2K, Q3K>;

template <class F, class First, class... Rest>
decltype(auto) with_family(Families<First, Rest...>, int number, const Layout& layout, const F& f) {
  if constexpr (sizeof...(Rest) == 0)
    return First::with(layout, f);
  else
    return number == 0 ? First::with(layout, f) : with_family(Families<Rest...>{}, number - 1, layout, f);
}

// f(Encoding{}) for the encoding of a layout.
template <class F>
decltype(auto) with_encoding(const Layout& layout, const F& f) {
  return with_family(AllFamilies{}, layout.encoding, layout, f);
}

inline Layout layout_of(int encoding, int64_t rows, int64_t cols, int64_t group, bool zero_point) {
  Layout l{};
  l.encoding = encoding;
  l.rows = rows;
  l.cols = cols;
  l.group = group;
  l.zero_point = zero_point;
  with_encoding(l, [&](auto encoding) {
    using E = decltype(encoding);
    l.step = E::kStep ? E::kStep : group ? group : kColumnAlign;
    l.step_scales = E::kScales;
    l.records = E::kRecord;
    l.run_columns = E::kRunColumns;
    l.run_lines = E::kRunLines;
    l.step_row_bytes = E::Scale::kRowBytes + E::kStepZero;
    l.step_block_bytes = E::Scale::kBlockBytes;
    l.block_row_bytes = 4 * E::kRowScale + E::kRowZero;
    l.narrow = E::kNarrow;
    l.needs_largest = E::Scale::kBlockBytes > 0 || (E::kStepScale && E::kRowScale);
    l.code_offset = E::kSums ? 1 : E::Codes::kOffset;
  });
  return l;
}

}  // namespace
}  // namespace coterie
