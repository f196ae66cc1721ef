#include "layer/forward.h"

#include <pthread.h>

#include <algorithm>
#include <cstring>
#include <mutex>

#include "layer/routing.h"
#include "runtime/memory.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

constexpr int64_t kChunkTokens = 4096;   // longer batches run in chunks, so that the workspace stays bounded
constexpr int64_t kItemsPerThread = 8;   // work items a thread takes in turn: enough to even out, few enough to stay cheap

// Memory that grows and is kept.
class Buffer {
 public:
  ~Buffer() { release(); }
  uint8_t* at_least(int64_t bytes) {
    if (bytes > size_) {
      release();
      memory_ = allocate_pages(bytes);
      if (!memory_) throw std::bad_alloc();
      size_ = bytes;
    }
    return memory_;
  }
  void release() {
    if (memory_) free_pages(memory_, size_);
    memory_ = nullptr;
    size_ = 0;
  }

 private:
  uint8_t* memory_ = nullptr;
  int64_t size_ = 0;
};

// Activations of `rows` rows staged for a matrix.
class StagedBuffer {
 public:
  Staged at_least(const Layout& weights, const Kernels& kernels, int64_t rows) {
    Staged s{};
    s.cols = weights.padded_cols();
    const bool integer = weights.format != Format::bf16;
    s.row_bytes = s.cols * (integer ? kernels.integer_bytes : kernels.float_bytes);
    s.unit = weights.group ? weights.group : kActivationGroup;
    s.data = data_.at_least(rows * s.row_bytes + kLine);
    if (integer) {
      s.scale = reinterpret_cast<float*>(scale_.at_least(rows * s.groups() * 4));
      s.offset = reinterpret_cast<int32_t*>(offset_.at_least(rows * (s.units() + s.groups()) * 4));
      s.group_offset = s.offset + rows * s.units();
    }
    return s;
  }
  void release() { data_.release(), scale_.release(), offset_.release(); }

 private:
  Buffer data_, scale_, offset_;
};

struct Workspace {
  std::mutex turn;
  Routing routing;
  StagedBuffer input, hidden;
  Buffer hidden_rows, result, scratch;
};

// Never destroyed, replaced in a forked child: another thread of the parent may have held it.
Workspace* workspace = new Workspace;
const int registered = pthread_atfork(nullptr, nullptr, [] { workspace = new Workspace; });

void stage_rows(const Kernels& kernels, const Layout& weights, const void* source, DType dtype, int64_t stride, int64_t cols, int64_t rows,
                const Staged& to) {
  const int64_t step = std::max<int64_t>(1, (rows + thread_count() * kItemsPerThread - 1) / (thread_count() * kItemsPerThread));
  parallel((rows + step - 1) / step, [&](int64_t item, int) {
    kernels.stage(weights, source, dtype, stride, cols, item * step, std::min(rows, (item + 1) * step), to);
  });
}

void forward_chunk(Workspace& w, const Experts& layer, const Kernels& kernels, const Batch& batch) {
  const int threads = thread_count();
  const bool integer = layer.in.format != Format::bf16;
  Routing& routing = w.routing;
  routing.group(batch.ids, batch.weights, batch.tokens, batch.top_k, layer.count);
  const int64_t slots = routing.slots(), active = static_cast<int64_t>(routing.experts.size());
  const int64_t scratch_bytes = round_up(std::max(block_scratch_bytes(layer.in), block_scratch_bytes(layer.out)), 4096);
  uint8_t* scratch = w.scratch.at_least(scratch_bytes * threads);

  Staged input = w.input.at_least(layer.in, kernels, batch.tokens);
  const bool as_is = !integer && kernels.float_bytes == 2 && batch.x_dtype == DType::bf16 && layer.hidden == input.cols;
  if (as_is) {
    input.data = static_cast<uint8_t*>(const_cast<void*>(batch.x));
    input.row_bytes = batch.x_stride * 2;
  } else {
    stage_rows(kernels, layer.in, batch.x, batch.x_dtype, batch.x_stride, layer.hidden, batch.tokens, input);
  }

  Staged hidden = w.hidden.at_least(layer.out, kernels, slots);
  uint8_t* rows = hidden.data;
  int64_t row_bytes = hidden.row_bytes;
  if (integer) {
    row_bytes = hidden.cols * 2;
    rows = w.hidden_rows.at_least(slots * row_bytes);
  }
  const int64_t columns = layer.in.panels() * kPanelRows, element = row_bytes / hidden.cols;
  if (columns < hidden.cols)
    for (int64_t s = 0; s < slots; s++) memset(rows + s * row_bytes + columns * element, 0, (hidden.cols - columns) * element);

  if (active) {
    const int64_t step = layer.has_gate ? kBlockPanels / 2 : kBlockPanels, steps = (layer.in.panels() + step - 1) / step;
    const int64_t parts = std::clamp<int64_t>((threads * kItemsPerThread + active - 1) / active, 1, steps);
    parallel(active * parts, [&](int64_t item, int thread) {
      const int64_t i = item / parts, part = item % parts;
      const int64_t next = std::min(item + threads, active * parts - 1);
      const Work work{routing.experts[i], steps * part / parts * step, std::min(layer.in.panels(), steps * (part + 1) / parts * step),
                      routing.experts[next / parts], steps * (next % parts) / parts * step};
      kernels.gate_up(layer, work, input, routing.into_hidden(i), rows, row_bytes, scratch + thread * scratch_bytes);
    });
    if (integer) stage_rows(kernels, layer.out, rows, DType::bf16, hidden.cols, hidden.cols, slots, hidden);
  }

  const int64_t blocks = (layer.out.panels() + kBlockPanels - 1) / kBlockPanels;
  const int64_t items = std::min<int64_t>(blocks, threads * kItemsPerThread);
  const int64_t widest = (blocks + items - 1) / items * kBlockPanels * kPanelRows;
  const int64_t result_bytes = round_up(batch.tokens * widest * 4, 4096);
  uint8_t* results = w.result.at_least(result_bytes * threads);
  parallel(items, [&](int64_t item, int thread) {
    const int64_t begin = blocks * item / items * kBlockPanels, end = std::min(layer.out.panels(), blocks * (item + 1) / items * kBlockPanels);
    const int64_t width = (end - begin) * kPanelRows, first = begin * kPanelRows;
    auto* result = reinterpret_cast<float*>(results + thread * result_bytes);
    memset(result, 0, batch.tokens * width * 4);
    for (int64_t i = 0; i < active; i++) {
      const Work work{routing.experts[i], begin, end, routing.experts[std::min(i + 1, active - 1)], begin};
      kernels.down(layer, work, hidden, routing.into_result(i), result, width, scratch + thread * scratch_bytes);
    }
    const int64_t size = batch.out_dtype == DType::f32 ? 4 : 2, there = std::min(width, layer.hidden - first);
    for (int64_t t = 0; t < batch.tokens; t++)
      kernels.store(result + t * width, there, static_cast<uint8_t*>(batch.out) + (t * layer.hidden + first) * size, batch.out_dtype);
  });
}

}  // namespace

void forward(const Experts& layer, const Kernels& kernels, const Batch& batch) {
  std::lock_guard<std::mutex> lock(workspace->turn);
  const int64_t x_size = batch.x_dtype == DType::f32 ? 4 : 2, out_size = batch.out_dtype == DType::f32 ? 4 : 2;
  for (int64_t begin = 0; begin < batch.tokens; begin += kChunkTokens) {
    Batch chunk = batch;
    chunk.tokens = std::min(kChunkTokens, batch.tokens - begin);
    chunk.x = static_cast<const uint8_t*>(batch.x) + begin * batch.x_stride * x_size;
    chunk.ids = batch.ids + begin * batch.top_k;
    chunk.weights = batch.weights + begin * batch.top_k;
    chunk.out = static_cast<uint8_t*>(batch.out) + begin * layer.hidden * out_size;
    forward_chunk(*workspace, layer, kernels, chunk);
  }
}

void release_workspace() {
  std::lock_guard<std::mutex> lock(workspace->turn);
  workspace->input.release();
  workspace->hidden.release();
  workspace->hidden_rows.release();
  workspace->result.release();
  workspace->scratch.release();
}

}  // namespace coterie
