// Parallel regions on at most `threads` threads of the pool that PyTorch itself uses, with work stealing.
//
// PyTorch's own operators run on the OpenMP runtime that it ships. A second pool would fight it
// for the cores, so parallel regions go through the OpenMP runtime that is already loaded in the
// process, found at run time; this library links none. Where there is none, or none that may be
// used (a child of fork: the runtime's threads did not follow), plain threads are used.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

namespace convmixer_fast {

struct Range {
  std::int64_t begin, end;
};

// The items of one parallel_for that are not handed out yet: a part for each thread.
class Items {
 public:
  Items(std::int64_t count, int threads)
      // Eight hand-outs a thread: late threads cost at most an eighth of a share.
      : grain_(count / (8 * static_cast<std::int64_t>(threads)) + 1),
        parts_(static_cast<std::size_t>(threads)) {
    for (int i = 0; i < threads; ++i) {
      parts_[i].next.store(count * i / threads, std::memory_order_relaxed);
      parts_[i].end = count * (i + 1) / threads;
    }
  }

  // The next items of a part; false when none are left.
  bool take(std::size_t part, Range& range) {
    const std::int64_t begin = parts_[part].next.fetch_add(grain_, std::memory_order_relaxed);
    const std::int64_t end = parts_[part].end;
    if (begin >= end) return false;
    range = {begin, begin + grain_ < end ? begin + grain_ : end};
    return true;
  }

  std::size_t parts() const { return parts_.size(); }

  // Leaves nothing more to hand out.
  void stop() {
    for (Part& part : parts_) part.next.store(part.end, std::memory_order_relaxed);
  }

 private:
  // On a cache line of its own: only its thread writes to it while it has work.
  struct alignas(64) Part {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };
  const std::int64_t grain_;
  std::vector<Part> parts_;
};

// Work stealing: one thread's share of the items of a parallel_for, handed out in order, a few at a time: first
// its own part, then the rest of the others'. A thread has the same part in regions of the same count, so what
// it wrote in one is in its caches in the next; the part of a late or missing thread is taken by the others.
class Share {
 public:
  Share(Items& items, int thread) : items_(items), thread_(thread) {}

  // The number of the thread among those of the region, from 0 on.
  int thread() const { return thread_; }

  // The next items to compute; false when none are left.
  bool next(Range& range) {
    for (; parts_done_ < items_.parts(); ++parts_done_) {
      const std::size_t part = (static_cast<std::size_t>(thread_) + parts_done_) % items_.parts();
      if (items_.take(part, range)) return true;
    }
    return false;
  }

 private:
  Items& items_;
  const int thread_;
  std::size_t parts_done_ = 0;
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
