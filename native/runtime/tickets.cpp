#include "runtime/tickets.h"

#include <pthread.h>

#include <condition_variable>
#include <deque>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

namespace coterie {

struct TicketQueue {
  std::mutex turn;
  std::condition_variable submitted, finished;
  std::deque<std::shared_ptr<Ticket>> waiting;
  std::thread dispatcher;
  bool ended = false;

  void serve() {
    for (;;) {
      std::unique_lock<std::mutex> lock(turn);
      submitted.wait(lock, [this] { return ended || !waiting.empty(); });
      if (ended) return;
      const std::shared_ptr<Ticket> ticket = std::move(waiting.front());
      waiting.pop_front();
      lock.unlock();
      run(*ticket);
    }
  }

  void run(Ticket& ticket) {
    std::exception_ptr error;
    try {
      ticket.work_();
    } catch (...) {
      error = std::current_exception();
    }
    std::lock_guard<std::mutex> lock(turn);
    finish(ticket, std::move(error));
  }

  // With the turn taken.
  void finish(Ticket& ticket, std::exception_ptr error) {
    ticket.error_ = std::move(error);
    ticket.work_ = nullptr;
    ticket.done_ = true;
    finished.notify_all();
  }
};

namespace {

// Never destroyed: a thread may wait in it while the process exits. Replaced in a forked child, where its thread does not exist.
TicketQueue* queue = new TicketQueue;
const int registered = pthread_atfork(nullptr, nullptr, [] { queue = new TicketQueue; });

}  // namespace

bool Ticket::lost() const { return queue_ != queue; }

bool Ticket::wait(std::chrono::milliseconds time) const {
  if (done()) return true;
  std::unique_lock<std::mutex> lock(queue_->turn);
  return queue_->finished.wait_for(lock, time, [this] { return done_.load(); });
}

void Ticket::check() const {
  if (lost()) throw TicketLost("this ticket is of the process that this one was forked from, which alone can wait for it; submit the work here");
  if (error_) std::rethrow_exception(error_);
}

std::shared_ptr<Ticket> submit(std::function<void()> work) {
  TicketQueue& q = *queue;
  auto ticket = std::make_shared<Ticket>(&q, std::move(work));
  {
    std::lock_guard<std::mutex> lock(q.turn);
    if (q.ended) throw TicketLost("Python is ending, and nothing is computed in the background any more");
    try {
      if (!q.dispatcher.joinable()) q.dispatcher = std::thread(&TicketQueue::serve, &q);
      q.waiting.push_back(ticket);
      q.submitted.notify_one();
      return ticket;
    } catch (const std::system_error&) {
    }
  }
  q.run(*ticket);
  return ticket;
}

void end_tickets() {
  TicketQueue& q = *queue;
  {
    std::lock_guard<std::mutex> lock(q.turn);
    q.ended = true;
    for (const auto& ticket : q.waiting) q.finish(*ticket, std::make_exception_ptr(TicketLost("Python ended before this ticket's turn came")));
    q.waiting.clear();
    q.submitted.notify_all();
  }
  if (q.dispatcher.joinable()) q.dispatcher.join();
}

}  // namespace coterie
