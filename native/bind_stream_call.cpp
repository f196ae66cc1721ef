#include "bind_stream_call.h"

#include <nanobind/nanobind.h>

#include <atomic>
#include <exception>
#include <mutex>
#include <utility>

#include "bind.h"
#include "bind_tickets.h"

namespace nb = nanobind;

namespace coterie {

namespace {

struct Failure {
  std::mutex turn;
  std::exception_ptr first;
};

// Never destroyed: a stream may call while the process exits.
Failure& failure = *new Failure;

}  // namespace

struct StreamCall::Work {
  std::function<void()> work;
  std::atomic<int64_t> launched{0}, done{0};

  void run() const {
    try {
      work();
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure.turn);
      if (!failure.first) failure.first = std::current_exception();
    }
  }
};

StreamCall::StreamCall(std::function<void()> work, nb::object owners) : work_(std::make_shared<Work>()), owners_(std::move(owners)) {
  work_->work = std::move(work);
}

StreamCall::~StreamCall() {
  if (work_->done < work_->launched) keep_until([work = work_] { return work->done == work->launched; }, std::move(owners_));
}

uintptr_t StreamCall::argument() const { return reinterpret_cast<uintptr_t>(work_.get()); }

void StreamCall::launch() { work_->launched++; }

void StreamCall::replayed(void* argument) { static_cast<Work*>(argument)->run(); }

void StreamCall::released(void* argument) { static_cast<Work*>(argument)->done++; }

void StreamCall::once(void* argument) {
  replayed(argument);
  released(argument);
}

void StreamCall::check() {
  release_done();
  std::exception_ptr first;
  {
    std::lock_guard<std::mutex> lock(failure.turn);
    std::swap(first, failure.first);
  }
  if (first) std::rethrow_exception(first);
}

void bind_stream_call(nb::module_& m) {
  const auto function = [](void (*f)(void*)) { return reinterpret_cast<uintptr_t>(f); };
  nb::class_<StreamCall> type(m, "StreamCall");
  type.def_prop_ro("argument", &StreamCall::argument).def("launch", &StreamCall::launch).def_static("check", &StreamCall::check);
  type.attr("once") = function(&StreamCall::once);
  type.attr("replayed") = function(&StreamCall::replayed);
  type.attr("released") = function(&StreamCall::released);
}

}  // namespace coterie
