// The Python module coterie._native: addresses and sizes in, results written in place. Tensors are checked by src/coterie/border.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <memory>
#include <stdexcept>
#include <string>

#include "bind.h"
#include "bind_tickets.h"
#include "formats/fields.h"
#include "formats/pack_codes.h"
#include "formats/unpack.h"
#include "layer/placement.h"
#include "layer/workspace.h"
#include "runtime/dispatch.h"
#include "runtime/memory.h"
#include "runtime/numa.h"
#include "runtime/threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace coterie;

namespace {

nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>> allocate(int64_t bytes) {
  uint8_t* memory = allocate_pages(bytes);
  if (!memory) throw std::bad_alloc();
  struct Owner {
    uint8_t* memory;
    int64_t bytes;
  };
  nb::capsule owner(new Owner{memory, bytes}, [](void* p) noexcept {
    auto* o = static_cast<Owner*>(p);
    free_pages(o->memory, o->bytes);
    delete o;
  });
  return nb::ndarray<nb::pytorch, uint8_t, nb::ndim<1>>(memory, {static_cast<size_t>(bytes)}, owner);
}

// ||W - packed(W)|| / ||W||; below zero where a NaN or Inf cannot be held.
double pack(const LayoutTuple& t, uintptr_t source, int dtype, int64_t stride, bool search, uintptr_t matrix) {
  nb::gil_scoped_release released;
  const Layout layout = layout_from(t);
  const Kernels& k = kernels();
  std::vector<float> tiles;
  PackOptions options{search, nullptr, 0.0f};
  if (layout.needs_largest) {
    const int64_t count = (layout.rows + kScaleTileRows - 1) / kScaleTileRows;
    tiles.resize(count * layout.steps());
    parallel(count, [&](int64_t tile, int) { k.largest_of_tiles(layout, tile, at<void>(source), static_cast<DType>(dtype), stride, tiles.data()); });
    options = {search, tiles.data(), *std::max_element(tiles.begin(), tiles.end())};
  }
  std::atomic<bool> finite{true};
  std::vector<PackError> errors(layout.panels());
  parallel(layout.panels(), [&](int64_t panel, int) {
    static thread_local std::vector<float> scratch;
    scratch.resize(layout.padded_cols() * kPanelRows);
    if (!k.pack_panel(layout, panel, at<void>(source), static_cast<DType>(dtype), stride, options, at<uint8_t>(matrix), scratch.data(), errors[panel]))
      finite = false;
  });
  if (!finite) return -1.0;
  PackError sum;
  for (const PackError& e : errors) sum = {sum.difference + e.difference, sum.total + e.total};
  return sum.difference == 0.0 ? 0.0 : std::sqrt(sum.difference / sum.total);
}

// Whether every code and scale stands for a finite number; where not, what was packed is of no use.
bool pack_codes(const LayoutTuple& t, uintptr_t codes, uintptr_t scale, uintptr_t zero, uintptr_t row_scale, uintptr_t matrix) {
  nb::gil_scoped_release released;
  const Layout layout = layout_from(t);
  const Codes source{at<uint8_t>(codes), at<uint8_t>(scale), at<uint8_t>(zero), at<float>(row_scale)};
  std::atomic<bool> finite{true};
  parallel(layout.blocks(), [&](int64_t block, int) {
    if (!pack_codes_of_block(layout, source, block, at<uint8_t>(matrix))) finite = false;
  });
  return finite;
}

using FieldTuple = std::tuple<int64_t, int, int>;  // at, bits, span

// Of `number` blocks, as many at once as make some pages of codes.
void spread_fields(uintptr_t data, int64_t number, int64_t bytes, int64_t count, const FieldTuple& lower, const FieldTuple& upper, int flip, uintptr_t to) {
  nb::gil_scoped_release released;
  const auto field = [](const FieldTuple& t) { return Field{std::get<0>(t), std::get<1>(t), std::get<2>(t)}; };
  const Blocks blocks{at<uint8_t>(data), bytes, count, field(lower), field(upper), static_cast<uint8_t>(flip)};
  const int64_t together = std::max<int64_t>((1 << 16) / count, 1);
  parallel((number + together - 1) / together, [&](int64_t item, int) {
    spread_fields(blocks, item * together, std::min(number, (item + 1) * together), at<uint8_t>(to));
  });
}

void unpack(const LayoutTuple& t, uintptr_t matrix, uintptr_t to) {
  nb::gil_scoped_release released;
  const Layout layout = layout_from(t);
  parallel(layout.blocks(), [&](int64_t block, int) { unpack_blocks(layout, at<uint8_t>(matrix), block, block + 1, at<float>(to)); });
}

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Reads a part of memory; `ahead`: fetches what comes next meanwhile, as kernels do where the hardware is late.
uint64_t read_part(const Kernels& k, const uint8_t* part, int64_t bytes, bool ahead) {
  constexpr int64_t kPiece = 16 << 10;
  uint64_t sum = 0;
  for (int64_t at = 0; at < bytes; at += kPiece) {
    if (ahead && at + kPiece < bytes)
      for (int64_t line = 0; line < kPiece; line += kLine) __builtin_prefetch(part + at + kPiece + line, 0, 2);
    sum += k.read(part + at, kPiece);
  }
  return sum;
}

// Bytes per second that all threads together read from memory far larger than the caches, each from its NUMA node; the best of a few passes.
double measure_read_bandwidth() {
  nb::gil_scoped_release released;
  constexpr int64_t kBytes = int64_t{512} << 20, kPart = 4 << 20;
  const Kernels& k = kernels();
  const auto free = [](uint8_t* pages) { free_pages(pages, kBytes); };
  const std::unique_ptr<uint8_t, decltype(free)> pages(allocate_pages(kBytes), free);
  uint8_t* const memory = pages.get();
  if (!memory) return 0.0;
  const int nodes = numa_nodes();
  std::vector<int64_t> first(nodes + 1);
  for (int node = 0; node <= nodes; node++) first[node] = first_block(kBytes / kPart, node, nodes);
  if (nodes > 1) {
    std::vector<int> owner(kBytes / kHugePage);
    for (int node = 0; node < nodes; node++)
      std::fill(owner.begin() + first[node] * (kPart / kHugePage), owner.begin() + first[node + 1] * (kPart / kHugePage), node);
    take_pages(memory, kHugePage, owner);
  }
  parallel(first, [&](int64_t i, int) {
    for (int64_t b = 0; b < kPart; b += 8) *reinterpret_cast<int64_t*>(memory + i * kPart + b) = i + b;
  });
  double best = 0.0;
  std::atomic<uint64_t> sum{0};
  for (int pass = 0; pass < 6; pass++) {
    const double s = seconds_of([&] { parallel(first, [&](int64_t i, int) { sum += read_part(k, memory + i * kPart, kPart, pass % 2); }); });
    best = std::max(best, kBytes / s);
  }
  return best;
}

// Multiply-adds per second, all threads together, of the dot products the bf16 or the integer path issues; the best of a few passes.
double measure_dot_rate(bool integer) {
  nb::gil_scoped_release released;
  constexpr int64_t kDots = 1 << 24;
  const Kernels& k = kernels();
  double best = 0.0;
  for (int pass = 0; pass < 4; pass++) {
    const double s = seconds_of([&] { parallel(thread_count(), [&](int64_t, int) { k.dots(kDots, integer); }); });
    best = std::max(best, static_cast<double>(kDots) * thread_count() * (integer ? k.macs_per_integer_dot : k.macs_per_float_dot) / s);
  }
  return best;
}

// Has worker `thread` of the pool throw, a std::bad_alloc or a std::runtime_error, while the others are at work. For tests.
void throw_in_worker(int thread, bool no_memory) {
  if (thread < 0 || thread >= thread_count()) throw std::out_of_range("there is no such thread");
  std::atomic<bool> thrown{false};
  parallel(64 * thread_count(), [&](int64_t, int t) {
    if (t == thread) {
      thrown = true;
      if (no_memory) throw std::bad_alloc();
      throw std::runtime_error("thrown by a worker");
    }
    while (!thrown) sched_yield();
  });
}

ExpertsMemory experts_memory(const LayoutTuple& in, const LayoutTuple& out, bool has_gate, int64_t count, int64_t bytes) {
  return {layout_from(in), layout_from(out), has_gate, count, bytes};
}

// Has the pages of experts that lie back to back at an address, and were never written to, taken on the NUMA nodes that compute them.
void place(const LayoutTuple& in, const LayoutTuple& out, bool has_gate, int64_t count, int64_t bytes, uintptr_t memory) {
  nb::gil_scoped_release released;
  place_experts(experts_memory(in, out, has_gate, count, bytes), at<uint8_t>(memory));
}

// (node that computes them, node that holds them, bytes) of one expert.
std::vector<std::tuple<int, int, int64_t>> locate(const LayoutTuple& in, const LayoutTuple& out, bool has_gate, int64_t bytes, uintptr_t expert) {
  std::vector<std::tuple<int, int, int64_t>> found;
  for (const Located& l : locate_expert(experts_memory(in, out, has_gate, 1, bytes), at<uint8_t>(expert)))
    found.emplace_back(l.computed_by, l.held_by, l.bytes);
  return found;
}

using NodeTuple = std::pair<int, std::vector<int>>;  // number, CPUs

// The items that each thread takes, in order, of those of each NUMA node; nobody takes a second one before all have their first. For tests.
std::vector<std::vector<int64_t>> taken_items(const std::vector<int64_t>& first) {
  nb::gil_scoped_release released;
  std::vector<std::vector<int64_t>> taken(thread_count());
  std::atomic<size_t> begun{0};
  parallel(first, [&](int64_t item, int thread) {
    if (taken[thread].empty()) begun++;
    taken[thread].push_back(item);
    while (begun < taken.size()) sched_yield();
  });
  return taken;
}

// (nodes, mask, node of every worker) of a folder laid out as /sys/devices/system/node. For tests.
std::tuple<std::vector<NodeTuple>, std::vector<unsigned long>, std::vector<int>> numa_layout(const std::string& folder, const std::vector<int>& allowed) {
  const std::vector<Node> nodes = read_nodes(folder, allowed);
  std::vector<NodeTuple> found;
  for (const Node& node : nodes) found.emplace_back(node.number, node.cpus);
  return {found, node_mask(nodes), worker_nodes(nodes)};
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "coterie's CPU engine";
  nb::set_leak_warnings(false);  // a model that lives until the interpreter exits is no leak
  bind_decode(m);
  bind_delta(m);
  bind_latent(m);
  bind_stream_call(m);
  bind_tickets(m);
  bind_layer(m);
  bind_linear(m);
  bind_attention(m);
  m.def("allocate", &allocate, "bytes"_a, "Zeroed huge-page memory as a uint8 tensor.");
  m.def("matrix_bytes", [](const LayoutTuple& t) { return layout_from(t).bytes(); }, "layout"_a, "Bytes of a packed matrix.");
  m.def("pack", &pack);
  m.def("pack_codes", &pack_codes);
  m.def("spread_fields", static_cast<void (*)(uintptr_t, int64_t, int64_t, int64_t, const FieldTuple&, const FieldTuple&, int, uintptr_t)>(&spread_fields));
  m.def("unpack", &unpack);
  auto names = [](bool automatic) {
    std::vector<std::string> found;
    for (const Kernels* k : available_kernels(automatic)) found.push_back(k->name);
    return found;
  };
  m.def("available_isas", [=] { return names(true); });
  m.def("emulated_isas", [=] { return names(false); }, "Variants for tests: their instructions are emulated.");
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("isa_reason", [] { return kernels_reason(); });
  m.def("use_isa", &use_kernels, "name"_a, "Switch instruction set in this process (for tests and comparisons).");
  m.def("available_cpus", &available_cpus);
  m.def("threads", &thread_count);
  m.def("set_threads", [](int count) {
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> lock(workspace().turn);  // a layer that is being computed keeps the threads it began with
    set_thread_count(count);
  }, "count"_a);
  m.def("numa_nodes", &numa_nodes);
  m.def("numa_layout", &numa_layout, "folder"_a, "allowed"_a);
  m.def("taken_items", &taken_items, "first"_a);
  m.def("pretend_nodes", [](const std::vector<int>& numbers) {
    nb::gil_scoped_release released;
    std::lock_guard<std::mutex> lock(workspace().turn);
    pretend_nodes(numbers);
  }, "numbers"_a, "NUMA nodes of these numbers instead of the machine's; none: the machine's. For tests.");
  m.def("page_owners", [](const LayoutTuple& in, const LayoutTuple& out, bool has_gate, int64_t count, int64_t bytes, int nodes) {
    return page_owners(experts_memory(in, out, has_gate, count, bytes), nodes);
  }, "in"_a, "out"_a, "has_gate"_a, "count"_a, "bytes"_a, "nodes"_a, "The node of each huge page of experts. For tests.");
  m.def("place", &place);
  m.def("locate", &locate);
  m.def("throw_in_worker", &throw_in_worker, "thread"_a, "no_memory"_a, nb::call_guard<nb::gil_scoped_release>());
  m.def("submit_throw_in_worker", [](int thread, bool no_memory) {
    return new OwningTicket([=] { throw_in_worker(thread, no_memory); }, nb::none());
  }, "thread"_a, "no_memory"_a);
  m.def("release_workspace", &release_workspace, nb::call_guard<nb::gil_scoped_release>());
  m.def("workspace_bytes", &workspace_bytes);
  m.def("measure_read_bandwidth", &measure_read_bandwidth, "Bytes per second, all threads.");
  m.def("measure_dot_rate", &measure_dot_rate, "integer"_a, "Multiply-adds per second, all threads.");
}
