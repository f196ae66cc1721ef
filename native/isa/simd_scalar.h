// Any CPU: 16 lanes as an array, loops the compiler may vectorise.
#pragma once
#include <cmath>

#include "isa/decode.h"
#include "isa/pairs.h"

namespace coterie {
namespace {

struct Scalar {
  struct F {
    float v[kLanes];
  };
  struct I {
    int32_t v[kLanes];
  };
  static constexpr int kFloatBytes = 4, kIntegerBytes = 2, kShortBytes = 0;
  static constexpr bool kTiles = false, kLooksUpLines = false, kE4m3Lines = false;
  static constexpr int kRegistersPerVector = 1;
  static constexpr int kFetchedBits = 0;  // codes of at most so many bits are fetched ahead even where they are read but once
  static constexpr int kTileRows = 4;
  static constexpr int tile_panels(int, bool) { return 1; }
  static constexpr int64_t kFloatMacs = 16, kIntegerMacs = 16;

  template <class V, class Op>
  static V each(const Op& op) {
    V r;
    for (int i = 0; i < kLanes; i++) r.v[i] = op(i);
    return r;
  }
  static F zero() { return set1(0.0f); }
  static F set1(float x) { return each<F>([&](int) { return x; }); }
  static F load(const float* p) {  // packed scales need no alignment
    F r;
    memcpy(r.v, p, sizeof r.v);
    return r;
  }
  static void store(float* p, const F& v) { memcpy(p, v.v, sizeof v); }
  static F mul(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
  static F add(const F& a, const F& b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
  static F fma(const F& a, const F& b, const F& c) { return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  static F max_abs(const F& a, const F& b) { return each<F>([&](int i) { return std::fabs(b.v[i]) > a.v[i] ? std::fabs(b.v[i]) : a.v[i]; }); }
  static float reduce_max(const F& v) {
    float r = v.v[0];
    for (float x : v.v) r = x > r ? x : r;
    return r;
  }
  static float reduce_add(const F& v) {
    float r = 0.0f;
    for (float x : v.v) r += x;
    return r;
  }
  static void eight_sums(const F* v, float* to) {
    for (int i = 0; i < 8; i++) to[i] = reduce_add(v[i]);
  }
  static F load_bf16(const uint8_t* p) {
    uint16_t h[kLanes];
    memcpy(h, p, sizeof h);
    return each<F>([&](int i) { return bf16_to_float(h[i]); });
  }
  static F load_f16(const uint8_t* p) { return each<F>([&](int i) { return F16Scale::value(p + 2 * i); }); }
  static F load_signed_bytes(const uint8_t* p) { return each<F>([&](int i) { return static_cast<float>(static_cast<int8_t>(p[i])); }); }
  static F load_bytes(const uint8_t* p) { return each<F>([&](int i) { return static_cast<float>(p[i]); }); }

  static I integer_zero() { return integer_set1(0); }
  static I integer_set1(int32_t x) { return each<I>([&](int) { return x; }); }
  static I add(const I& a, const I& b) { return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) + static_cast<uint32_t>(b.v[i])); }); }
  static int32_t reduce_add(const I& v) {
    uint32_t r = 0;
    for (int32_t x : v.v) r += static_cast<uint32_t>(x);
    return static_cast<int32_t>(r);
  }
  static F to_float(const I& v) { return each<F>([&](int i) { return static_cast<float>(v.v[i]); }); }
  static I load_integers(const uint8_t* p) {
    I r;
    memcpy(r.v, p, sizeof r);
    return r;
  }
  template <int shift, uint32_t mask>
  static I field(const I& v) {
    return each<I>([&](int i) {
      const uint32_t word = static_cast<uint32_t>(v.v[i]);
      return static_cast<int32_t>((shift < 0 ? word << (shift < 0 ? -shift : 0) : word >> (shift < 0 ? 0 : shift)) & mask);
    });
  }
  static I either(const I& a, const I& b) { return each<I>([&](int i) { return a.v[i] | b.v[i]; }); }
  static void store_pairs(uint8_t* to, const F& first, const F& second) {
    uint32_t line[kLanes];
    for (int i = 0; i < kLanes; i++) line[i] = float_to_bf16(first.v[i]) | static_cast<uint32_t>(float_to_bf16(second.v[i])) << 16;
    memcpy(to, line, sizeof line);
  }
  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

  struct Pair {
    F even, odd;
  };
  static Pair pair(const I& w) {
    return {each<F>([&](int i) { return bits_to_float(static_cast<uint32_t>(w.v[i]) << 16); }),
            each<F>([&](int i) { return bits_to_float(static_cast<uint32_t>(w.v[i]) & 0xffff0000u); })};
  }
  static Pair pair_of(const F& even, const F& odd) { return {even, odd}; }
  struct PairOf1 {
    float even, odd;
  };
  static PairOf1 broadcast_pair(const uint8_t* x) {
    PairOf1 r;
    memcpy(&r, x, sizeof r);
    return r;
  }
  static F dot(const F& acc, const Pair& w, const PairOf1& x) {
    return each<F>([&](int i) { return acc.v[i] + w.even.v[i] * x.even + w.odd.v[i] * x.odd; });
  }

  struct Quad {
    uint8_t v[kLine];
  };
  static Quad quad_of(const I& words) {
    Quad q;
    memcpy(q.v, words.v, sizeof q);
    return q;
  }
  template <class Op>
  static I each_byte(const I& words, const Op& op) {
    uint8_t bytes[kLine];
    memcpy(bytes, words.v, sizeof bytes);
    for (uint8_t& byte : bytes) byte = op(byte);
    I r;
    memcpy(r.v, bytes, sizeof bytes);
    return r;
  }
  static I low_nibbles(const uint8_t* p) { return each_byte(load_integers(p), [](uint8_t b) { return static_cast<uint8_t>(b & 15); }); }
  static I high_nibbles(const uint8_t* p) { return each_byte(load_integers(p), [](uint8_t b) { return static_cast<uint8_t>(b >> 4); }); }
  static I lookup_bytes(const I& index, const uint8_t* table) { return each_byte(index, [&](uint8_t b) { return table[b]; }); }
  static F lookup(const I& index, const int8_t* table) { return each<F>([&](int i) { return static_cast<float>(table[index.v[i]]); }); }
  static F e4m3(const I& code) { return each<F>([&](int i) { return E4m3Codes::value(static_cast<uint16_t>(code.v[i]), 0); }); }
  static I load_byte_integers(const uint8_t* p) { return each<I>([&](int i) { return static_cast<int32_t>(p[i]); }); }
  static F load_e8m0(const uint8_t* p) { return each<F>([&](int i) { return E8m0Scale::value(p + i); }); }
  // a / v, zero where v is zero.
  static F ratio(float a, const F& v) { return each<F>([&](int i) { return v.v[i] != 0.0f ? a / v.v[i] : 0.0f; }); }

  static F nearest(const F& v) { return each<F>([&](int i) { return (v.v[i] + kRound) - kRound; }); }
  // Bytes of a line times whole ratios, plus whole starts, in units of 1/128: results are bytes again.
  struct Rescale {
    int ratio[kLanes], start[kLanes];
    Rescale(const F& ratios, const F& starts) {
      for (int i = 0; i < kLanes; i++) {
        ratio[i] = whole(ratios.v[i]);
        start[i] = whole(starts.v[i]);
      }
    }
    // 0 for what 16 bits do not hold, as vectors have it.
    static int whole(float v) { return v > -32768.0f && v < 32768.0f ? static_cast<int>(v) : 0; }
    void operator()(const I& bytes, uint8_t* to) const {
      uint8_t from[kLine];
      memcpy(from, bytes.v, sizeof from);
      for (int i = 0; i < kLine; i++) to[i] = static_cast<uint8_t>((from[i] * ratio[i / 4] + start[i / 4]) >> 7);
    }
  };
  struct QuadOf1 {
    int16_t v[4];
  };
  static QuadOf1 broadcast_quad(const uint8_t* x) {
    QuadOf1 q;
    memcpy(q.v, x, sizeof q);
    return q;
  }
  static I dot(const I& acc, const Quad& w, const QuadOf1& x) {
    return each<I>([&](int i) {
      const uint8_t* b = w.v + 4 * i;
      return acc.v[i] + b[0] * x.v[0] + b[2] * x.v[1] + b[1] * x.v[2] + b[3] * x.v[3];
    });
  }
  static I store_codes(uint8_t* to, const F& v) {
    const I q = each<I>([&](int i) { return static_cast<int32_t>((v.v[i] + kRound) - kRound); });
    int16_t codes[kLanes];
    for (int i = 0; i < kLanes; i++) codes[i] = static_cast<int16_t>(q.v[i]);
    memcpy(to, codes, sizeof codes);
    return q;
  }
  static void transpose(const uint8_t* from, int64_t from_stride, uint8_t* to, int64_t to_stride) { transpose_portable(from, from_stride, to, to_stride); }
  static void pair_rows(const Square& square, uint8_t* to, int64_t stride) { pair_rows_portable(square, to, stride); }
  static void pair_columns(const Square& square, uint8_t* to, int64_t stride) { pair_columns_portable(square, to, stride); }

  static void dots(int64_t count, bool integer) {
    F f = set1(0.0f);
    I i = integer_zero();
    for (int64_t n = 0; n < count; n++) {
      if (integer)
        i = add(i, i);
      else
        f = fma(f, f, f);
      asm volatile("" : "+m"(f), "+m"(i));
    }
  }
};

}  // namespace
}  // namespace coterie
