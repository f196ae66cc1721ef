#include "runtime/memory.h"

#include <sys/mman.h>

#include "formats/layout.h"
#include "runtime/numa.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace coterie {

constexpr int64_t kLeftOver = 8;  // one part in so many may be left over

uint8_t* allocate_pages(int64_t bytes) {
  const int64_t size = round_up(bytes, kHugePage);
  void* raw = mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (raw == MAP_FAILED) return nullptr;
  const auto start = reinterpret_cast<uintptr_t>(raw);
  const auto aligned = static_cast<uintptr_t>(round_up(static_cast<int64_t>(start), kHugePage));
  if (aligned > start) munmap(raw, aligned - start);
  if (const int64_t tail = static_cast<int64_t>(start + kHugePage - aligned)) munmap(reinterpret_cast<void*>(aligned + size), tail);
  auto* memory = reinterpret_cast<uint8_t*>(aligned);
  // What is beyond the last whole huge page takes one too where little of that is left over.
  const bool whole = size - bytes <= bytes / kLeftOver;
  madvise(memory, whole ? size : size - kHugePage, MADV_HUGEPAGE);
  interleave(memory, size);
  bound(memory, bytes, size);
  return memory;
}

void free_pages(uint8_t* memory, int64_t bytes) {
  const int64_t size = round_up(bytes, kHugePage);
  bound(memory, size, size);
  munmap(memory, size);
}

#if defined(__SANITIZE_ADDRESS__)
void bound(uint8_t* memory, int64_t bytes, int64_t size) {
  __asan_unpoison_memory_region(memory, bytes);
  __asan_poison_memory_region(memory + bytes, size - bytes);
}
#else
void bound(uint8_t*, int64_t, int64_t) {}
#endif

}  // namespace coterie
