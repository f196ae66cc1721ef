// Memory that forward and backward keep between calls: one for the process, used by one call at a time.
#pragma once
#include <mutex>

#include "isa/kernels.h"
#include "layer/routing.h"

namespace coterie {

// Grows when asked for more; contents are lost then.
class Buffer {
 public:
  ~Buffer() { release(); }
  uint8_t* at_least(int64_t bytes);
  void release();
  int64_t bytes() const { return size_; }

 private:
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0;
};

// Rows of activations in the form the kernels read.
class StagedBuffer {
 public:
  Staged integers(const Kernels& kernels, int64_t rows, const Layout& weights);
  Staged floats(const Kernels& kernels, int64_t rows, int64_t cols);  // cols: padded
  void release();
  int64_t bytes() const { return data_.bytes() + scale_.bytes() + offset_.bytes(); }

 private:
  Buffer data_, scale_, offset_;
};

struct Workspace {
  std::mutex turn;
  Routing routing;
  StagedBuffer input, hidden, low_gate, low_up, low_down;
  StagedBuffer grad_out, grads, d_low_down;
  Buffer hidden_rows, result, scratch, weight_parts;
  std::vector<int32_t> in_order;  // 0, 1, 2 ...

  void release();
  int64_t bytes();
};

Workspace& workspace();

// Gives the memory back; how much there is.
void release_workspace();
int64_t workspace_bytes();

// Rows of activations or gradients as they come.
struct Strided {
  const void* data;
  DType dtype;
  int64_t stride;  // elements from row to row
};

// Rows of `source` [rows, cols] as the kernels read them, `padded` columns wide: where they lie if they are adjacent, or else staged in `buffer`.
Staged staged_rows(StagedBuffer& buffer, const Kernels& kernels, const Layout& weights, const Strided& source, int64_t cols, int64_t padded, int64_t rows,
                   bool integer);

// Rows of `source` [rows, cols] staged, all threads taking part.
void stage_rows(const Kernels& kernels, const Layout& weights, const void* source, DType dtype, int64_t stride, int64_t cols, int64_t rows,
                const Staged& to);

constexpr int64_t kChunkTokens = 4096;  // longer batches run in chunks, so that the workspace stays bounded
constexpr int64_t kItemsPerThread = 8;  // work items a thread takes in turn: enough to even out, few enough to stay cheap

}  // namespace coterie
