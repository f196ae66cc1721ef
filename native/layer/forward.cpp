#include "layer/forward.h"

#include <algorithm>
#include <cstring>

#include "layer/workspace.h"
#include "runtime/threads.h"

namespace coterie {
namespace {

constexpr int64_t kChunkTokens = 4096;  // longer batches run in chunks, so that the workspace stays bounded

// low[slot] = scaling * A x for every expert with tokens.
Staged low_rank(StagedBuffer& buffer, const LoraFactor& factor, int64_t in, int64_t out, const Kernels& kernels, const Routing& routing,
                const Staged& x, bool x_by_slot) {
  const Staged low = buffer.floats(kernels, routing.slots(), factor.padded_rank());
  if (factor.rank)
    parallel(static_cast<int64_t>(routing.experts.size()), [&](int64_t i, int) {
      kernels.low_rank(factor, routing.experts[i], in, out, false, x, x_by_slot ? routing.within_hidden(i) : routing.into_hidden(i), low, 0);
    });
  return low;
}

void forward_chunk(Workspace& w, const Experts& layer, const Kernels& kernels, const Batch& batch, const Training* training) {
  const int threads = thread_count();
  const bool integer = batch.integer;
  Routing& routing = w.routing;
  routing.group(batch.ids, batch.weights, batch.tokens, batch.top_k, layer.count);
  const int64_t slots = routing.slots(), active = static_cast<int64_t>(routing.experts.size());
  const int64_t scratch_bytes = round_up(std::max(block_scratch_bytes(layer.in), block_scratch_bytes(layer.out)), 4096);
  uint8_t* scratch = w.scratch.at_least(scratch_bytes * threads);

  Staged input = integer ? w.input.integers(kernels, batch.tokens, layer.in) : w.input.floats(kernels, batch.tokens, layer.in.padded_cols());
  const bool as_is = !integer && kernels.float_bytes == 2 && batch.x_dtype == DType::bf16 && layer.hidden == input.cols && batch.x_stride == input.cols;
  if (as_is) {
    input.data = static_cast<uint8_t*>(const_cast<void*>(batch.x));
    input.row_bytes = batch.x_stride * 2;
  } else {
    stage_rows(kernels, layer.in, batch.x, batch.x_dtype, batch.x_stride, layer.hidden, batch.tokens, input);
  }

  Staged hidden = integer ? w.hidden.integers(kernels, slots, layer.out) : w.hidden.floats(kernels, slots, layer.out.padded_cols());
  uint8_t* rows = hidden.data;
  int64_t row_bytes = hidden.row_bytes;
  if (integer) {
    row_bytes = hidden.cols * 2;
    rows = w.hidden_rows.at_least(slots * row_bytes);
  }
  const int64_t columns = layer.in.panels() * kPanelRows, element = row_bytes / hidden.cols;
  if (columns < hidden.cols)
    for (int64_t s = 0; s < slots; s++) memset(rows + s * row_bytes + columns * element, 0, (hidden.cols - columns) * element);

  GateUpTraining gate_up{};
  DownTraining down{};
  if (training) {
    const Lora& lora = training->lora;
    gate_up = {&lora, low_rank(w.low_gate, lora.gate, layer.hidden, layer.intermediate, kernels, routing, input, false),
               low_rank(w.low_up, lora.up, layer.hidden, layer.intermediate, kernels, routing, input, false), training->gate, training->up,
               routing.position.data()};
  }
  if (active) {
    const int64_t step = layer.has_gate ? kBlockPanels / 2 : kBlockPanels, steps = (layer.in.panels() + step - 1) / step;
    const int64_t parts = std::clamp<int64_t>((threads * kItemsPerThread + active - 1) / active, 1, steps);
    parallel(active * parts, [&](int64_t item, int thread) {
      const int64_t i = item / parts, part = item % parts;
      const int64_t next = std::min(item + threads, active * parts - 1);
      const Work work{routing.experts[i], steps * part / parts * step, std::min(layer.in.panels(), steps * (part + 1) / parts * step),
                      routing.experts[next / parts], steps * (next % parts) / parts * step};
      kernels.gate_up(layer, work, input, routing.into_hidden(i), rows, row_bytes, scratch + thread * scratch_bytes,
                      training ? &gate_up : nullptr);
    });
    if (integer) stage_rows(kernels, layer.out, rows, DType::bf16, hidden.cols, hidden.cols, slots, hidden);
  }
  if (training)
    down = {&training->lora, low_rank(w.low_down, training->lora.down, layer.intermediate, layer.hidden, kernels, routing, hidden, true)};

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
      kernels.down(layer, work, hidden, routing.into_result(i), result, width, scratch + thread * scratch_bytes,
                   training ? &down : nullptr);
    }
    const int64_t size = batch.out_dtype == DType::f32 ? 4 : 2, there = std::min(width, layer.hidden - first);
    for (int64_t t = 0; t < batch.tokens; t++)
      kernels.store(result + t * width, there, static_cast<uint8_t*>(batch.out) + (t * layer.hidden + first) * size, batch.out_dtype);
  });
}

}  // namespace

void forward(const Experts& layer, const Kernels& kernels, const Batch& batch, const Training* training) {
  Workspace& w = workspace();
  std::lock_guard<std::mutex> lock(w.turn);
  const int64_t x_size = batch.x_dtype == DType::f32 ? 4 : 2, out_size = batch.out_dtype == DType::f32 ? 4 : 2;
  for (int64_t begin = 0; begin < batch.tokens; begin += kChunkTokens) {
    Batch chunk = batch;
    chunk.tokens = std::min(kChunkTokens, batch.tokens - begin);
    chunk.x = static_cast<const uint8_t*>(batch.x) + begin * batch.x_stride * x_size;
    chunk.ids = batch.ids + begin * batch.top_k;
    chunk.weights = batch.weights + begin * batch.top_k;
    chunk.out = static_cast<uint8_t*>(batch.out) + begin * layer.hidden * out_size;
    if (!training) {
      forward_chunk(w, layer, kernels, chunk, nullptr);
      continue;
    }
    Training part = *training;
    const int64_t kept = begin * batch.top_k * layer.intermediate;
    if (part.gate) part.gate += kept;
    if (part.up) part.up += kept;
    forward_chunk(w, layer, kernels, chunk, &part);
  }
}

}  // namespace coterie
