#include "bind_tickets.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <chrono>
#include <iterator>
#include <thread>
#include <utility>
#include <vector>

#include "bind.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace coterie {
namespace {

constexpr std::chrono::milliseconds kBetweenSignals{100};  // how long Ctrl-C may go unheard

struct Kept {
  std::function<bool()> done;
  nb::object owners;
};

// Guarded by the GIL. Never destroyed: when the process exits, there is no Python to give the objects back to.
std::vector<Kept>& kept = *new std::vector<Kept>;

}  // namespace

// Letting go of an object may run any Python code, which may come here again.
void release_done() {
  const auto first_done = std::stable_partition(kept.begin(), kept.end(), [](const Kept& k) { return !k.done(); });
  const std::vector<Kept> done(std::make_move_iterator(first_done), std::make_move_iterator(kept.end()));
  kept.erase(first_done, kept.end());
}

void keep_until(std::function<bool()> done, nb::object owners) {
  release_done();
  kept.push_back({std::move(done), std::move(owners)});
}

OwningTicket::OwningTicket(std::function<void()> work, nb::object owners) : owners_(std::move(owners)) {
  release_done();
  nb::gil_scoped_release released;
  ticket_ = submit(std::move(work));
}

OwningTicket::~OwningTicket() {
  if (!ticket_->done()) keep_until([ticket = ticket_] { return ticket->done(); }, std::move(owners_));
  release_done();
}

void OwningTicket::wait() {
  {
    nb::gil_scoped_release released;
    while (!ticket_->wait(kBetweenSignals)) {
      nb::gil_scoped_acquire acquired;
      if (PyErr_CheckSignals()) throw nb::python_error();
    }
  }
  { const nb::object owners = std::move(owners_); }
  release_done();
  ticket_->check();
}

void bind_tickets(nb::module_& m) {
  nb::exception<TicketLost>(m, "TicketLost", PyExc_RuntimeError);
  nb::class_<OwningTicket>(m, "Ticket").def("wait", &OwningTicket::wait).def_prop_ro("done", &OwningTicket::done);
  m.def(
      "end_tickets",
      [] {
        {
          nb::gil_scoped_release released;
          end_tickets();
        }
        release_done();
      },
      "For the end of the process: what is being done is finished, what waits is lost.");
  m.def(
      "submit_hold",
      [](uintptr_t flag, nb::object owner) {
        return new OwningTicket(
            [flag] {
              while (!__atomic_load_n(at<uint8_t>(flag), __ATOMIC_ACQUIRE)) std::this_thread::sleep_for(std::chrono::milliseconds(1));
            },
            std::move(owner));
      },
      "flag"_a, "owner"_a, "Work that lasts until the byte at an address, which `owner` keeps there, is not zero. For tests.");
}

}  // namespace coterie
