#include "layer/norm.h"

#include <cmath>

#include "formats/bfloat16.h"

namespace coterie {
namespace {

template <DType type>
float value(const void* from, int64_t i) {
  if constexpr (type == DType::bf16)
    return bf16_to_float(static_cast<const uint16_t*>(from)[i]);
  else
    return static_cast<const float*>(from)[i];
}

template <DType type>
void put(void* to, int64_t i, float v) {
  if constexpr (type == DType::bf16)
    static_cast<uint16_t*>(to)[i] = float_to_bf16(v);
  else
    static_cast<float*>(to)[i] = v;
}

template <DType type>
float inverse_rms_of(float epsilon, const void* from, int64_t cols) {
  constexpr int kSums = 16;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= cols; i += kSums)
    for (int k = 0; k < kSums; k++) sums[k] += value<type>(from, i + k) * value<type>(from, i + k);
  float sum = 0.0f;
  for (; i < cols; i++) sum += value<type>(from, i) * value<type>(from, i);
  for (const float s : sums) sum += s;
  return 1.0f / std::sqrt(sum / static_cast<float>(cols) + epsilon);
}

template <DType type, DType weight>
void norm_row(const RmsNorm& norm, const void* from, int64_t cols, void* to) {
  const float scale = inverse_rms_of<type>(norm.epsilon, from, cols), one = norm.from_one ? 1.0f : 0.0f;
  const bool rounded = norm.rounded && type == DType::bf16;
  for (int64_t c = 0; c < cols; c++) {
    const float x = value<type>(from, c) * scale;
    put<type>(to, c, (rounded ? bf16_to_float(float_to_bf16(x)) : x) * (value<weight>(norm.weight, c) + one));
  }
}

}  // namespace

float inverse_rms(float epsilon, const void* from, DType dtype, int64_t cols) {
  return dtype == DType::bf16 ? inverse_rms_of<DType::bf16>(epsilon, from, cols) : inverse_rms_of<DType::f32>(epsilon, from, cols);
}

void rms_norm(const RmsNorm& norm, const void* from, DType dtype, int64_t rows, int64_t cols, void* to) {
  const auto row = dtype == DType::bf16 ? (norm.weight_dtype == DType::bf16 ? norm_row<DType::bf16, DType::bf16> : norm_row<DType::bf16, DType::f32>)
                                        : (norm.weight_dtype == DType::bf16 ? norm_row<DType::f32, DType::bf16> : norm_row<DType::f32, DType::f32>);
  const int64_t bytes = cols * (dtype == DType::bf16 ? 2 : 4);
  for (int64_t r = 0; r < rows; r++) row(norm, static_cast<const uint8_t*>(from) + r * bytes, cols, static_cast<uint8_t*>(to) + r * bytes);
}

}  // namespace coterie
