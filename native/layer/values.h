// Single numbers of rows that are bf16 or f32.
#pragma once
#include <cmath>

#include "formats/bfloat16.h"
#include "isa/kernels.h"

namespace coterie {

inline int64_t element_bytes(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline float value_at(const void* row, DType dtype, int64_t i) {
  return dtype == DType::f32 ? static_cast<const float*>(row)[i] : bf16_to_float(static_cast<const uint16_t*>(row)[i]);
}

inline void put_value(void* row, DType dtype, int64_t i, float value) {
  if (dtype == DType::f32)
    static_cast<float*>(row)[i] = value;
  else
    static_cast<uint16_t*>(row)[i] = float_to_bf16(value);
}

// As a value of that type is.
inline float rounded(float value, DType dtype) { return dtype == DType::f32 ? value : bf16_to_float(float_to_bf16(value)); }

// The sigmoid of a value, as models of that type have it.
inline float sigmoid_of(float value, DType dtype) { return rounded(1.0f / (1.0f + std::exp(-value)), dtype); }

}  // namespace coterie
