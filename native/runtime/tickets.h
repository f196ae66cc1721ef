// Work that is done in the background: by one thread of the process, in the order in which it was submitted.
#pragma once
#include <atomic>
#include <chrono>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>

namespace coterie {

// What waits here was never done and never will be: another process was to do it, or this one ends.
struct TicketLost : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct TicketQueue;

// One piece of work, and what it threw.
class Ticket {
 public:
  Ticket(TicketQueue* queue, std::function<void()> work) : queue_(queue), work_(std::move(work)) {}

  // Whether nothing reads or writes for it any more: it is done, or lost.
  bool done() const { return done_ || lost(); }
  // Whether it was done within this time.
  bool wait(std::chrono::milliseconds time) const;
  // Throws what the work threw, or TicketLost; it must be done.
  void check() const;

 private:
  friend struct TicketQueue;
  bool lost() const;

  TicketQueue* const queue_;
  std::function<void()> work_;
  std::exception_ptr error_;
  std::atomic<bool> done_{false};
};

// What `work` reads and writes must stay until the ticket is done, which it becomes whether or not anybody keeps or waits for it. Where the system gives
// no thread, the work is done before this returns. Throws TicketLost after end_tickets. After fork the child starts a fresh queue; tickets of its parent,
// done or not, are lost to it: fork does not copy memory at one moment, so that what it holds may be from before they were done.
std::shared_ptr<Ticket> submit(std::function<void()> work);

// For the end of the process: returns when what is being done is done; all that waits is lost.
void end_tickets();

}  // namespace coterie
