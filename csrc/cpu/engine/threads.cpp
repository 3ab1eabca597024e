#include "cpu/engine/threads.h"

#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <pthread.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#endif

namespace convmixer_fast {
namespace {

// The region in which this thread computes for us; regions do not nest.
thread_local bool inside_region = false;

// The entry points of an OpenMP runtime that GCC's, Intel's and LLVM's all export.
struct OpenMp {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*in_parallel)() = nullptr;
  int (*thread_number)() = nullptr;
  std::string file;
};

#if defined(__linux__)

std::atomic<bool> forked{false};

// A process that was forked and has not called exec since. A module that is first loaded in such
// a child cannot know whether the parent's OpenMP pool was alive at the fork; using it then hangs.
bool born_of_fork() {
  constexpr unsigned long kForkedNoExec = 0x40;  // PF_FORKNOEXEC of Linux's sched.h
  const int fd = ::open("/proc/self/stat", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  char text[1024];
  const ssize_t size = ::read(fd, text, sizeof(text) - 1);
  ::close(fd);
  if (size <= 0) return false;
  text[size] = '\0';
  // After the name, which may hold anything but ends at the last ')': state, five numbers, flags.
  const char* at = std::strrchr(text, ')');
  for (int field = 0; at != nullptr && field < 7; ++field) at = std::strchr(at + 1, ' ');
  return at != nullptr && (std::strtoul(at + 1, nullptr, 10) & kForkedNoExec) != 0;
}

const bool watching_forks = [] {
  forked = born_of_fork();
  return pthread_atfork(nullptr, nullptr, [] { forked = true; }) == 0;
}();

int look_for_openmp(dl_phdr_info* info, std::size_t, void* found) {
  const char* path = info->dlpi_name;
  if (path == nullptr || *path == '\0') return 0;
  const char* slash = std::strrchr(path, '/');
  const char* file = slash != nullptr ? slash + 1 : path;
  for (const char* runtime : {"libgomp", "libiomp5", "libomp"}) {
    if (std::strncmp(file, runtime, std::strlen(runtime)) == 0) {
      static_cast<std::vector<std::string>*>(found)->emplace_back(path);
      return 0;
    }
  }
  return 0;
}

OpenMp find_openmp() {
  std::vector<std::string> paths;
  dl_iterate_phdr(look_for_openmp, &paths);
  OpenMp best;
  for (const std::string& path : paths) {
    void* library = dlopen(path.c_str(), RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) continue;
    OpenMp candidate;
    candidate.parallel =
        reinterpret_cast<decltype(candidate.parallel)>(dlsym(library, "GOMP_parallel"));
    candidate.in_parallel =
        reinterpret_cast<decltype(candidate.in_parallel)>(dlsym(library, "omp_in_parallel"));
    candidate.thread_number =
        reinterpret_cast<decltype(candidate.thread_number)>(dlsym(library, "omp_get_thread_num"));
    candidate.file = path.substr(path.rfind('/') + 1);
    // RTLD_NOLOAD took a reference of its own; it is kept where the library will be called.
    const bool usable = candidate.parallel != nullptr && candidate.in_parallel != nullptr &&
                        candidate.thread_number != nullptr;
    const bool of_torch = path.find("/torch/lib/") != std::string::npos;
    if (usable && (best.parallel == nullptr || of_torch)) {
      best = candidate;
      if (of_torch) break;
    } else {
      dlclose(library);
    }
  }
  return best;
}

// The runtime to use, or null. One that was found stays; while none is, each call looks again,
// since PyTorch may be imported later.
const OpenMp* openmp() {
  if (!watching_forks || forked.load(std::memory_order_relaxed)) return nullptr;
  static std::atomic<const OpenMp*> known{nullptr};
  if (const OpenMp* runtime = known.load(std::memory_order_acquire)) return runtime;
  OpenMp runtime = find_openmp();
  if (runtime.parallel == nullptr) return nullptr;
  const OpenMp* expected = nullptr;
  const auto* kept = new OpenMp(std::move(runtime));
  if (!known.compare_exchange_strong(expected, kept)) {
    delete kept;
    return expected;
  }
  return kept;
}

#else

const OpenMp* openmp() { return nullptr; }

#endif

class Region {
 public:
  Region(std::int64_t count, int threads, Worker worker, void* context)
      : items_(count, threads), worker_(worker), context_(context) {}

  // One thread's part. No exception may leave it: the runtime's threads could not carry one.
  void work(int thread) noexcept {
    Share share(items_, thread);
    const bool outer = inside_region;
    inside_region = true;
    try {
      worker_(context_, share);
    } catch (...) {
      items_.stop();
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
    }
    inside_region = outer;
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  Items items_;
  Worker worker_;
  void* context_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

void run_on_plain_threads(Region& region, int threads) {
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(static_cast<std::size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) helpers.emplace_back([&region, i] { region.work(i); });
  } catch (...) {
    // No more threads are available: the existing ones share the work.
  }
  region.work(0);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void parallel_for(std::int64_t count, int threads, Worker worker, void* context) {
  if (count <= 0) return;
  // All threads asked for, or one: an OpenMP runtime ends the threads that a
  // smaller region leaves out and starts them again for the next.
  const bool serial = threads <= 1 || count == 1 || inside_region;
  const OpenMp* runtime = serial ? nullptr : openmp();
  if (serial || (runtime != nullptr && runtime->in_parallel() != 0)) threads = 1;
  Region region(count, threads, worker, context);
  if (threads == 1) {
    region.work(0);
  } else if (runtime != nullptr) {
    struct Call {
      Region& region;
      const OpenMp& runtime;
    } call{region, *runtime};
    runtime->parallel(
        [](void* c) {
          const Call& call = *static_cast<Call*>(c);
          call.region.work(call.runtime.thread_number());
        },
        &call, static_cast<unsigned>(threads), 0);
  } else {
    run_on_plain_threads(region, threads);
  }
  region.rethrow();
}

std::string threading_backend() {
  const OpenMp* runtime = openmp();
  return runtime != nullptr ? "gomp:" + runtime->file : "std::thread";
}

}  // namespace convmixer_fast
