// How the dispatchers share work among threads.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/check.h"

namespace vlmkern {

// Makes processes that are forked from now on safe to compute in; once, when the extension is loaded. Whether it could.
bool watch_forks();

// How many threads a parallel region may have here and now, given how many are wanted: one where a fork took the workers.
int usable_threads(int64_t wanted);

// Calls run(unit, scratch) for all units. Memory is taken before the threads start: an exception could not leave them.
template <class Run>
void over_units(int64_t units, int threads, size_t scratch, Run run) {
  threads = usable_threads(std::min<int64_t>(threads, units));
  size_t bytes;
  scratch = (std::max<size_t>(scratch, 1) + kAlignment - 1) / kAlignment * kAlignment;
  require(!__builtin_mul_overflow(scratch, size_t(threads), &bytes), "sizes: too large for the memory that threads work in");
  const std::unique_ptr<void, Free> memory(std::aligned_alloc(kAlignment, bytes));
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

// Calls run(begin, end) on equal shares of some items, one per thread.
template <class Run>
void over_shares(int64_t items, int64_t threads, Run run) {
  const int team = usable_threads(std::min(threads, items));
  if (team == 1) return run(0, items);
#pragma omp parallel num_threads(team)
  {
    const int64_t n = omp_get_num_threads(), i = omp_get_thread_num();
    run(items * i / n, items * (i + 1) / n);
  }
}

}  // namespace vlmkern
