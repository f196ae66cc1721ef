#include "runtime/threads.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cmath>
#include <cstdio>
#include <exception>
#include <linux/futex.h>
#include <memory>
#include <mutex>
#include <string>
#include <sys/syscall.h>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "runtime/numa.h"
#include "runtime/text.h"

namespace coterie {
namespace {

using Work = std::function<void(int64_t, int)>;

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  asm volatile("yield");
#endif
}

void futex(std::atomic<uint32_t>& word, int op, uint32_t value) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), op | FUTEX_PRIVATE_FLAG, value, nullptr, nullptr, 0);
}

// Waits until `word` is no longer `old`: spins for about the time between two layers of a model, then sleeps.
constexpr auto kSpin = std::chrono::microseconds(100);

void wait_while(std::atomic<uint32_t>& word, uint32_t old, std::atomic<int>& sleepers) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; word.load(std::memory_order_acquire) == old; i++) {
    relax();
    if (i % 64 == 63 && std::chrono::steady_clock::now() - start > kSpin) {
      sleepers.fetch_add(1);
      while (word.load() == old) futex(word, FUTEX_WAIT, old);
      sleepers.fetch_sub(1);
      return;
    }
  }
}

class Pool {
 public:
  // Where the system gives fewer threads than wanted, those there are do the work.
  explicit Pool(int threads) : wanted_(threads), node_changes_(node_changes()), queues_(numa_nodes()) {
    workers_.reserve(threads - 1);
    for (int t = 1; t < threads; t++) {
      try {
        std::thread worker([this, t] { serve(t); });
        pin_to_node(worker.native_handle(), t);
        workers_.push_back(std::move(worker));
      } catch (const std::system_error&) {
        break;
      }
    }
  }
  bool fits(int threads) const { return wanted_ == threads && node_changes_ == node_changes(); }

  // Items [first[q], first[q + 1]) for queues q < count.
  void run(const int64_t* first, int count, const Work& work) {
    work_ = &work;
    used_ = count;
    for (int q = 0; q < count; q++) {
      queues_[q].next.store(first[q], std::memory_order_relaxed);
      queues_[q].end = first[q + 1];
    }
    busy_.store(static_cast<uint32_t>(workers_.size()), std::memory_order_relaxed);
    generation_.fetch_add(1);
    if (sleepers_.load() > 0) futex(generation_, FUTEX_WAKE, INT_MAX);
    take(0);
    for (uint32_t left; (left = busy_.load(std::memory_order_acquire)) != 0;) wait_while(busy_, left, waiting_);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  void stop() {
    stopping_ = true;
    const Work nothing = [](int64_t, int) {};
    constexpr int64_t kNone[] = {0, 0};
    run(kNone, 1, nothing);
    for (auto& worker : workers_) worker.join();
  }

 private:
  void take(int thread) {
    const int own = used_ > 1 ? node_of_worker(thread) : 0;
    try {
      for (int q = 0; q < used_; q++) {
        Queue& queue = queues_[(own + q) % used_];
        for (int64_t i; (i = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.end;) (*work_)(i, thread);
      }
    } catch (...) {
      for (int q = 0; q < used_; q++) queues_[q].next.store(queues_[q].end, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(error_turn_);
      if (!error_) error_ = std::current_exception();
    }
  }

  void serve(int thread) {
    bool last = false;
    for (uint32_t seen = 0; !last; seen++) {
      wait_while(generation_, seen, sleepers_);
      take(thread);
      last = stopping_;  // read while this run is not over: every worker takes part in the last one
      if (busy_.fetch_sub(1) == 1 && waiting_.load() > 0) futex(busy_, FUTEX_WAKE, 1);
    }
  }

  struct alignas(64) Queue {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  const int wanted_, node_changes_;
  std::vector<Queue> queues_;  // one for each NUMA node
  std::vector<std::thread> workers_;
  const Work* work_ = nullptr;
  int used_ = 0;  // queues of this run: one, where items belong to no node
  std::atomic<bool> stopping_{false};
  std::mutex error_turn_;
  std::exception_ptr error_;  // the first of this run
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> busy_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<int> waiting_{0};
};

// Never destroyed: workers may sleep in it while the process exits. Replaced, not reused, in a forked child, where its threads do not exist.
struct Shared {
  std::mutex turn;
  Pool* pool = nullptr;
  std::atomic<int> wanted{0};
  std::atomic<int> available{0};  // asked of the system once: reading the cgroup's files takes longer than a small layer
};
Shared* shared = new Shared;

void after_fork() {
  const int wanted = shared->wanted;
  shared = new Shared;
  shared->wanted = wanted;
}

const int registered = pthread_atfork(nullptr, nullptr, after_fork);

// Whole CPUs of a cgroup quota ("max 100000" or "200000 100000"), or INT_MAX.
int cgroup_quota() {
  double quota = 0, period = 0;
  const bool found = std::sscanf(first_line("/sys/fs/cgroup/cpu.max").c_str(), "%lf %lf", &quota, &period) == 2 ||
                     (std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_quota_us").c_str(), "%lf", &quota) == 1 &&
                      std::sscanf(first_line("/sys/fs/cgroup/cpu/cpu.cfs_period_us").c_str(), "%lf", &period) == 1);
  if (found && quota > 0 && period > 0) return std::max(1, static_cast<int>(std::ceil(quota / period)));
  return INT_MAX;
}

}  // namespace

int available_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int masked = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : static_cast<int>(std::thread::hardware_concurrency());
  return std::max(1, std::min(masked, cgroup_quota()));
}

int thread_count() {
  if (const int wanted = shared->wanted) return wanted;
  if (!shared->available) shared->available = available_cpus();
  return shared->available;
}

void set_thread_count(int count) { shared->wanted = count; }

namespace {

void share_out(const int64_t* first, int queues, const Work& work) {
  std::lock_guard<std::mutex> lock(shared->turn);
  const int threads = thread_count();
  if (shared->pool && !shared->pool->fits(threads)) {
    shared->pool->stop();
    delete shared->pool;
    shared->pool = nullptr;
  }
  if (threads == 1 || first[queues] - first[0] <= 1) {
    for (int64_t i = first[0]; i < first[queues]; i++) work(i, 0);
    return;
  }
  if (!shared->pool) shared->pool = new Pool(threads);
  shared->pool->run(first, queues, work);
}

}  // namespace

void parallel(int64_t items, const Work& work) {
  const int64_t first[] = {0, items};
  share_out(first, 1, work);
}

void parallel(const std::vector<int64_t>& first, const Work& work) { share_out(first.data(), static_cast<int>(first.size()) - 1, work); }

}  // namespace coterie
