#include "runtime/numa.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "runtime/text.h"

namespace coterie {
namespace {

// "0-3,8,10-11" -> numbers
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  for (const char* at = text.c_str(); *at;) {
    int first = 0, last = 0, read = 0;
    if (std::sscanf(at, "%d%n", &first, &read) != 1) break;
    at += read;
    if (std::sscanf(at, "-%d%n", &last, &read) == 1)
      at += read;
    else
      last = first;
    for (int i = first; i <= last; i++) numbers.push_back(i);
    if (*at++ != ',') break;
  }
  return numbers;
}

std::vector<int> read_list(const std::string& path) { return parse_list(first_line(path)); }

std::vector<int> allowed_cpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  sched_getaffinity(0, sizeof set, &set);
  std::vector<int> allowed;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
    if (CPU_ISSET(cpu, &set)) allowed.push_back(cpu);
  return allowed;
}

// Nodes that have CPUs this process may use, and the node of every worker.
struct Topology {
  std::vector<Node> nodes;
  std::vector<int> workers;
  int changes = 0;

  Topology() { use(read_nodes("/sys/devices/system/node", allowed_cpus())); }
  void use(const std::vector<Node>& found) {
    nodes = found;
    workers = worker_nodes(found);
  }
};

Topology& topology() {
  static Topology found;
  return found;
}

void pin(pthread_t thread, int node) {
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : topology().nodes[node].cpus) CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof set, &set);
}

constexpr int kDefault = 0, kPreferred = 1, kInterleave = 3;  // the kernel's MPOL_*

// Bits of a mask, as the kernel counts them: it reads one less.
unsigned long bits_of(const std::vector<unsigned long>& mask) { return mask.size() * sizeof mask[0] * 8 + 1; }

// Not seen by AddressSanitizer: the last page may reach behind what is in use.
[[gnu::no_sanitize_address]] void touch(volatile uint8_t* byte) { *byte = 0; }

}  // namespace

std::vector<Node> read_nodes(const std::string& folder, const std::vector<int>& allowed) {
  std::vector<Node> nodes;
  for (int number : read_list(folder + "/online")) {
    Node node{number, {}};
    for (int cpu : read_list(folder + "/node" + std::to_string(number) + "/cpulist"))
      if (std::find(allowed.begin(), allowed.end(), cpu) != allowed.end()) node.cpus.push_back(cpu);
    if (!node.cpus.empty()) nodes.push_back(node);
  }
  return nodes;
}

std::vector<unsigned long> node_mask(const std::vector<Node>& nodes) {
  constexpr int kBits = 8 * sizeof(unsigned long);
  std::vector<unsigned long> mask;
  for (const Node& node : nodes) {
    if (mask.size() <= static_cast<size_t>(node.number / kBits)) mask.resize(node.number / kBits + 1);
    mask[node.number / kBits] |= 1ul << node.number % kBits;
  }
  return mask;
}

std::vector<int> worker_nodes(const std::vector<Node>& nodes) {
  std::vector<int> workers;
  size_t most = 0;
  for (const Node& node : nodes) most = std::max(most, node.cpus.size());
  for (size_t turn = 0; turn < most; turn++)
    for (size_t node = 0; node < nodes.size(); node++)
      if (nodes[node].cpus.size() > turn) workers.push_back(static_cast<int>(node));
  return workers;
}

int numa_nodes() { return std::max<int>(1, static_cast<int>(topology().nodes.size())); }

int node_number(int node) { return topology().nodes.empty() ? 0 : topology().nodes[node].number; }

int node_of_worker(int worker) {
  const Topology& t = topology();
  if (t.nodes.size() < 2) return 0;
  if (worker) return t.workers[worker % t.workers.size()];
  const int cpu = sched_getcpu();
  for (size_t node = 0; node < t.nodes.size(); node++)
    if (std::find(t.nodes[node].cpus.begin(), t.nodes[node].cpus.end(), cpu) != t.nodes[node].cpus.end()) return static_cast<int>(node);
  return 0;
}

void pin_to_node(pthread_t thread, int worker) {
  if (numa_nodes() > 1) pin(thread, node_of_worker(worker));
}

void pretend_nodes(const std::vector<int>& numbers) {
  std::vector<Node> nodes;
  for (int number : numbers) nodes.push_back({number, allowed_cpus()});
  topology().use(numbers.empty() ? Topology().nodes : nodes);
  topology().changes++;
}

int node_changes() { return topology().changes; }

void interleave(void* memory, int64_t bytes) {
  if (numa_nodes() == 1) return;
  const std::vector<unsigned long> mask = node_mask(topology().nodes);
  syscall(SYS_mbind, memory, bytes, kInterleave, mask.data(), bits_of(mask), 0);
}

// A policy of each range of pages would make each a mapping of its own, of which Linux gives a process 65530: too few for a large model. So the threads
// have the policy, and what is swapped out and comes back is interleaved.
void take_pages(uint8_t* memory, int64_t page_bytes, const std::vector<int>& owner) {
  const int64_t pages = static_cast<int64_t>(owner.size());
  syscall(SYS_mbind, memory, pages * page_bytes, kDefault, nullptr, 0, 0);
  std::vector<std::thread> threads;
  for (int node = 0; node < numa_nodes(); node++) {
    try {
      threads.emplace_back([=, &owner] {
        pin(pthread_self(), node);
        const std::vector<unsigned long> mask = node_mask({topology().nodes[node]});
        syscall(SYS_set_mempolicy, kPreferred, mask.data(), bits_of(mask));
        constexpr int64_t kSmallest = 4096;  // where there is no huge page, each of the small ones
        for (int64_t p = 0; p < pages; p++)
          for (int64_t at = 0; owner[p] == node && at < page_bytes; at += kSmallest) touch(memory + p * page_bytes + at);
      });
    } catch (const std::system_error&) {
      break;
    }
  }
  for (std::thread& thread : threads) thread.join();
  interleave(memory, pages * page_bytes);
}

std::vector<int> holding_nodes(const uint8_t* memory, int64_t page_bytes, int64_t count) {
  std::vector<void*> pages(count);
  for (int64_t p = 0; p < count; p++) pages[p] = const_cast<uint8_t*>(memory + p * page_bytes);
  std::vector<int> found(count, -1);
  syscall(SYS_move_pages, 0, count, pages.data(), nullptr, found.data(), 0);
  return found;
}

}  // namespace coterie
