// The instructions of AVX512 (F, BW, DQ, BF16, VNNI, VBMI) and AVX-VNNI that the kernels use, in plain C++ as Intel's manual defines them: stands before
// the compiler's <immintrin.h> where COTERIE_EMULATE is on, so that every variant is tested on a CPU that has only AVX2.
#pragma once
#include_next <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace coterie_emulated {

template <class T>
struct Lanes {
  static constexpr int kCount = 64 / sizeof(T);
  T at[kCount];
  T& operator[](int i) { return at[i]; }
};

// A register seen as lanes of T, and back.
template <class T, class V>
inline Lanes<T> lanes(V v) {
  static_assert(sizeof v == 64);
  Lanes<T> l;
  memcpy(&l, &v, 64);
  return l;
}

template <class V, class T>
inline V vector(const Lanes<T>& l) {
  V v;
  memcpy(&v, &l, 64);
  return v;
}

// The register whose lane i is f(i).
template <class V, class T, class F>
inline V each(F f) {
  Lanes<T> l;
  for (int i = 0; i < Lanes<T>::kCount; i++) l[i] = f(i);
  return vector<V>(l);
}

template <class T, class F>
inline __m512i integers(__m512i a, __m512i b, F f) {
  Lanes<T> x = lanes<T>(a), y = lanes<T>(b);
  return each<__m512i, T>([&](int i) { return static_cast<T>(f(x[i], y[i])); });
}

template <class F>
inline __m512 floats(__m512 a, __m512 b, F f) {
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  return each<__m512, float>([&](int i) { return f(x[i], y[i]); });
}

template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, 64);
  return v;
}

template <class To, class From, class V>
inline __m512i widen(V v) {  // lanes of From to lanes of To
  From from[64 / sizeof(To)];
  memcpy(from, &v, sizeof from);
  return each<__m512i, To>([&](int i) { return static_cast<To>(from[i]); });
}

template <class V, class To>
inline V narrow(__m512i v) {  // 32-bit lanes, truncated
  Lanes<int32_t> from = lanes<int32_t>(v);
  To to[16];
  for (int i = 0; i < 16; i++) to[i] = static_cast<To>(from[i]);
  V result;
  memcpy(&result, to, sizeof to);
  return result;
}

// Within each 128 bits: low or high half of a's elements between b's.
template <class T, bool High>
inline __m512i unpack(__m512i a, __m512i b) {
  Lanes<T> x = lanes<T>(a), y = lanes<T>(b);
  constexpr int kLane = 16 / sizeof(T);
  return each<__m512i, T>([&](int i) {
    const int from = i / kLane * kLane + (High ? kLane / 2 : 0) + i % kLane / 2;
    return i % 2 ? y[from] : x[from];
  });
}

inline float of_bits(uint32_t bits) {
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t bits_of(float f) {
  uint32_t bits;
  memcpy(&bits, &f, 4);
  return bits;
}

inline float flushed(float f) { return std::fpclassify(f) == FP_SUBNORMAL ? std::copysign(0.0f, f) : f; }

inline uint16_t to_bf16(float f) {
  f = flushed(f);
  const uint32_t bits = bits_of(f);
  if (f != f) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline __m512bh mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  Lanes<float> h = lanes<float>(high), l = lanes<float>(low);
  return each<__m512bh, uint16_t>([&](int i) { return to_bf16(i < 16 ? l[i] : h[i - 16]); });
}

inline __m512 mm512_dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
  Lanes<float> sum = lanes<float>(acc);
  Lanes<uint16_t> x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  auto value = [](uint16_t bf16) { return flushed(of_bits(static_cast<uint32_t>(bf16) << 16)); };
  return each<__m512, float>([&](int i) {
    float s = flushed(sum[i]);
    for (int k = 1; k >= 0; k--) s = flushed(std::fma(value(x[2 * i + k]), value(y[2 * i + k]), s));
    return s;
  });
}

template <class V, int kCount>
inline V dpbusd(V acc, V unsigned_bytes, V signed_bytes) {
  int32_t sum[kCount];
  uint8_t u[kCount * 4];
  int8_t s[kCount * 4];
  memcpy(sum, &acc, sizeof sum), memcpy(u, &unsigned_bytes, sizeof u), memcpy(s, &signed_bytes, sizeof s);
  for (int i = 0; i < kCount * 4; i++) sum[i / 4] += u[i] * s[i];
  memcpy(&acc, sum, sizeof sum);
  return acc;
}

inline __m512i mm512_madd_epi16(__m512i a, __m512i b) {
  Lanes<int16_t> x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  return each<__m512i, int32_t>([&](int i) { return x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]; });
}

inline __m512i mm512_maddubs_epi16(__m512i a, __m512i b) {
  Lanes<uint8_t> x = lanes<uint8_t>(a);
  Lanes<int8_t> y = lanes<int8_t>(b);
  return each<__m512i, int16_t>([&](int i) {
    const int sum = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum;
  });
}

inline __m512i mm512_shuffle_epi8(__m512i a, __m512i order) {
  Lanes<uint8_t> x = lanes<uint8_t>(a), o = lanes<uint8_t>(order);
  return each<__m512i, uint8_t>([&](int i) { return o[i] & 0x80 ? uint8_t{0} : x[i / 16 * 16 + o[i] % 16]; });
}

inline __m512i mm512_permutexvar_epi16(__m512i index, __m512i a) {
  Lanes<uint16_t> x = lanes<uint16_t>(a), o = lanes<uint16_t>(index);
  return each<__m512i, uint16_t>([&](int i) { return x[o[i] % 32]; });
}

inline __m512i mm512_permutex2var_epi16(__m512i a, __m512i index, __m512i b) {
  Lanes<uint16_t> x = lanes<uint16_t>(a), o = lanes<uint16_t>(index), y = lanes<uint16_t>(b);
  return each<__m512i, uint16_t>([&](int i) { return o[i] & 32 ? y[o[i] % 32] : x[o[i] % 32]; });
}

inline __m512i mm512_permutex2var_epi8(__m512i a, __m512i index, __m512i b) {
  Lanes<uint8_t> x = lanes<uint8_t>(a), o = lanes<uint8_t>(index), y = lanes<uint8_t>(b);
  return each<__m512i, uint8_t>([&](int i) { return o[i] & 64 ? y[o[i] % 64] : x[o[i] % 64]; });
}

inline __m512i mm512_shuffle_i64x2(__m512i a, __m512i b, int order) {
  Lanes<int64_t> x = lanes<int64_t>(a), y = lanes<int64_t>(b);
  return each<__m512i, int64_t>([&](int i) {
    const int from = (order >> i / 2 * 2 & 3) * 2 + i % 2;
    return i < 4 ? x[from] : y[from];
  });
}

inline __m512i mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  Lanes<uint64_t> x = lanes<uint64_t>(a), y = lanes<uint64_t>(b), z = lanes<uint64_t>(c);
  return each<__m512i, uint64_t>([&](int i) {
    uint64_t r = 0;
    for (int k = 0; k < 8; k++)
      if (table >> k & 1) r |= (k & 4 ? x[i] : ~x[i]) & (k & 2 ? y[i] : ~y[i]) & (k & 1 ? z[i] : ~z[i]);
    return r;
  });
}

template <class F>
inline auto reduce(__m512 v, F f) {
  Lanes<float> l = lanes<float>(v);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; i++) l[i] = f(l[i], l[i + half]);
  return l[0];
}

inline int32_t mm512_reduce_add_epi32(__m512i v) {
  Lanes<int32_t> l = lanes<int32_t>(v);
  uint32_t sum = 0;
  for (int32_t x : l.at) sum += static_cast<uint32_t>(x);
  return static_cast<int32_t>(sum);
}

inline __m512 mm512_set1_ps(float s) {
  return each<__m512, float>([&](int) { return s; });
}
inline __m512 mm512_setzero_ps() { return mm512_set1_ps(0.0f); }
inline __m512 mm512_loadu_ps(const void* p) { return load<__m512>(p); }
inline void mm512_storeu_ps(void* to, __m512 v) { memcpy(to, &v, 64); }
inline __m512 mm512_mul_ps(__m512 a, __m512 b) { return floats(a, b, [](float x, float y) { return x * y; }); }
inline __m512 mm512_add_ps(__m512 a, __m512 b) { return floats(a, b, [](float x, float y) { return x + y; }); }
inline __m512 mm512_max_ps(__m512 a, __m512 b) { return floats(a, b, [](float x, float y) { return x > y ? x : y; }); }
inline __m512 mm512_abs_ps(__m512 a) { return floats(a, a, [](float x, float) { return std::fabs(x); }); }
inline __m512 mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return each<__m512, float>([&](int i) { return std::fma(x[i], y[i], z[i]); });
}
inline __mmask16 mm512_cmp_ps_mask(__m512 a, __m512 b, int how) {
  if (how != _CMP_NEQ_OQ) abort();
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= static_cast<unsigned>(x[i] < y[i] || x[i] > y[i]) << i;
  return static_cast<__mmask16>(mask);
}
inline __m512 mm512_maskz_div_ps(__mmask16 mask, __m512 a, __m512 b) {
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  return each<__m512, float>([&](int i) { return mask >> i & 1 ? x[i] / y[i] : 0.0f; });
}
inline float mm512_reduce_add_ps(__m512 v) {
  return reduce(v, [](float x, float y) { return x + y; });
}
inline float mm512_reduce_max_ps(__m512 v) {
  return reduce(v, [](float x, float y) { return x > y ? x : y; });
}

inline __m512i mm512_castps_si512(__m512 v) { return (__m512i)v; }
inline __m256 mm512_castps512_ps256(__m512 v) {
  __m256 low;
  memcpy(&low, &v, sizeof low);
  return low;
}
inline __m512 mm512_castsi512_ps(__m512i v) { return (__m512)v; }
inline __m512i mm512_inserti64x4(__m512i v, __m256i half, int which) {
  memcpy(reinterpret_cast<char*>(&v) + which * 32, &half, 32);
  return v;
}
inline __m512i mm512_castsi256_si512(__m256i half) { return mm512_inserti64x4(__m512i{}, half, 0); }
inline __m512i mm512_broadcast_i32x4(__m128i quarter) {
  __m512i v;
  for (int i = 0; i < 4; i++) memcpy(reinterpret_cast<char*>(&v) + 16 * i, &quarter, 16);
  return v;
}
inline __m512i mm512_broadcast_i64x4(__m256i half) { return mm512_inserti64x4(mm512_castsi256_si512(half), half, 1); }
inline __m512i mm512_set1_epi32(int32_t s) {
  return each<__m512i, int32_t>([&](int) { return s; });
}
inline __m512i mm512_set1_epi16(int16_t s) {
  return each<__m512i, int16_t>([&](int) { return s; });
}
inline __m512i mm512_set1_epi8(int8_t s) {
  return each<__m512i, int8_t>([&](int) { return s; });
}
inline __m512i mm512_setzero_si512() { return __m512i{}; }
inline __m512i mm512_loadu_si512(const void* p) { return load<__m512i>(p); }
inline __m512i mm512_load_si512(const void* p) { return load<__m512i>(p); }
inline void mm512_storeu_si512(void* to, __m512i v) { memcpy(to, &v, 64); }
inline void mm512_store_si512(void* to, __m512i v) { memcpy(to, &v, 64); }
inline __m512i mm512_add_epi32(__m512i a, __m512i b) { return integers<uint32_t>(a, b, [](uint32_t x, uint32_t y) { return x + y; }); }
inline __m512i mm512_sub_epi16(__m512i a, __m512i b) { return integers<uint16_t>(a, b, [](uint16_t x, uint16_t y) { return x - y; }); }
inline __m512i mm512_and_si512(__m512i a, __m512i b) { return integers<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x & y; }); }
inline __m512i mm512_or_si512(__m512i a, __m512i b) { return integers<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x | y; }); }
inline __m512i mm512_xor_si512(__m512i a, __m512i b) { return integers<uint64_t>(a, b, [](uint64_t x, uint64_t y) { return x ^ y; }); }
inline __m512i mm512_mullo_epi16(__m512i a, __m512i b) { return integers<uint16_t>(a, b, [](unsigned x, unsigned y) { return x * y; }); }
inline __m512i mm512_slli_epi32(__m512i v, int n) { return integers<uint32_t>(v, v, [&](uint32_t x, uint32_t) { return x << n; }); }
inline __m512i mm512_srli_epi32(__m512i v, int n) { return integers<uint32_t>(v, v, [&](uint32_t x, uint32_t) { return x >> n; }); }
inline __m512i mm512_slli_epi16(__m512i v, int n) { return integers<uint16_t>(v, v, [&](unsigned x, unsigned) { return x << n; }); }
inline __m512i mm512_srli_epi16(__m512i v, int n) { return integers<uint16_t>(v, v, [&](unsigned x, unsigned) { return x >> n; }); }
inline __m512i mm512_mask_mov_epi16(__m512i a, uint32_t mask, __m512i b) {
  Lanes<uint16_t> x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  return each<__m512i, uint16_t>([&](int i) { return mask >> i & 1 ? y[i] : x[i]; });
}
inline __m512i mm512_unpacklo_epi16(__m512i a, __m512i b) { return unpack<uint16_t, false>(a, b); }
inline __m512i mm512_unpackhi_epi16(__m512i a, __m512i b) { return unpack<uint16_t, true>(a, b); }
inline __m512i mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpack<uint32_t, false>(a, b); }
inline __m512i mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpack<uint32_t, true>(a, b); }
inline __m512i mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpack<uint64_t, false>(a, b); }
inline __m512i mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpack<uint64_t, true>(a, b); }
inline __m512i mm512_cvtepu16_epi32(__m256i v) { return widen<uint32_t, uint16_t>(v); }
inline __m512i mm512_cvtepu8_epi32(__m128i v) { return widen<uint32_t, uint8_t>(v); }
inline __m256i mm512_cvtepi32_epi16(__m512i v) { return narrow<__m256i, int16_t>(v); }
inline __m128i mm512_cvtepi32_epi8(__m512i v) { return narrow<__m128i, int8_t>(v); }
inline __m512 mm512_cvtph_ps(__m256i v) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(v)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1));
  __m512 to;
  memcpy(&to, &low, 32);
  memcpy(reinterpret_cast<char*>(&to) + 32, &high, 32);
  return to;
}
inline __m512 mm512_cvtepi32_ps(__m512i v) {
  Lanes<int32_t> x = lanes<int32_t>(v);
  return each<__m512, float>([&](int i) { return static_cast<float>(x[i]); });
}
inline __m512i mm512_cvtps_epi32(__m512 v) {
  Lanes<float> x = lanes<float>(v);
  return each<__m512i, int32_t>([&](int i) { return std::fabs(x[i]) < 2147483648.0f ? static_cast<int32_t>(std::nearbyint(x[i])) : INT32_MIN; });
}
inline __m512i mm512_cvtepi8_epi32(__m128i v) { return widen<int32_t, int8_t>(v); }
inline __m512i mm512_add_epi16(__m512i a, __m512i b) { return integers<uint16_t>(a, b, [](unsigned x, unsigned y) { return x + y; }); }
inline __m512i mm512_max_epi32(__m512i a, __m512i b) { return integers<int32_t>(a, b, [](int32_t x, int32_t y) { return x > y ? x : y; }); }
template <class T, class Mask>
inline Mask less(__m512i a, __m512i b) {
  Lanes<T> x = lanes<T>(a), y = lanes<T>(b);
  Mask mask = 0;
  for (int i = 0; i < Lanes<T>::kCount; i++) mask |= static_cast<Mask>(Mask{x[i] < y[i]} << i);
  return mask;
}
inline __mmask16 mm512_cmplt_epi32_mask(__m512i a, __m512i b) { return less<int32_t, __mmask16>(a, b); }
inline __mmask32 mm512_cmplt_epi16_mask(__m512i a, __m512i b) { return less<int16_t, __mmask32>(a, b); }
inline __m512 mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) {
  Lanes<float> x = lanes<float>(a), y = lanes<float>(b);
  return each<__m512, float>([&](int i) { return mask >> i & 1 ? y[i] : x[i]; });
}
inline __m512 mm512_permutexvar_ps(__m512i index, __m512 a) {
  Lanes<uint32_t> i = lanes<uint32_t>(index);
  Lanes<float> x = lanes<float>(a);
  return each<__m512, float>([&](int lane) { return x[i[lane] & 15]; });
}
inline __m512i mm512_mask_permutexvar_epi16(__m512i from, __mmask32 mask, __m512i index, __m512i a) {
  return mm512_mask_mov_epi16(from, mask, mm512_permutexvar_epi16(index, a));
}
inline __m512i mm512_dpbusd_epi32(__m512i acc, __m512i u, __m512i s) { return dpbusd<__m512i, 16>(acc, u, s); }
inline __m256i mm256_dpbusd_avx_epi32(__m256i acc, __m256i u, __m256i s) { return dpbusd<__m256i, 8>(acc, u, s); }

}  // namespace coterie_emulated

#define _mm256_dpbusd_avx_epi32 ::coterie_emulated::mm256_dpbusd_avx_epi32
#define _mm512_abs_ps ::coterie_emulated::mm512_abs_ps
#define _mm512_add_epi16 ::coterie_emulated::mm512_add_epi16
#define _mm512_add_epi32 ::coterie_emulated::mm512_add_epi32
#define _mm512_add_ps ::coterie_emulated::mm512_add_ps
#define _mm512_and_si512 ::coterie_emulated::mm512_and_si512
#define _mm512_broadcast_i32x4 ::coterie_emulated::mm512_broadcast_i32x4
#define _mm512_broadcast_i64x4 ::coterie_emulated::mm512_broadcast_i64x4
#define _mm512_castps512_ps256 ::coterie_emulated::mm512_castps512_ps256
#define _mm512_castps_si512 ::coterie_emulated::mm512_castps_si512
#define _mm512_castsi256_si512 ::coterie_emulated::mm512_castsi256_si512
#define _mm512_castsi512_ps ::coterie_emulated::mm512_castsi512_ps
#define _mm512_cmp_ps_mask ::coterie_emulated::mm512_cmp_ps_mask
#define _mm512_cmplt_epi16_mask ::coterie_emulated::mm512_cmplt_epi16_mask
#define _mm512_cmplt_epi32_mask ::coterie_emulated::mm512_cmplt_epi32_mask
#define _mm512_cvtepi32_epi16 ::coterie_emulated::mm512_cvtepi32_epi16
#define _mm512_cvtepi32_epi8 ::coterie_emulated::mm512_cvtepi32_epi8
#define _mm512_cvtepi32_ps ::coterie_emulated::mm512_cvtepi32_ps
#define _mm512_cvtepi8_epi32 ::coterie_emulated::mm512_cvtepi8_epi32
#define _mm512_cvtph_ps ::coterie_emulated::mm512_cvtph_ps
#define _mm512_cvtepu16_epi32 ::coterie_emulated::mm512_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 ::coterie_emulated::mm512_cvtepu8_epi32
#define _mm512_cvtne2ps_pbh ::coterie_emulated::mm512_cvtne2ps_pbh
#define _mm512_cvtps_epi32 ::coterie_emulated::mm512_cvtps_epi32
#define _mm512_dpbf16_ps ::coterie_emulated::mm512_dpbf16_ps
#define _mm512_dpbusd_epi32 ::coterie_emulated::mm512_dpbusd_epi32
#define _mm512_fmadd_ps ::coterie_emulated::mm512_fmadd_ps
#define _mm512_inserti64x4 ::coterie_emulated::mm512_inserti64x4
#define _mm512_load_si512 ::coterie_emulated::mm512_load_si512
#define _mm512_loadu_ps ::coterie_emulated::mm512_loadu_ps
#define _mm512_loadu_si512 ::coterie_emulated::mm512_loadu_si512
#define _mm512_madd_epi16 ::coterie_emulated::mm512_madd_epi16
#define _mm512_maddubs_epi16 ::coterie_emulated::mm512_maddubs_epi16
#define _mm512_mask_blend_ps ::coterie_emulated::mm512_mask_blend_ps
#define _mm512_mask_mov_epi16 ::coterie_emulated::mm512_mask_mov_epi16
#define _mm512_mask_permutexvar_epi16 ::coterie_emulated::mm512_mask_permutexvar_epi16
#define _mm512_maskz_div_ps ::coterie_emulated::mm512_maskz_div_ps
#define _mm512_max_epi32 ::coterie_emulated::mm512_max_epi32
#define _mm512_max_ps ::coterie_emulated::mm512_max_ps
#define _mm512_mul_ps ::coterie_emulated::mm512_mul_ps
#define _mm512_mullo_epi16 ::coterie_emulated::mm512_mullo_epi16
#define _mm512_or_si512 ::coterie_emulated::mm512_or_si512
#define _mm512_permutex2var_epi16 ::coterie_emulated::mm512_permutex2var_epi16
#define _mm512_permutex2var_epi8 ::coterie_emulated::mm512_permutex2var_epi8
#define _mm512_permutexvar_epi16 ::coterie_emulated::mm512_permutexvar_epi16
#define _mm512_permutexvar_ps ::coterie_emulated::mm512_permutexvar_ps
#define _mm512_reduce_add_epi32 ::coterie_emulated::mm512_reduce_add_epi32
#define _mm512_reduce_add_ps ::coterie_emulated::mm512_reduce_add_ps
#define _mm512_reduce_max_ps ::coterie_emulated::mm512_reduce_max_ps
#define _mm512_set1_epi16 ::coterie_emulated::mm512_set1_epi16
#define _mm512_set1_epi32 ::coterie_emulated::mm512_set1_epi32
#define _mm512_set1_epi8 ::coterie_emulated::mm512_set1_epi8
#define _mm512_set1_ps ::coterie_emulated::mm512_set1_ps
#define _mm512_setzero_ps ::coterie_emulated::mm512_setzero_ps
#define _mm512_setzero_si512 ::coterie_emulated::mm512_setzero_si512
#define _mm512_shuffle_epi8 ::coterie_emulated::mm512_shuffle_epi8
#define _mm512_shuffle_i64x2 ::coterie_emulated::mm512_shuffle_i64x2
#define _mm512_slli_epi16 ::coterie_emulated::mm512_slli_epi16
#define _mm512_slli_epi32 ::coterie_emulated::mm512_slli_epi32
#define _mm512_srli_epi16 ::coterie_emulated::mm512_srli_epi16
#define _mm512_srli_epi32 ::coterie_emulated::mm512_srli_epi32
#define _mm512_store_si512 ::coterie_emulated::mm512_store_si512
#define _mm512_storeu_ps ::coterie_emulated::mm512_storeu_ps
#define _mm512_storeu_si512 ::coterie_emulated::mm512_storeu_si512
#define _mm512_sub_epi16 ::coterie_emulated::mm512_sub_epi16
#define _mm512_ternarylogic_epi32 ::coterie_emulated::mm512_ternarylogic_epi32
#define _mm512_unpackhi_epi32 ::coterie_emulated::mm512_unpackhi_epi32
#define _mm512_unpackhi_epi64 ::coterie_emulated::mm512_unpackhi_epi64
#define _mm512_unpacklo_epi16 ::coterie_emulated::mm512_unpacklo_epi16
#define _mm512_unpackhi_epi16 ::coterie_emulated::mm512_unpackhi_epi16
#define _mm512_unpacklo_epi32 ::coterie_emulated::mm512_unpacklo_epi32
#define _mm512_unpacklo_epi64 ::coterie_emulated::mm512_unpacklo_epi64
#define _mm512_xor_si512 ::coterie_emulated::mm512_xor_si512
