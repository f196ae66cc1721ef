// AVX2 with AVX-VNNI, as desktop CPUs without AVX512 have it: one instruction multiplies half a line of weights with a broadcast quad of bytes.
#pragma once
#include "isa/simd_avx2.h"

namespace coterie {
namespace {

struct Avx2Vnni : Avx2 {
  static constexpr int kIntegerBytes = 1, kShortBytes = 0;
  static constexpr int kFetchedBits = 16;
  static constexpr int64_t kIntegerMacs = 64;

  using Quad = I;
  static Quad quad_of(I w) { return w; }
  static __m256i broadcast_quad(const uint8_t* x) { return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }
  using Avx2::dot;
  static I dot(I acc, const Quad& w, __m256i x) { return {_mm256_dpbusd_avx_epi32(acc.a, w.a, x), _mm256_dpbusd_avx_epi32(acc.b, w.b, x)}; }
  using Avx2::dot_half;
  static I dot_half(I acc, const Quad& w, __m256i x, int half) {
    return half ? acc : in_order<I>(_mm256_dpbusd_avx_epi32(acc.a, w.a, x), _mm256_dpbusd_avx_epi32(acc.b, w.b, x));
  }
  static I store_codes(uint8_t* to, F v) {
    const I q = {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)};
    store_bytes(to, q);
    return q;
  }

  static void dots(int64_t count, bool integer) {
    if (!integer) return Avx2::dots(count, false);
    const __m256i x = _mm256_setzero_si256();
    chains(count, integer_zero(), [&](const I& v) { return dot(v, {x, x}, x); });
  }
};

}  // namespace
}  // namespace coterie
