// Who computes? At most `threads` threads of the pool that PyTorch itself uses.
//
// PyTorch's own operators run on the OpenMP runtime that it ships. A second pool would fight it
// for the cores, so parallel regions go through the OpenMP runtime that is already loaded in the
// process, found at run time; this library links none. Where there is none, or none that may be
// used (a child of fork: the runtime's threads did not follow), plain threads serve.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <type_traits>

namespace convmixer_fast {

struct Range {
  std::int64_t begin, end;
};

// The items of one parallel_for, handed out in order, a few at a time, to whoever asks: a thread
// that is late or missing leaves its share to the others.
class Share {
 public:
  Share(std::int64_t count, std::int64_t grain) : count_(count), grain_(grain) {}

  // The next items to compute; false when none are left.
  bool next(Range& range) {
    const std::int64_t begin = next_.fetch_add(grain_, std::memory_order_relaxed);
    if (begin >= count_) return false;
    range = {begin, begin + grain_ < count_ ? begin + grain_ : count_};
    return true;
  }

  // Leaves nothing more to hand out.
  void stop() { next_.store(count_, std::memory_order_relaxed); }

 private:
  std::atomic<std::int64_t> next_{0};
  const std::int64_t count_, grain_;
};

using Worker = void (*)(void* context, Share& share);

// Runs worker(context, share) on up to `threads` threads, the caller's among them, each once.
// Serial when nested in a parallel region. The first exception of a worker is rethrown here,
// after all have ended.
void parallel_for(std::int64_t count, int threads, Worker worker, void* context);

template <class F>
void parallel_for(std::int64_t count, int threads, F&& worker) {
  using Body = std::remove_reference_t<F>;
  parallel_for(
      count, threads, [](void* body, Share& share) { (*static_cast<Body*>(body))(share); },
      const_cast<void*>(static_cast<const void*>(&worker)));
}

// "gomp:<file name of the runtime>" or "std::thread": what a region of several threads would use.
std::string threading_backend();

}  // namespace convmixer_fast
