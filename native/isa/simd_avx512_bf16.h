// AVX512 with BF16, VNNI and VBMI: one instruction multiplies a line of weights with a broadcast pair too. AMD's CPUs begin one in each cycle. Intel's take
// two for one, in which they do twice the work in float32.
#pragma once
#include "isa/simd_avx512_vnni.h"

namespace coterie {
namespace {

struct Avx512Bf16 : Avx512Vnni {
  static constexpr int kFloatBytes = 2;
  static constexpr int kFetchedBits = 0;  // AMD's CPUs fetch in time
  static constexpr int tile_panels(int, bool) { return 4; }
  static constexpr int64_t kFloatMacs = 32;

  using Pair = __m512i;
  static Pair pair(I w) { return w; }
  static Pair pair_of(Avx512::F even, Avx512::F odd) { return interleave((__m512i)_mm512_cvtne2ps_pbh(odd, even)); }
  static Pair broadcast_pair(const uint8_t* x) { return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x)); }
  using Avx512Vnni::dot;
  static F dot(F acc, Pair w, Pair x) {
#if defined(__AVX512BF16__)
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(w), "v"(x));
#else
    acc = _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)x);
#endif
    return acc;
  }

  // Two rows of 32 as pairs: columns 0-3, 8-11, 16-19, 24-27, and the others.
  static void interleave_rows(const uint8_t* first, const uint8_t* second, I& even, I& odd) {
    const __m512i a = _mm512_loadu_si512(first), b = _mm512_loadu_si512(second);
    even = _mm512_unpacklo_epi16(a, b);
    odd = _mm512_unpackhi_epi16(a, b);
  }
  // 32 floats in their order, from sums over such.
  static void store_interleaved(float* to, Avx512::F even, Avx512::F odd) {
    alignas(64) float four[2][4][4];
    store(four[0][0], even);
    store(four[1][0], odd);
    for (int i = 0; i < 8; i++) memcpy(to + 4 * i, four[i % 2][i / 2], sizeof four[0][0]);
  }
  static void store_pairs(uint8_t* to, Avx512::F first, Avx512::F second) {
    _mm512_storeu_si512(to, pair_of(first, second));
  }

  static void dots(int64_t count, bool integer) {
    const I x = integer_zero();
    integer ? chains(count, integer_zero(), [&](I v) { return dot(v, x, x); }) : chains(count, zero(), [&](Avx512::F v) { return dot(v, x, x); });
  }
};

}  // namespace
}  // namespace coterie
