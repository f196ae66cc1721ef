// A layer of each format, packed and computed by the plain C++ kernels, against loops in double precision.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <iterator>
#include <vector>

#include "formats/encodings.h"
#include "formats/unpack.h"
#include "layer/forward.h"
#include "runtime/dispatch.h"
#include "runtime/threads.h"

using namespace coterie;

namespace {

constexpr int64_t kHidden = 512, kIntermediate = 256;

// In the order of formats/encodings.h: columns that share a scale, 0 for a row's; whether activations may be int8.
struct Case {
  const char* name;
  int64_t group;
  bool integer;
};
constexpr Case kCases[] = {{"bf16", 0, false},     {"int8", 0, true},      {"int4", 32, true},   {"fp8_block", 128, false}, {"fp8_channel", 0, false},
                           {"mxfp4", 32, true},    {"mxfp8", 32, false},   {"nvfp4", 16, true},  {"q4_0", 32, true},        {"q8_0", 32, true},
                           {"iq4_nl", 32, true},   {"q4_k", 256, true},    {"q6_k", 256, true},  {"q5_k", 256, true},       {"q4_1", 32, true},
                           {"q5_0", 32, true},     {"q5_1", 32, true},     {"iq4_xs", 256, true}, {"q2_k", 256, true},       {"q3_k", 256, true}};

float next_random() {  // -1 to 1
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return (state >> 8) / 8388608.0f - 1.0f;
}

struct Packed {
  std::vector<uint8_t> matrix;
  std::vector<float> dense;  // the values that the packed bytes stand for

  explicit Packed(const Layout& l) : matrix(l.bytes() + kLine), dense(l.rows * l.cols) {
    for (float& value : dense) value = 0.3f * next_random();
    std::vector<float> scratch(l.padded_cols() * kPanelRows), tiles;
    PackOptions options{true, nullptr, 0.0f};
    if (l.needs_largest) {
      const int64_t count = (l.rows + kScaleTileRows - 1) / kScaleTileRows;
      tiles.resize(count * l.steps());
      for (int64_t tile = 0; tile < count; tile++) kernels().largest_of_tiles(l, tile, dense.data(), DType::f32, l.cols, tiles.data());
      options = {true, tiles.data(), *std::max_element(tiles.begin(), tiles.end())};
    }
    PackError lost;
    for (int64_t panel = 0; panel < l.panels(); panel++)
      kernels().pack_panel(l, panel, dense.data(), DType::f32, l.cols, options, data(), scratch.data(), lost);
    unpack_blocks(l, data(), 0, l.blocks(), dense.data());
  }

  // On a line of its own, as matrices lie.
  uint8_t* data() { return reinterpret_cast<uint8_t*>(round_up(reinterpret_cast<int64_t>(matrix.data()), kLine)); }
};

double dot(const float* row, const double* x, int64_t cols) {
  double sum = 0;
  for (int64_t k = 0; k < cols; k++) sum += row[k] * x[k];
  return sum;
}

double relative_error(int encoding, int64_t tokens, bool integer) {
  const Layout in = layout_of(encoding, kIntermediate, kHidden, kCases[encoding].group, false);
  const Layout out = layout_of(encoding, kHidden, kIntermediate, kCases[encoding].group, false);
  Packed gate(in), up(in), down(out);
  Experts layer{};
  layer.count = 1, layer.hidden = kHidden, layer.intermediate = kIntermediate, layer.has_gate = true;
  layer.in = in, layer.out = out;
  layer.gate = {gate.data()}, layer.up = {up.data()}, layer.down = {down.data()};
  std::vector<float> x(tokens * kHidden), y(tokens * kHidden), weights(tokens, 1.0f);
  const std::vector<int64_t> ids(tokens, 0);
  for (float& value : x) value = next_random();
  forward(layer, kernels(), Batch{tokens, 1, x.data(), DType::f32, kHidden, ids.data(), weights.data(), y.data(), DType::f32, integer});

  double error = 0, norm = 0;
  for (int64_t t = 0; t < tokens; t++) {
    const std::vector<double> token(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden);
    std::vector<double> hidden(kIntermediate);
    for (int64_t i = 0; i < kIntermediate; i++) {
      const double g = dot(&gate.dense[i * kHidden], token.data(), kHidden);
      hidden[i] = g / (1 + std::exp(-g)) * dot(&up.dense[i * kHidden], token.data(), kHidden);
    }
    for (int64_t h = 0; h < kHidden; h++) {
      const double truth = dot(&down.dense[h * kIntermediate], hidden.data(), kIntermediate);
      error += (truth - y[t * kHidden + h]) * (truth - y[t * kHidden + h]), norm += truth * truth;
    }
  }
  return std::sqrt(error / norm);
}

}  // namespace

int main() {
  set_thread_count(3);
  bool right = true;
  for (int encoding = 0; encoding < static_cast<int>(std::size(kCases)); encoding++)
    for (const bool integer : {false, true})
      for (int64_t tokens : {1, 5, 40}) {
        if (integer && !kCases[encoding].integer) continue;
        const double error = relative_error(encoding, tokens, integer);
        std::printf("%s, %s, %s activations, %d tokens: error %.1e\n", kernels().name, kCases[encoding].name, integer ? "int8" : "float",
                    static_cast<int>(tokens), error);
        // Activations rounded to int8; weights to bf16 with their scales, where more tokens than a tile has share them; or nothing.
        right = right && error < (integer ? 0.03 : tokens > 1 ? 0.008 : 1e-5);
      }
  return right ? 0 : 1;
}
