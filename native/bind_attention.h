// What attention takes of torch's tensors: heads, norms, and which positions a mask lets through.
#pragma once
#include <nanobind/nanobind.h>

#include <optional>
#include <tuple>
#include <vector>

#include "formats/bfloat16.h"
#include "layer/step.h"
#include "tensors.h"

namespace coterie {

inline Heads heads_of(const BorrowedHeads& t) {
  const int64_t size = t.element == Element::f32 ? 4 : 2;
  return {t.data, t.stride[0] * size, t.stride[1] * size, t.stride[2] * size};
}

// Which positions a mask [*,1,T,S] lets through, a byte each: bool, or what is added to scores, if that is 0 or as good as minus infinity.
struct Mask {
  const uint8_t* data = nullptr;
  int64_t sequence = 0, token = 0;  // strides

  // Of a tensor [B or 1,1,T,S], or None; false for any other.
  bool of(nanobind::handle mask, int64_t sequences, int64_t tokens, int64_t positions) {
    if (mask.is_none()) return true;
    const auto m = borrow_heads(mask);
    return m && (m->shape[0] == sequences || m->shape[0] == 1) && m->shape[1] == 1 && m->shape[2] == tokens && m->shape[3] == positions && read(*m);
  }

 private:
  std::vector<uint8_t> made;

  bool read(const BorrowedHeads& m) {
    const int64_t rows = m.shape[0], tokens = m.shape[2], positions = m.shape[3];
    const auto set = [&](const uint8_t* from, int64_t sequence_stride, int64_t token_stride) {
      data = from;
      sequence = rows == 1 ? 0 : sequence_stride;
      token = token_stride;
      return true;
    };
    if (m.element == Element::boolean) return set(m.data, m.stride[0], m.stride[2]);
    if (!is_float(m.element)) return false;
    made.resize(rows * tokens * positions);
    uint8_t* to = made.data();
    for (int64_t r = 0; r < rows; r++)
      for (int64_t t = 0; t < tokens; t++, to += positions)
        for (int64_t s = 0; s < positions; s++) {
          const int64_t at = r * m.stride[0] + t * m.stride[2] + s;
          const float v = m.element == Element::bf16 ? bf16_to_float(reinterpret_cast<const uint16_t*>(m.data)[at]) : reinterpret_cast<const float*>(m.data)[at];
          if (v != 0.0f && v > -1e30f) return false;
          to[s] = v == 0.0f;
        }
    return set(made.data(), tokens * positions, positions);
  }
};

inline CacheMemory cache_of(const BorrowedHeads& t) {
  const Heads heads = heads_of(t);
  return {t.data, heads.sequence, heads.head, heads.position};
}

using NormTuple = std::optional<std::tuple<float, bool, bool>>;  // epsilon, rounded, from_one, as `rms_norm` takes them; or None

// A norm of so many columns, which is none without options; false where its weight does not fit.
inline bool norm_of(const NormTuple& norm, nanobind::handle weight, int64_t cols, RmsNorm& to) {
  if (!norm) return true;
  const auto found = borrow_rows(weight);
  if (!found || !is_float(found->element) || found->rows != 1 || found->cols != cols) return false;
  const auto [epsilon, rounded, from_one] = *norm;
  to = {found->data, static_cast<DType>(found->element), epsilon, rounded, from_one};
  return true;
}

}  // namespace coterie
