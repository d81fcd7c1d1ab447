#include "cpu/units.h"

#include <dlfcn.h>
#include <pthread.h>

namespace vlmkern {
namespace {

// more than any machine has, and few enough to start
constexpr int64_t kMaxThreads = 1024;

// GNU's runtime keeps the workers of each thread's parallel regions for its next one. In a child process only the thread
// that forked lives on, and would wait for its workers for ever; so they are sent away before.
thread_local bool has_workers = false, dismissed = false, lost_workers = false;

// Looked up, not linked: the runtime in use may be one that torch brought, from before OpenMP 5.0.
decltype(&omp_pause_resource_all) dismiss = nullptr;

void before_fork() { dismissed = dismiss != nullptr && dismiss(omp_pause_hard) == 0; }
void in_child() { lost_workers = has_workers && !dismissed; }

}  // namespace

bool watch_forks() {
  dismiss = reinterpret_cast<decltype(dismiss)>(dlsym(RTLD_DEFAULT, "omp_pause_resource_all"));
  return pthread_atfork(before_fork, nullptr, in_child) == 0;
}

int usable_threads(int64_t wanted) {
  if (wanted <= 1 || lost_workers) return 1;
  has_workers = true;
  return int(std::min(wanted, kMaxThreads));
}

}  // namespace vlmkern
