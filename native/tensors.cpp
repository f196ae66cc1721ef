#include "tensors.h"

#include "formats/bfloat16.h"

namespace nb = nanobind;

namespace coterie {
namespace {

// The structures of DLPack's specification (version 1), under our names.
struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct View {
  void* data;
  Device device;
  int32_t dimensions;
  DataType dtype;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Managed {
  Version version;
  void* context;
  void (*release)(Managed*);
  uint64_t flags;
  View view;
};
struct Exchange {
  Version version;
  Exchange* older;
  int (*allocate)(View* like, Managed** made, void* error_context, void (*set_error)(void*, const char*, const char*));
  int (*managed_from_object)(void* object, Managed** made);
  int (*object_from_managed)(Managed* managed, void** object);
  int (*view_of_object)(void* object, View* view);
  int (*current_stream)(int32_t, int32_t, void**);
};

constexpr int32_t kCpu = 1;
constexpr uint8_t kInteger = 0, kFloat = 2, kBfloat = 4, kBool = 6;

PyTypeObject* type_of(const char* module, const char* name) {
  nb::object type = nb::module_::import_(module).attr(name);
  return reinterpret_cast<PyTypeObject*>(type.release().ptr());
}

struct Torch {
  PyTypeObject* tensor = nullptr;  // torch.Tensor itself: a subclass may answer for itself
  PyTypeObject* parameter = nullptr;
  const Exchange* exchange = nullptr;

  // Types are kept for as long as the process lives.
  Torch() {
    tensor = type_of("torch", "Tensor");
    parameter = type_of("torch.nn", "Parameter");
    nb::object capsule = nb::getattr(nb::handle(reinterpret_cast<PyObject*>(tensor)), "__dlpack_c_exchange_api__", nb::none());
    if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return;
    const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found->version.major == 1 && found->view_of_object) exchange = found;
  }
};

const Torch& torch() {
  static const Torch found;
  return found;
}

Element element_of(DataType t) {
  if (t.lanes != 1) return Element::other;
  if (t.code == kBfloat && t.bits == 16) return Element::bf16;
  if (t.code == kFloat && t.bits == 32) return Element::f32;
  if (t.code == kFloat && t.bits == 16) return Element::f16;
  if (t.code == kInteger && t.bits == 64) return Element::i64;
  if (t.code == kBool && t.bits == 8) return Element::boolean;
  return Element::other;
}

// A torch.Tensor on the CPU, of no subclass but torch's parameters; nothing for any other.
std::optional<View> view_of(nb::handle tensor) {
  const Torch& t = torch();
  if (!t.exchange || (Py_TYPE(tensor.ptr()) != t.tensor && Py_TYPE(tensor.ptr()) != t.parameter)) return {};
  View view;
  if (t.exchange->view_of_object(tensor.ptr(), &view) != 0) {
    PyErr_Clear();
    return {};
  }
  if (view.device.type != kCpu || !view.data) return {};
  return view;
}

uint8_t* data_of(const View& view) { return static_cast<uint8_t*>(view.data) + view.byte_offset; }

void set_error(void*, const char*, const char* message) { PyErr_SetString(PyExc_RuntimeError, message); }

}  // namespace

std::optional<BorrowedMatrix> borrow(nb::handle tensor) {
  const auto view = view_of(tensor);
  if (!view || view->dimensions != 2) return {};
  const int64_t rows = view->shape[0], cols = view->shape[1];
  if (view->strides && view->strides[1] != 1 && cols > 1) return {};
  return BorrowedMatrix{data_of(*view), element_of(view->dtype), rows, cols, view->strides ? view->strides[0] : cols};
}

std::optional<BorrowedHeads> borrow_heads(nb::handle tensor) {
  const auto view = view_of(tensor);
  if (!view || view->dimensions != 4) return {};
  BorrowedHeads found{data_of(*view), element_of(view->dtype), {}, {}};
  int64_t adjacent = 1;
  for (int i = 3; i >= 0; i--) {
    found.shape[i] = view->shape[i];
    found.stride[i] = view->strides ? view->strides[i] : adjacent;
    adjacent *= view->shape[i];
  }
  if (found.stride[3] != 1 && found.shape[3] > 1) return {};
  return found;
}

std::optional<BorrowedRows> borrow_rows(nb::handle tensor) {
  const auto view = view_of(tensor);
  if (!view || view->dimensions < 1) return {};
  BorrowedRows found{data_of(*view), element_of(view->dtype), 1, view->shape[view->dimensions - 1], {view->shape, view->shape + view->dimensions}};
  int64_t adjacent = 1;
  for (int i = view->dimensions - 1; i >= 0; i--) {
    if (view->strides && view->strides[i] != adjacent && view->shape[i] != 1) return {};
    adjacent *= view->shape[i];
  }
  found.rows = found.cols ? adjacent / found.cols : 0;
  return found;
}

std::optional<std::vector<float>> borrow_floats(nb::handle row, int64_t count) {
  const auto found = borrow_rows(row);
  if (!found || !is_float(found->element) || found->rows != 1 || found->cols != count) return {};
  std::vector<float> values(count);
  const auto* half = reinterpret_cast<const uint16_t*>(found->data);
  const auto* whole = reinterpret_cast<const float*>(found->data);
  for (int64_t i = 0; i < count; i++) values[i] = found->element == Element::bf16 ? bf16_to_float(half[i]) : whole[i];
  return values;
}

std::optional<std::pair<nb::object, void*>> new_tensor(Element element, std::vector<int64_t> shape) {
  const Torch& t = torch();
  if (!t.exchange) return {};
  const DataType type = element == Element::bf16 ? DataType{kBfloat, 16, 1} : element == Element::f32 ? DataType{kFloat, 32, 1} : DataType{kInteger, 64, 1};
  View like{nullptr, {kCpu, 0}, static_cast<int32_t>(shape.size()), type, shape.data(), nullptr, 0};
  Managed* made = nullptr;
  if (t.exchange->allocate(&like, &made, nullptr, set_error) != 0) throw nb::python_error();
  void* data = static_cast<uint8_t*>(made->view.data) + made->view.byte_offset;
  void* object = nullptr;
  if (t.exchange->object_from_managed(made, &object) != 0) throw nb::python_error();
  return std::pair(nb::steal(static_cast<PyObject*>(object)), data);
}

}  // namespace coterie
