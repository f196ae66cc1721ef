// The Python module coterie._native: addresses and sizes in, results written in place. Shapes and dtypes are checked by src/coterie/experts.py.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <string>
#include <tuple>

#include "formats/unpack.h"
#include "layer/backward.h"
#include "layer/workspace.h"
#include "runtime/dispatch.h"
#include "runtime/memory.h"
#include "runtime/numa.h"
#include "runtime/threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace coterie;

namespace {

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using LayoutTuple = std::tuple<int, int64_t, int64_t, int64_t, bool>;  // format, rows, cols, group, zero point

Layout layout_of(const LayoutTuple& t) {
  return {static_cast<Format>(std::get<0>(t)), std::get<1>(t), std::get<2>(t), std::get<3>(t), std::get<4>(t)};
}

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
double pack(const LayoutTuple& t, uintptr_t source, int dtype, int64_t stride, bool search, uintptr_t weight, uintptr_t scale, uintptr_t zero) {
  nb::gil_scoped_release released;
  const Layout layout = layout_of(t);
  const Kernels& k = kernels();
  std::atomic<bool> finite{true};
  std::vector<PackError> errors(layout.panels());
  parallel(layout.panels(), [&](int64_t panel, int) {
    static thread_local std::vector<float> scratch;
    scratch.resize(layout.padded_cols() * kPanelRows);
    if (!k.pack_panel(layout, panel, at<void>(source), static_cast<DType>(dtype), stride, search, at<uint8_t>(weight), at<uint8_t>(scale),
                      at<uint8_t>(zero), scratch.data(), errors[panel]))
      finite = false;
  });
  if (!finite) return -1.0;
  PackError sum;
  for (const PackError& e : errors) sum = {sum.difference + e.difference, sum.total + e.total};
  return sum.difference == 0.0 ? 0.0 : std::sqrt(sum.difference / sum.total);
}

void unpack(const LayoutTuple& t, uintptr_t weight, uintptr_t scale, uintptr_t zero, uintptr_t to) {
  nb::gil_scoped_release released;
  const Layout layout = layout_of(t);
  const Matrix matrix{at<uint8_t>(weight), at<uint8_t>(scale), at<uint8_t>(zero)};
  parallel(layout.panels(), [&](int64_t panel, int) { unpack_panels(layout, matrix, panel, panel + 1, at<float>(to)); });
}

// a, b, types of a and b, rank, scaling, gradients of a and b
using FactorTuple = std::tuple<uintptr_t, uintptr_t, int, int, int64_t, float, uintptr_t, uintptr_t>;

LoraFactor factor_of(const FactorTuple& t) {
  return {at<void>(std::get<0>(t)), at<void>(std::get<1>(t)), static_cast<DType>(std::get<2>(t)), static_cast<DType>(std::get<3>(t)),
          std::get<4>(t),           std::get<5>(t),           at<void>(std::get<6>(t)),           at<void>(std::get<7>(t))};
}

using LoraTuple = std::tuple<FactorTuple, FactorTuple, FactorTuple, bool>;  // gate, up, down, shared A

Lora lora_of(const LoraTuple& t) { return {factor_of(std::get<0>(t)), factor_of(std::get<1>(t)), factor_of(std::get<2>(t)), std::get<3>(t)}; }

// The experts of a layer, by the addresses of their packed parts.
class Layer {
 public:
  Layer(const LayoutTuple& in, const LayoutTuple& out, std::tuple<int, float, float, float> activation,
        const nb::ndarray<int64_t, nb::shape<3, -1, 3>, nb::c_contig, nb::device::cpu>& parts, bool has_gate, uintptr_t gate_bias, uintptr_t up_bias,
        uintptr_t down_bias) {
    layer_.in = layout_of(in);
    layer_.out = layout_of(out);
    layer_.count = static_cast<int64_t>(parts.shape(1));
    layer_.hidden = layer_.in.cols;
    layer_.intermediate = layer_.in.rows;
    layer_.has_gate = has_gate;
    layer_.activation = {static_cast<ActivationKind>(std::get<0>(activation)), std::get<1>(activation), std::get<2>(activation),
                         std::get<3>(activation)};
    layer_.gate_bias = at<float>(gate_bias);
    layer_.up_bias = at<float>(up_bias);
    layer_.down_bias = at<float>(down_bias);
    auto matrices = [&](int projection) {
      std::vector<Matrix> list;
      for (int64_t e = 0; e < layer_.count; e++)
        list.push_back({at<uint8_t>(parts(projection, e, 0)), at<uint8_t>(parts(projection, e, 1)), at<uint8_t>(parts(projection, e, 2))});
      return list;
    };
    layer_.gate = matrices(0);
    layer_.up = matrices(1);
    layer_.down = matrices(2);
  }

  void forward(int64_t tokens, int64_t top_k, uintptr_t x, int x_dtype, int64_t x_stride, uintptr_t ids, uintptr_t weights, uintptr_t out,
               int out_dtype) const {
    const Batch batch{tokens,          top_k,          at<void>(x), static_cast<DType>(x_dtype),    x_stride,
                      at<int64_t>(ids), at<float>(weights), at<void>(out), static_cast<DType>(out_dtype)};
    check_ids(batch);
    nb::gil_scoped_release released;
    coterie::forward(layer_, kernels(), batch);
  }

  void forward_training(int64_t tokens, int64_t top_k, uintptr_t x, int x_dtype, int64_t x_stride, uintptr_t ids, uintptr_t weights, uintptr_t out,
                        int out_dtype, uintptr_t gate, uintptr_t up, const LoraTuple& lora) const {
    const Batch batch{tokens,          top_k,          at<void>(x), static_cast<DType>(x_dtype),    x_stride,
                      at<int64_t>(ids), at<float>(weights), at<void>(out), static_cast<DType>(out_dtype)};
    check_ids(batch);
    const Training training{lora_of(lora), at<uint16_t>(gate), at<uint16_t>(up)};
    nb::gil_scoped_release released;
    coterie::forward(layer_, kernels(), batch, &training);
  }

  void backward(int64_t tokens, int64_t top_k, uintptr_t x, int x_dtype, uintptr_t grad_out, int grad_out_dtype, uintptr_t ids, uintptr_t weights,
                uintptr_t gate, uintptr_t up, uintptr_t grad_x, int grad_x_dtype, uintptr_t grad_weights, const LoraTuple& lora) const {
    const BackwardBatch batch{tokens,          top_k,           at<void>(x),      at<void>(grad_out),
                              static_cast<DType>(x_dtype),      static_cast<DType>(grad_out_dtype),
                              at<int64_t>(ids), at<float>(weights), at<void>(grad_x), static_cast<DType>(grad_x_dtype), at<float>(grad_weights)};
    const Training training{lora_of(lora), at<uint16_t>(gate), at<uint16_t>(up)};
    nb::gil_scoped_release released;
    coterie::backward(layer_, kernels(), batch, training);
  }

 private:
  void check_ids(const Batch& batch) const {
    for (int64_t i = 0; i < batch.tokens * batch.top_k; i++)
      if (batch.ids[i] < -1 || batch.ids[i] >= layer_.count)
        throw nb::value_error(("expert id " + std::to_string(batch.ids[i]) + " of token " + std::to_string(i / batch.top_k) +
                               " is out of range: expected -1 or 0.." + std::to_string(layer_.count - 1))
                                  .c_str());
  }

  Experts layer_{};
};

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Bytes per second that all threads together read from memory far larger than the caches; the best of a few passes.
double measure_read_bandwidth() {
  nb::gil_scoped_release released;
  constexpr int64_t kBytes = int64_t{512} << 20, kPart = 4 << 20;
  const Kernels& k = kernels();
  uint8_t* memory = allocate_pages(kBytes);
  if (!memory) return 0.0;
  parallel(kBytes / kPart, [&](int64_t i, int) {
    for (int64_t b = 0; b < kPart; b += 8) *reinterpret_cast<int64_t*>(memory + i * kPart + b) = i + b;
  });
  double best = 0.0;
  std::atomic<uint64_t> sum{0};
  for (int pass = 0; pass < 4; pass++) {
    const double s = seconds_of([&] { parallel(kBytes / kPart, [&](int64_t i, int) { sum += k.read(memory + i * kPart, kPart); }); });
    best = std::max(best, kBytes / s);
  }
  free_pages(memory, kBytes);
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

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "coterie's CPU engine";
  nb::set_leak_warnings(false);  // a model that lives until the interpreter exits is no leak
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<const LayoutTuple&, const LayoutTuple&, std::tuple<int, float, float, float>,
                    const nb::ndarray<int64_t, nb::shape<3, -1, 3>, nb::c_contig, nb::device::cpu>&, bool, uintptr_t, uintptr_t, uintptr_t>())
      .def("forward", &Layer::forward)
      .def("forward_training", &Layer::forward_training)
      .def("backward", &Layer::backward);
  m.def("allocate", &allocate, "bytes"_a, "Zeroed huge-page memory as a uint8 tensor.");
  m.def("pack", &pack);
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
  m.def("release_workspace", &release_workspace);
  m.def("measure_read_bandwidth", &measure_read_bandwidth, "Bytes per second, all threads.");
  m.def("measure_dot_rate", &measure_dot_rate, "integer"_a, "Multiply-adds per second, all threads.");
}
