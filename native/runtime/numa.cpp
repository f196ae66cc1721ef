#include "runtime/numa.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace coterie {
namespace {

// "0-3,8,10-11" -> numbers
std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  std::stringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) {
    int first = 0, last = 0;
    char dash = 0;
    std::stringstream range(part);
    if (!(range >> first)) continue;
    if (!(range >> dash >> last)) last = first;
    for (int i = first; i <= last; i++) numbers.push_back(i);
  }
  return numbers;
}

std::vector<int> read_list(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return parse_list(line);
}

// Nodes that have CPUs this process may use.
const std::vector<Node>& nodes() {
  static const std::vector<Node> found = [] {
    cpu_set_t set;
    CPU_ZERO(&set);
    sched_getaffinity(0, sizeof set, &set);
    std::vector<int> allowed;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++)
      if (CPU_ISSET(cpu, &set)) allowed.push_back(cpu);
    return read_nodes("/sys/devices/system/node", allowed);
  }();
  return found;
}

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

int numa_nodes() { return nodes().empty() ? 1 : static_cast<int>(nodes().size()); }

void pin_to_node(pthread_t thread, int worker) {
  if (numa_nodes() == 1) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : nodes()[worker % nodes().size()].cpus) CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof set, &set);
}

void interleave(void* memory, int64_t bytes) {
  if (numa_nodes() == 1) return;
  constexpr int kInterleave = 3;  // MPOL_INTERLEAVE
  static const std::vector<unsigned long> mask = node_mask(nodes());
  const unsigned long bits = mask.size() * sizeof mask[0] * 8 + 1;  // the kernel reads one less
  syscall(SYS_mbind, memory, bytes, kInterleave, mask.data(), bits, 0);
}

}  // namespace coterie
