// AVX2 with AVX-VNNI, as desktop CPUs without AVX512 have it: one instruction multiplies half a line of weights with a broadcast quad of bytes.
#pragma once
#include "isa/simd_avx2.h"

namespace coterie {
namespace {

struct Avx2Vnni : Avx2 {
  static constexpr int kIntegerBytes = 1;
  static constexpr int64_t kIntegerMacs = 64;

  using Quad = I;
  static Quad quad_of(I w) { return w; }
  static __m256i broadcast_quad(const uint8_t* x) { return _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }
  using Avx2::dot;
  static I dot(I acc, const Quad& w, __m256i x) { return {_mm256_dpbusd_avx_epi32(acc.a, w.a, x), _mm256_dpbusd_avx_epi32(acc.b, w.b, x)}; }
  // 16 codes as bytes in the order of kQuadOrder.
  static I store_codes(uint8_t* to, F v) {
    const I q = {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)};
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q.a, q.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)));
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
