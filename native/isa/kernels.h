// What every instruction set provides: the same functions, compiled with its own flags (see generic.h).
#pragma once
#include <cstdint>

#include "layer/experts.h"

namespace coterie {

enum class DType : int { bf16 = 0, f32 = 1, f16 = 2 };

constexpr int kBlockPanels = 4;       // panels a matmul works on at a time
constexpr int kActivationGroup = 128;  // columns of an activation row that share one int8 scale

// Activations in the form the dot products of an instruction set read.
struct Staged {
  uint8_t* data;      // [rows][row_bytes]
  int64_t row_bytes;
  float* scale;       // integer paths: [rows][groups of 128]
  // Integer paths: the sum of each unit of quantised columns, times minus the offset of the weights' codes.
  int32_t* offset;        // [rows][units]
  int32_t* group_offset;  // [rows][groups of 128], for weights decoded to bytes
  int64_t cols;       // padded
  int64_t unit;       // columns per partial sum: the weights' group, at most 128

  int64_t groups() const { return (cols + kActivationGroup - 1) / kActivationGroup; }
  int64_t units() const { return (cols + unit - 1) / unit; }
};

// Tokens of one expert: which staged rows it reads, which output rows it adds to, and with what weight.
struct Tokens {
  const int32_t* input;   // [count] row of the staged input
  const int32_t* output;  // [count] row of the result
  const float* weight;    // [count] routing weight
  int64_t count;
};

// A run of panels of one expert, and where the thread will probably go on: so that its weights are under way by then.
struct Work {
  int64_t expert, begin, end;
  int64_t next_expert, next_begin;
};

struct Kernels {
  const char* name;
  // Bytes of one staged element on the bf16 path and on the integer path.
  int float_bytes, integer_bytes;

  // Rows [begin, end) of `source` [*, cols] (any float dtype) into staged form.
  void (*stage)(const Layout& weights, const void* source, DType dtype, int64_t stride, int64_t cols, int64_t begin, int64_t end, const Staged& to);
  // hidden[token] = act(gate x, up x); `hidden` is staged (bf16 path) or bf16 rows (integer path).
  void (*gate_up)(const Experts&, const Work&, const Staged& x, const Tokens&, uint8_t* hidden, int64_t hidden_row_bytes, uint8_t* scratch);
  // result[token] += weight * (down hidden); `result` is f32 [*][stride], its first column being panel `begin`.
  void (*down)(const Experts&, const Work&, const Staged& hidden, const Tokens&, float* result, int64_t stride, uint8_t* scratch);
  void (*store)(const float* result, int64_t count, void* to, DType dtype);

  // Panel `panel` of a matrix from rows of `source` (row stride in elements); false if a NaN or Inf cannot be packed.
  bool (*pack_panel)(const Layout&, int64_t panel, const void* source, DType dtype, int64_t stride, bool search, uint8_t* weight, uint8_t* scale,
                     uint8_t* zero, float* scratch);

  // For measuring: issue `count` full-width dot products of a kind; read `bytes` bytes.
  void (*dots)(int64_t count, bool integer);
  uint64_t (*read)(const uint8_t* from, int64_t bytes);
  int64_t macs_per_float_dot, macs_per_integer_dot;
};

// Scratch bytes one thread needs for gate_up and down.
inline int64_t block_scratch_bytes(const Layout& layout) {
  int64_t cols = layout.padded_cols();
  return kBlockPanels * (cols * kPanelRows + round_up(cols, kActivationGroup) / kActivationGroup * kPanelRows * 4);
}

extern const Kernels kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated;

}  // namespace coterie
