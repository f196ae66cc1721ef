// AVX2 with FMA and F16C: 16 lanes are two registers. bf16 products in f32, integer products in 16-bit pairs.
#pragma once
#include <immintrin.h>

#include "isa/decode.h"
#include "isa/pairs.h"

namespace coterie {
namespace {

struct Avx2 {
  struct F {
    __m256 a, b;
  };
  struct I {
    __m256i a, b;
  };
  static constexpr int kFloatBytes = 4, kIntegerBytes = 2, kShortBytes = 1;
  static constexpr bool kTiles = false, kLooksUpLines = false, kE4m3Lines = true;
  static constexpr int kRegistersPerVector = 2;
  static constexpr int kFetchedBits = 8;  // codes of at most so many bits are fetched ahead even where they are read but once
  static constexpr int kTileRows = 6;
  static constexpr int tile_panels(int rows, bool) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
  static constexpr int64_t kFloatMacs = 16, kIntegerMacs = 32;

  static F zero() { return set1(0.0f); }
  static F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v.a), _mm256_storeu_ps(p + 8, v.b); }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F max_abs(F x, F y) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_max_ps(x.a, _mm256_andnot_ps(sign, y.a)), _mm256_max_ps(x.b, _mm256_andnot_ps(sign, y.b))};
  }
  static float reduce_max(F v) {
    float t[kLanes], r;
    store(t, v);
    r = t[0];
    for (float x : t) r = x > r ? x : r;
    return r;
  }
  static float reduce_add(F v) {
    float t[kLanes], r = 0.0f;
    store(t, v);
    for (float x : t) r += x;
    return r;
  }
  // The sum of each.
  static void eight_sums(const F* v, float* to) {
    __m256 half[8];
    for (int i = 0; i < 8; i++) half[i] = _mm256_add_ps(v[i].a, v[i].b);
    const __m256 first = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    const __m256 last = _mm256_hadd_ps(_mm256_hadd_ps(half[4], half[5]), _mm256_hadd_ps(half[6], half[7]));
    _mm256_storeu_ps(to, _mm256_add_ps(_mm256_permute2f128_ps(first, last, 0x20), _mm256_permute2f128_ps(first, last, 0x31)));
  }
  static F load_bf16(const uint8_t* p) {
    const __m256i h = _mm256_loadu_si256((const __m256i*)p);
    auto widen = [](__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); };
    return {widen(_mm256_castsi256_si128(h)), widen(_mm256_extracti128_si256(h, 1))};
  }
  static F load_f16(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 16)))};
  }
  static F load_signed_bytes(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
  }
  static F load_bytes(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(v)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(v, 8)))};
  }

  static I integer_zero() { return integer_set1(0); }
  static I integer_set1(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
  static I add(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
  static int32_t reduce_add(I v) {
    uint32_t t[8], r = 0;
    _mm256_storeu_si256((__m256i*)t, _mm256_add_epi32(v.a, v.b));
    for (uint32_t x : t) r += x;
    return static_cast<int32_t>(r);
  }
  static F nearest(F v) { return to_float({_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)}); }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  static I load_integers(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
  }
  static void store_integers(uint8_t* p, I v) {
    _mm256_storeu_si256((__m256i*)p, v.a);
    _mm256_storeu_si256((__m256i*)(p + 32), v.b);
  }
  template <int shift, uint32_t mask>
  static I field(I v) {
    const __m256i m = _mm256_set1_epi32(mask);
    auto moved = [](__m256i x) { return shift < 0 ? _mm256_slli_epi32(x, shift < 0 ? -shift : 0) : _mm256_srli_epi32(x, shift < 0 ? 0 : shift); };
    return {_mm256_and_si256(moved(v.a), m), _mm256_and_si256(moved(v.b), m)};
  }
  static I either(I x, I y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static __m256i rounded_to_bf16(__m256 v) {  // in the upper halves; the lower ones are not cleared
    const __m256i u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(u, odd), _mm256_set1_epi32(0x7fff));
  }
  static void store_pairs(uint8_t* to, F first, F second) {
    auto merge = [](__m256 low, __m256 high) { return _mm256_blend_epi16(_mm256_srli_epi32(rounded_to_bf16(low), 16), rounded_to_bf16(high), 0xaa); };
    _mm256_storeu_si256((__m256i*)to, merge(first.a, second.a));
    _mm256_storeu_si256((__m256i*)(to + 32), merge(first.b, second.b));
  }
  static void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

  struct Pair {
    F even, odd;
  };
  static Pair pair(I w) { return split(w); }
  static Pair pair_of(F even, F odd) { return {even, odd}; }
  static Pair split(I w) {
    const __m256i high = _mm256_set1_epi32(0xffff0000);
    return {{_mm256_castsi256_ps(_mm256_slli_epi32(w.a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(w.b, 16))},
            {_mm256_castsi256_ps(_mm256_and_si256(w.a, high)), _mm256_castsi256_ps(_mm256_and_si256(w.b, high))}};
  }
  // e4m3 in the lower bytes of 16-bit elements (the upper ones may hold anything) as bf16: normal codes are moved and their exponent's bias is
  // changed; the eight subnormal ones are looked up, byte by byte.
  static __m256i e4m3_words(__m256i code) {
    const __m256i subnormal = _mm256_broadcastsi128_si256(_mm_setr_epi8(0x00, 0x00, int8_t(0x80), int8_t(0xc0), 0x00, 0x20, 0x40, 0x60,  // lower bytes
                                                                        0x00, 0x3b, 0x3b, 0x3b, 0x3c, 0x3c, 0x3c, 0x3c));                // upper ones
    const __m256i magnitude = _mm256_and_si256(code, _mm256_set1_epi16(0x7f));
    const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(magnitude, 4), _mm256_set1_epi16(120 << 7));
    const __m256i index = _mm256_add_epi16(_mm256_or_si256(magnitude, _mm256_slli_epi16(magnitude, 8)), _mm256_set1_epi16(0x0800));
    const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), magnitude);
    const __m256i value = _mm256_blendv_epi8(normal, _mm256_shuffle_epi8(subnormal, index), small);
    return _mm256_or_si256(value, _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(0x80)), 8));
  }
  static void e4m3_lines(const uint8_t* line, I (&to)[2]) {
    const I w = load_integers(line);
    to[0] = {e4m3_words(w.a), e4m3_words(w.b)};
    to[1] = {e4m3_words(_mm256_srli_epi16(w.a, 8)), e4m3_words(_mm256_srli_epi16(w.b, 8))};
  }
  struct PairOf1 {
    __m256 even, odd;
  };
  static PairOf1 broadcast_pair(const uint8_t* x) {
    const float* v = reinterpret_cast<const float*>(x);
    return {_mm256_broadcast_ss(v), _mm256_broadcast_ss(v + 1)};
  }
  static F dot(F acc, const Pair& w, const PairOf1& x) {
    acc = {_mm256_fmadd_ps(w.even.a, x.even, acc.a), _mm256_fmadd_ps(w.even.b, x.even, acc.b)};
    return {_mm256_fmadd_ps(w.odd.a, x.odd, acc.a), _mm256_fmadd_ps(w.odd.b, x.odd, acc.b)};
  }
  // Row by row as it is written: the compiler would rather have everything at once, for which registers do not suffice.
  template <class V, class Register>
  static V in_order(Register a, Register b) {
    asm volatile("" : "+x"(a), "+x"(b));
    return {a, b};
  }
  static F dot_half(F acc, const Pair& w, const PairOf1& x, int half) {
    const F v = half ? w.odd : w.even;
    const __m256 y = half ? x.odd : x.even;
    return in_order<F>(_mm256_fmadd_ps(v.a, y, acc.a), _mm256_fmadd_ps(v.b, y, acc.b));
  }

  struct Quad {
    I even, odd;
  };
  static Quad quad_of(I w) {
    const __m256i low = _mm256_set1_epi16(0xff);
    return {{_mm256_and_si256(w.a, low), _mm256_and_si256(w.b, low)}, {_mm256_srli_epi16(w.a, 8), _mm256_srli_epi16(w.b, 8)}};
  }
  static I low_nibbles(const uint8_t* p) {
    const I w = load_integers(p);
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
  }
  static I high_nibbles(const uint8_t* p) {
    const I w = load_integers(p);
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(_mm256_srli_epi16(w.a, 4), mask), _mm256_and_si256(_mm256_srli_epi16(w.b, 4), mask)};
  }
  static I lookup_bytes(I index, const uint8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_load_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(t, index.a), _mm256_shuffle_epi8(t, index.b)};
  }
  static F lookup(I index, const int8_t* table) {
    const __m128i t = _mm_loadu_si128((const __m128i*)table);
    const __m256 low = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(t)), high = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(t, 8)));
    auto half = [&](__m256i i) {
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i), _mm256_permutevar8x32_ps(high, i), _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
    };
    return {half(index.a), half(index.b)};
  }
  static F e4m3(I code) {
    auto half = [](__m256i c) {
      const __m256i magnitude = _mm256_and_si256(c, _mm256_set1_epi32(0x7f)), sign = _mm256_slli_epi32(_mm256_and_si256(c, _mm256_set1_epi32(0x80)), 24);
      const __m256 normal = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(magnitude, 20), _mm256_set1_epi32(120 << 23)));
      const __m256 small = _mm256_mul_ps(_mm256_cvtepi32_ps(magnitude), _mm256_set1_ps(1.0f / 512.0f));
      const __m256 is_small = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(8), magnitude));
      return _mm256_or_ps(_mm256_blendv_ps(normal, small, is_small), _mm256_castsi256_ps(sign));
    };
    return {half(code.a), half(code.b)};
  }
  static I load_byte_integers(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128((const __m128i*)p);
    return {_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))};
  }
  static F load_e8m0(const uint8_t* p) {
    const I v = load_byte_integers(p);
    auto half = [](__m256i i) { return _mm256_castsi256_ps(_mm256_max_epi32(_mm256_slli_epi32(i, 23), _mm256_set1_epi32(0x00400000))); };
    return {half(v.a), half(v.b)};
  }
  // a / v, zero where v is zero.
  static F ratio(float a, F v) {
    auto half = [a](__m256 x) { return _mm256_and_ps(_mm256_div_ps(_mm256_set1_ps(a), x), _mm256_cmp_ps(x, _mm256_setzero_ps(), _CMP_NEQ_OQ)); };
    return {half(v.a), half(v.b)};
  }

  // Bytes of a line times whole ratios, plus whole starts, in units of 1/128: results are bytes again.
  struct Rescale {
    I ratios, starts;
    Rescale(F ratio, F start) : ratios{twice(ratio.a), twice(ratio.b)}, starts{twice(start.a), twice(start.b)} {}
    static __m256i twice(__m256 v) {
      const __m256i i = _mm256_cvtps_epi32(v);
      return _mm256_or_si256(_mm256_and_si256(i, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(i, 16));
    }
    void operator()(I bytes, uint8_t* to) const {
      half(bytes.a, ratios.a, starts.a, to);
      half(bytes.b, ratios.b, starts.b, to + 32);
    }
    static void half(__m256i bytes, __m256i ratios, __m256i starts, uint8_t* to) {
      auto scaled = [&](__m256i words) { return _mm256_add_epi16(_mm256_mullo_epi16(words, ratios), starts); };
      const __m256i low = _mm256_set1_epi16(0xff), even = scaled(_mm256_and_si256(bytes, low)), odd = scaled(_mm256_srli_epi16(bytes, 8));
      _mm256_storeu_si256((__m256i*)to, _mm256_or_si256(_mm256_srli_epi16(even, 7), _mm256_andnot_si256(low, _mm256_slli_epi16(odd, 1))));
    }
  };
  struct QuadOf1 {
    __m256i even, odd;
  };
  static QuadOf1 broadcast_quad(const uint8_t* x) {
    const int32_t* v = reinterpret_cast<const int32_t*>(x);
    return {_mm256_set1_epi32(v[0]), _mm256_set1_epi32(v[1])};
  }
  static I dot(I acc, const Quad& w, const QuadOf1& x) {
    acc = add(acc, {_mm256_madd_epi16(w.even.a, x.even), _mm256_madd_epi16(w.even.b, x.even)});
    return add(acc, {_mm256_madd_epi16(w.odd.a, x.odd), _mm256_madd_epi16(w.odd.b, x.odd)});
  }
  static I dot_half(I acc, const Quad& w, const QuadOf1& x, int half) {
    const I v = half ? w.odd : w.even;
    const __m256i y = half ? x.odd : x.even;
    return in_order<I>(_mm256_add_epi32(acc.a, _mm256_madd_epi16(v.a, y)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(v.b, y)));
  }
  // Small bytes of weights times bytes of activations, two columns' products added in 16 bits, and those then in 32.
  static I dot_shorts(I acc, I w, const uint8_t* x) {
    const __m256i bytes = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(x));
    return in_order<I>(_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, bytes)), _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, bytes)));
  }
  static I add_shorts(I acc, I shorts) {
    const __m256i one = _mm256_set1_epi16(1);
    return add(acc, {_mm256_madd_epi16(shorts.a, one), _mm256_madd_epi16(shorts.b, one)});
  }
  // 16 codes as bytes in the order of kQuadOrder.
  static void store_bytes(uint8_t* to, I q) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(q.a, q.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i*)to, _mm_shuffle_epi8(bytes, _mm_setr_epi8(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15)));
  }
  // 16 codes as 16-bit integers in natural order: the halves of a quad meet its even and odd bytes.
  static I store_codes(uint8_t* to, F v) {
    const I q = {_mm256_cvtps_epi32(v.a), _mm256_cvtps_epi32(v.b)};
    _mm256_storeu_si256((__m256i*)to, _mm256_permute4x64_epi64(_mm256_packs_epi32(q.a, q.b), 0xd8));
    return q;
  }
  static void transpose(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) { transpose_portable(from, from_stride, to, to_stride); }
  static void pair_rows(const Square& square, uint8_t* to, int64_t stride) { pair_rows_portable(square, to, stride); }
  static void pair_columns(const Square& square, uint8_t* to, int64_t stride) { pair_columns_portable(square, to, stride); }

  static void dots(int64_t count, bool integer) {
    const F one = set1(1.0f);
    const __m256i unit = _mm256_set1_epi16(1);
    integer ? chains(count, integer_zero(), [&](const I& v) { return add(v, {_mm256_madd_epi16(unit, v.a), _mm256_madd_epi16(unit, v.b)}); })
            : chains(count, zero(), [&](const F& v) { return fma(one, one, v); });
  }
  template <class V, class Step>
  static void chains(int64_t count, const V& start, const Step& step) {
    constexpr int kChains = 6;
    V acc[kChains];
#pragma GCC unroll 6  // or they stay in memory
    for (int c = 0; c < kChains; c++) acc[c] = start;
    for (int64_t n = 0; n < count; n += kChains)
#pragma GCC unroll 6
      for (int c = 0; c < kChains; c++) {
        acc[c] = step(acc[c]);
        asm volatile("" : "+x"(acc[c].a), "+x"(acc[c].b));
      }
  }
};

}  // namespace
}  // namespace coterie
