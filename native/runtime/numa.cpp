#include "runtime/numa.h"

#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

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

// Nodes that have CPUs this process may use, and those CPUs.
const std::vector<std::vector<int>>& nodes() {
  static const std::vector<std::vector<int>> found = [] {
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    sched_getaffinity(0, sizeof allowed, &allowed);
    std::vector<std::vector<int>> nodes;
    for (int node : read_list("/sys/devices/system/node/online")) {
      std::vector<int> cpus;
      for (int cpu : read_list("/sys/devices/system/node/node" + std::to_string(node) + "/cpulist"))
        if (cpu < CPU_SETSIZE && CPU_ISSET(cpu, &allowed)) cpus.push_back(cpu);
      if (!cpus.empty()) nodes.push_back(cpus);
    }
    return nodes;
  }();
  return found;
}

}  // namespace

int numa_nodes() { return nodes().empty() ? 1 : static_cast<int>(nodes().size()); }

void pin_to_node(pthread_t thread, int worker) {
  if (numa_nodes() == 1) return;
  cpu_set_t set;
  CPU_ZERO(&set);
  for (int cpu : nodes()[worker % nodes().size()]) CPU_SET(cpu, &set);
  pthread_setaffinity_np(thread, sizeof set, &set);
}

void interleave(void* memory, int64_t bytes) {
  if (numa_nodes() == 1) return;
  constexpr int kInterleave = 3;  // MPOL_INTERLEAVE
  unsigned long mask = (1ul << numa_nodes()) - 1;
  syscall(SYS_mbind, memory, bytes, kInterleave, &mask, sizeof mask * 8, 0);
}

}  // namespace coterie
