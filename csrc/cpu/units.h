// How the dispatchers share units of work among threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/check.h"

namespace vlmkern {

// Calls run(unit, scratch) for all units. Memory is taken before the threads start: an exception could not leave them.
template <class Run>
void over_units(int64_t units, int threads, size_t scratch, Run run) {
  threads = int(std::clamp<int64_t>(threads, 1, std::max<int64_t>(1, units)));
  scratch = (scratch + kAlignment - 1) / kAlignment * kAlignment;
  const std::unique_ptr<void, Free> memory(std::aligned_alloc(kAlignment, std::max<size_t>(scratch, kAlignment) * threads));
  if (!memory) throw std::bad_alloc();
  if (threads == 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(unit, memory.get());
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    void* mine = static_cast<char*>(memory.get()) + scratch * omp_get_thread_num();
#pragma omp for schedule(dynamic)
    for (int64_t unit = 0; unit < units; ++unit) run(unit, mine);
  }
}

}  // namespace vlmkern
