// The class coterie._native.StreamCall: work that a device's stream does when its turn comes, by calling a C function.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <functional>
#include <memory>

namespace coterie {

// A stream calls `once`, or a graph that has captured it `replayed`, as often as it is replayed, and `released` when the graph is gone; each with `argument`.
// Whoever hands one of the first two to a stream says `launch` before. The threads that call never touch Python: a StreamCall that is dropped keeps its work,
// and the objects that the work reads and writes, until all that was launched is done or released.
class StreamCall {
 public:
  StreamCall(std::function<void()> work, nanobind::object owners);
  ~StreamCall();
  StreamCall(const StreamCall&) = delete;

  uintptr_t argument() const;
  void launch();

  static void once(void* argument);
  static void replayed(void* argument);
  static void released(void* argument);
  static void check();  // throws what any work threw first since the last check

 private:
  struct Work;
  std::shared_ptr<Work> work_;
  nanobind::object owners_;
};

}  // namespace coterie
