// The tile instructions of AMX in plain C, as Intel's manual defines them: so that the tiling is tested on a CPU without AMX.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "formats/bfloat16.h"

namespace coterie {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {};
  uint8_t rows[16] = {};
};

struct EmulatedTiles {
  struct State {
    TileConfig config;
    uint8_t tile[8][16][64];
    bool configured = false;
  };
  static State& state() {
    static thread_local State s;
    return s;
  }
  // Real hardware faults on a tile that is not configured or on shapes that do not fit: so does this.
  static void require(bool ok) {
    if (!ok) abort();
  }

  static void configure(const TileConfig& config) {
    require(config.palette == 1);
    for (int t = 0; t < 8; t++) require(config.rows[t] <= 16 && config.bytes_per_row[t] <= 64);
    state().config = config;
    state().configured = true;
    memset(state().tile, 0, sizeof state().tile);
  }
  static void release() { state().configured = false; }
  template <int t>
  static void zero() {
    require(state().configured && state().config.rows[t] > 0);
    memset(state().tile[t], 0, sizeof state().tile[t]);
  }
  template <int t>
  static void load(const void* from, int64_t stride) {
    require(state().configured && state().config.rows[t] > 0);
    memset(state().tile[t], 0, sizeof state().tile[t]);
    for (int r = 0; r < state().config.rows[t]; r++)
      memcpy(state().tile[t][r], static_cast<const uint8_t*>(from) + r * stride, state().config.bytes_per_row[t]);
  }
  template <int t>
  static void store(void* to, int64_t stride) {
    require(state().configured && state().config.rows[t] > 0);
    for (int r = 0; r < state().config.rows[t]; r++)
      memcpy(static_cast<uint8_t*>(to) + r * stride, state().tile[t][r], state().config.bytes_per_row[t]);
  }

  template <int c, int a, int b, class Element, class Dot>
  static void dot(const Dot& dot) {
    State& s = state();
    require(s.configured && s.config.rows[a] == s.config.rows[c] && s.config.bytes_per_row[b] == s.config.bytes_per_row[c]);
    require(s.config.bytes_per_row[a] == s.config.rows[b] * 4);
    for (int m = 0; m < s.config.rows[c]; m++)
      for (int k = 0; k < s.config.rows[b]; k++)
        for (int n = 0; n < s.config.bytes_per_row[c] / 4; n++) {
          Element sum;
          memcpy(&sum, s.tile[c][m] + 4 * n, 4);
          sum = dot(sum, s.tile[a][m] + 4 * k, s.tile[b][k] + 4 * n);
          memcpy(s.tile[c][m] + 4 * n, &sum, 4);
        }
  }
  template <int c, int a, int b>
  static void dot_bf16() {
    dot<c, a, b, float>([](float sum, const uint8_t* x, const uint8_t* w) {
      for (int i = 0; i < 2; i++) {
        uint16_t p, q;
        memcpy(&p, x + 2 * i, 2);
        memcpy(&q, w + 2 * i, 2);
        sum += bf16_to_float(p) * bf16_to_float(q);
      }
      return sum;
    });
  }
  template <int c, int a, int b>
  static void dot_int8() {
    dot<c, a, b, int32_t>([](int32_t sum, const uint8_t* x, const uint8_t* w) {
      for (int i = 0; i < 4; i++) sum += static_cast<int8_t>(x[i]) * static_cast<int32_t>(w[i]);
      return sum;
    });
  }
};

}  // namespace
}  // namespace coterie
