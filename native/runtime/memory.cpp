#include "runtime/memory.h"

#include <sys/mman.h>

#include "formats/layout.h"
#include "runtime/numa.h"

namespace coterie {

uint8_t* allocate_pages(int64_t bytes) {
  const int64_t size = round_up(bytes, kHugePage);
  void* raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto start = reinterpret_cast<uintptr_t>(raw);
  const auto aligned = static_cast<uintptr_t>(round_up(static_cast<int64_t>(start), kHugePage));
  if (aligned > start) munmap(raw, aligned - start);
  if (const int64_t tail = static_cast<int64_t>(start + kHugePage - aligned)) munmap(reinterpret_cast<void*>(aligned + size), tail);
  auto* memory = reinterpret_cast<uint8_t*>(aligned);
  madvise(memory, size, MADV_HUGEPAGE);
  interleave(memory, size);
  return memory;
}

void free_pages(uint8_t* memory, int64_t bytes) { munmap(memory, round_up(bytes, kHugePage)); }

}  // namespace coterie
