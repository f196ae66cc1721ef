#include "layer/workspace.h"

#include <pthread.h>

#include <algorithm>
#include <new>

#include "runtime/memory.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

// Never destroyed; replaced in a forked child, as another thread of the parent may have held it.
Workspace* shared = new Workspace;
const int registered = pthread_atfork(nullptr, nullptr, [] { shared = new Workspace; });

}  // namespace

uint8_t* Buffer::at_least(int64_t bytes) {
  if (bytes > size_) {
    release();
    memory_ = allocate_pages(bytes);
    if (!memory_) throw std::bad_alloc();
    size_ = bytes;
  }
  bound(memory_, bytes, size_);
  return memory_;
}

void Buffer::release() {
  if (memory_) free_pages(memory_, size_);
  memory_ = nullptr;
  size_ = 0;
}

Staged StagedBuffer::floats(const Kernels& kernels, int64_t rows, int64_t cols) {
  Staged s{};
  s.cols = cols;
  s.unit = kActivationGroup;
  s.row_bytes = cols * kernels.float_bytes;
  s.data = data_.at_least(rows * s.row_bytes + kLine);
  return s;
}

Staged StagedBuffer::integers(const Kernels& kernels, int64_t rows, const Layout& weights) {
  Staged s{};
  s.integer = true;
  s.cols = weights.padded_cols();
  s.unit = weights.step_row_bytes ? weights.step / weights.step_scales : kActivationGroup;
  s.row_bytes = s.cols * kernels.integer_bytes;
  s.data = data_.at_least(rows * s.row_bytes + kLine);
  s.scale = reinterpret_cast<float*>(scale_.at_least(rows * s.groups() * 4));
  s.offset = reinterpret_cast<int32_t*>(offset_.at_least(rows * (s.units() + s.groups()) * 4));
  s.group_offset = s.offset + rows * s.units();
  return s;
}

void StagedBuffer::release() { data_.release(), scale_.release(), offset_.release(); }

void Workspace::release() {
  for (StagedBuffer* b : {&input, &hidden, &low_gate, &low_up, &low_down, &grad_out, &grads, &d_low_down}) b->release();
  for (Buffer* b : {&hidden_rows, &result, &scratch, &weight_parts}) b->release();
}

int64_t Workspace::bytes() {
  int64_t sum = 0;
  for (StagedBuffer* b : {&input, &hidden, &low_gate, &low_up, &low_down, &grad_out, &grads, &d_low_down}) sum += b->bytes();
  for (Buffer* b : {&hidden_rows, &result, &scratch, &weight_parts}) sum += b->bytes();
  return sum;
}

Workspace& workspace() { return *shared; }

void release_workspace() {
  std::lock_guard<std::mutex> lock(shared->turn);
  shared->release();
}

int64_t workspace_bytes() {
  std::lock_guard<std::mutex> lock(shared->turn);
  return shared->bytes();
}

Staged staged_rows(StagedBuffer& buffer, const Kernels& kernels, const Layout& weights, const Strided& source, int64_t cols, int64_t padded, int64_t rows,
                   bool integer) {
  Staged to = integer ? buffer.integers(kernels, rows, weights) : buffer.floats(kernels, rows, padded);
  if (!integer && kernels.float_bytes == 2 && source.dtype == DType::bf16 && cols == padded && source.stride == padded) {
    to.data = static_cast<uint8_t*>(const_cast<void*>(source.data));
  } else {
    stage_rows(kernels, weights, source.data, source.dtype, source.stride, cols, rows, to);
  }
  return to;
}

void stage_rows(const Kernels& kernels, const Layout& weights, const void* source, DType dtype, int64_t stride, int64_t cols, int64_t rows,
                const Staged& to) {
  const int64_t items = thread_count() * kItemsPerThread, step = std::max<int64_t>(1, (rows + items - 1) / items);
  parallel((rows + step - 1) / step, [&](int64_t item, int) {
    kernels.stage(weights, source, dtype, stride, cols, item * step, std::min(rows, (item + 1) * step), to);
  });
}

}  // namespace coterie
