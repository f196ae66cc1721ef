// The class coterie._native.Ticket: work in the background, and the Python objects that it reads and writes.
#pragma once
#include <nanobind/nanobind.h>

#include <functional>
#include <memory>

#include "runtime/tickets.h"

namespace coterie {

// Keeps Python objects that something in the background reads or writes, until a release after it is done; keeping others is one too, and so is submitting,
// waiting for or dropping a ticket. With the GIL.
void keep_until(std::function<bool()> done, nanobind::object owners);
void release_done();

// The thread that does the work never touches Python. Its objects are let go of by threads that hold the GIL: when the ticket is waited for or dropped,
// or, where it is dropped before it is done, see keep_until.
class OwningTicket {
 public:
  OwningTicket(std::function<void()> work, nanobind::object owners);
  ~OwningTicket();
  OwningTicket(const OwningTicket&) = delete;

  bool done() const { return ticket_->done(); }
  void wait();  // throws what the work threw

 private:
  nanobind::object owners_;
  std::shared_ptr<Ticket> ticket_;
};

}  // namespace coterie
