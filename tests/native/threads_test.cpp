// Is the core safe under threads? What several callers at once do to parallel_for and to the
// operators, whose results must be bitwise those of a lone caller: what a thread sanitizer looks at.
#include <atomic>
#include <functional>
#include <mutex>
#include <thread>

#if defined(__linux__)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include "cpu/depthwise/depthwise.h"
#include "cpu/engine/fingerprint.h"
#include "cpu/engine/isa.h"
#include "cpu/engine/stack.h"
#include "cpu/engine/threads.h"
#include "cpu/epilogue/pass.h"
#include "cpu/gemm/panel_gemm.h"
#include "support.h"

namespace convmixer_fast_test {
namespace {

namespace cmf = convmixer_fast;
using cmf::Layout;

constexpr int kCallers = 3;

// Runs body(caller) in kCallers threads at once; the first failure is thrown again here.
void all_at_once(const std::function<void(int)>& body) {
  std::atomic<int> ready{0};
  std::mutex mutex;
  std::exception_ptr error;
  std::vector<std::thread> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.emplace_back([&, i] {
      ++ready;
      while (ready < kCallers) std::this_thread::yield();
      try {
        body(i);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (!error) error = std::current_exception();
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  if (error) std::rethrow_exception(error);
}

// Every item is handed out once, in any thread; plain ints, so that a second hand-out is a race.
void test_every_item_once(int64_t count, int threads) {
  std::vector<int> seen(static_cast<std::size_t>(count), 0);
  std::vector<int> numbers(static_cast<std::size_t>(threads), 0);
  std::atomic<int> workers{0};
  cmf::parallel_for(count, threads, [&](cmf::Share& share) {
    ++workers;
    ++numbers.at(static_cast<std::size_t>(share.thread()));
    for (cmf::Range r; share.next(r);) {
      for (int64_t i = r.begin; i < r.end; ++i) ++seen[i];
    }
  });
  const std::string region = text("parallel_for of ", count, " items on ", threads, " threads");
  for (int64_t i = 0; i < count; ++i) {
    if (seen[i] != 1) throw Failure(text(region, ": item ", i, " was done ", seen[i], " times"));
  }
  if (workers > threads) throw Failure(text(region, ": ", workers.load(), " workers"));
  for (int i = 0; i < threads; ++i) {
    if (numbers[i] > 1) throw Failure(text(region, ": ", numbers[i], " threads with number ", i));
  }
}

// A thread begins with the same items in every region, and does what the others leave.
void test_own_part_first(int64_t count, int threads) {
  for (int thread = 0; thread < threads; ++thread) {
    cmf::Items items(count, threads);
    cmf::Share share(items, thread);
    int64_t at = count * thread / threads, done = 0;
    for (cmf::Range r; share.next(r); at = r.end, done += r.end - r.begin) {
      if (at == count) at = 0;
      if (r.begin != at || r.end <= r.begin) {
        throw Failure(text("thread ", thread, " of ", threads, ": items [", r.begin, ", ", r.end,
                           ") of ", count, " where ", at, " was next"));
      }
    }
    if (done != count) throw Failure(text("thread ", thread, ": ", done, " of ", count, " items"));
  }
}

// The tiles of a map and the cuts of its channels give every thread as much as any other.
void test_cuts_are_even(int64_t tiles, int threads) {
  const int64_t cuts = cmf::channel_cuts(tiles, threads, 1000);
  const int64_t pieces = tiles * cuts, most = (pieces + threads - 1) / threads;
  if (cuts < 1 || pieces < threads || 4 * threads * most > 5 * pieces) {
    throw Failure(text(tiles, " tiles in ", cuts, " cuts for ", threads, " threads: at most ", most,
                       " pieces a thread"));
  }
  if (cmf::channel_cuts(tiles, threads, 1) != 1) throw Failure("more cuts than groups");
}

void test_exceptions_come_back(int64_t count, int threads, int64_t bad) {
  std::atomic<int> inside{0};
  try {
    cmf::parallel_for(count, threads, [&](cmf::Share& share) {
      ++inside;
      for (cmf::Range r; share.next(r);) {
        if (r.begin <= bad && bad < r.end) {
          --inside;
          throw std::out_of_range("the bad item");
        }
      }
      --inside;
    });
  } catch (const std::out_of_range&) {
    if (inside != 0) throw Failure("parallel_for: rethrown before all workers had ended");
    return;
  }
  throw Failure("parallel_for: the exception of a worker was lost");
}

void test_regions_do_not_nest(int threads) {
  cmf::parallel_for(8, threads, [&](cmf::Share& outer) {
    const std::thread::id here = std::this_thread::get_id();
    for (cmf::Range r; outer.next(r);) {
      int64_t items = 0;
      cmf::parallel_for(5, threads, [&](cmf::Share& inner) {
        if (std::this_thread::get_id() != here) throw Failure("parallel_for: a region nested");
        for (cmf::Range q; inner.next(q);) items += q.end - q.begin;
      });
      if (items != 5) throw Failure(text("parallel_for: a nested region did ", items, " of 5 items"));
    }
  });
}

// One of each operator on shared inputs and parameters.
struct Problem {
  int64_t n, c, h, w, k, depth;
  cmf::Activation act;
  Floats x, taps, taps_last, bias, scale, shift, weight;

  explicit Problem(Random& random)
      : n(random.integer(1, 4)),
        c(random.integer(1, 24)),
        h(random.integer(1, 14)),
        w(random.integer(1, 20)),
        k(random.one_of({2, 3, 5, 9})),
        depth(random.integer(1, 8)),
        act(random.activation()),
        x(normals(random, n * c * h * w)),
        taps(normals(random, c * k * k, 1.0f / static_cast<float>(k))),
        taps_last(taps.size()),
        bias(normals(random, c)),
        scale(scales(random, c)),
        shift(normals(random, c)),
        weight(normals(random, c * c, 1.0f / std::sqrt(static_cast<float>(c)))) {
    for (int64_t i = 0; i < c; ++i) {
      for (int64_t tap = 0; tap < k * k; ++tap) taps_last[tap * c + i] = taps[i * k * k + tap];
    }
  }

  int64_t values() const { return n * c * h * w; }

  Floats depthwise(Layout layout, int threads) const {
    Floats y = untouched_floats(values());
    cmf::DepthwiseMix d;
    const bool planar = layout == Layout::planar;
    const int64_t strides[4] = {c * h * w, planar ? h * w : 1, planar ? w : w * c, planar ? 1 : c};
    for (int axis = 0; axis < 4; ++axis) d.x_stride[axis] = d.y_stride[axis] = strides[axis];
    d.x = x.data();
    d.y = y.data();
    d.n = n;
    d.c = c;
    d.h = h;
    d.w = w;
    d.k = k;
    d.weight = planar ? taps.data() : taps_last.data();
    d.bias = bias.data();
    d.scale = scale.data();
    d.shift = shift.data();
    d.act = act;
    cmf::depthwise_mix(d, layout, threads);
    return y;
  }

  Floats epilogue(Layout layout, int threads) const {
    Floats y = x;
    cmf::apply_epilogue({y.data(), n, c, h * w, scale.data(), shift.data(), act}, layout, threads);
    return y;
  }

  Floats packed() const {
    Floats block = untouched_floats(cmf::mixer_packed_floats(c, k));
    cmf::mixer_pack({taps.data(), bias.data(), scale.data(), shift.data(), bias.data(),
                     scale.data(), shift.data()},
                    c, k, block.data());
    return block;
  }

  Floats mixer(const Floats& block, int threads) const {
    const std::vector<const float*> blocks(static_cast<std::size_t>(depth), block.data());
    const std::vector<const float*> weights(static_cast<std::size_t>(depth), weight.data());
    Floats z = untouched_floats(values());
    cmf::MixerStack stack;
    stack.x = x.data();
    stack.z = z.data();
    stack.n = n;
    stack.c = c;
    stack.h = h;
    stack.w = w;
    stack.k = k;
    stack.blocks = blocks.data();
    stack.weights = weights.data();
    stack.strassen_levels = 1;
    stack.depth = depth;
    stack.act = act;
    cmf::mixer_stack(stack, 0, n, threads);
    return z;
  }
};

void test_operators(Random& random, const std::string& isa) {
  cmf::set_isa(isa);
  const Problem p(random);
  const Floats block = p.packed();
  const cmf::Piece piece = {block.data(), block.size() * sizeof(float), 0};
  const std::vector<Floats> alone = {
      p.depthwise(Layout::planar, 1), p.depthwise(Layout::channels_last, 1),
      p.epilogue(Layout::planar, 1),  p.epilogue(Layout::channels_last, 1),
      p.mixer(block, 1),              block};
  const uint64_t hash = cmf::fingerprint(&piece, 1);
  all_at_once([&](int caller) {
    const int threads = 1 + caller;
    cmf::set_isa(isa);
    const std::vector<Floats> together = {
        p.depthwise(Layout::planar, threads), p.depthwise(Layout::channels_last, threads),
        p.epilogue(Layout::planar, threads),  p.epilogue(Layout::channels_last, threads),
        p.mixer(block, threads),              p.packed()};
    const char* names[] = {"depthwise planar", "depthwise channels-last", "epilogue planar",
                           "epilogue channels-last", "mixer", "mixer_pack"};
    for (std::size_t i = 0; i < alone.size(); ++i) {
      if (!same_bits(together[i], alone[i])) {
        throw Failure(text(names[i], " n=", p.n, " c=", p.c, " h=", p.h, " w=", p.w, " k=", p.k,
                           " depth=", p.depth, " act=", static_cast<int>(p.act), " isa=", isa,
                           ": ", kCallers, " callers at once change the result on ", threads,
                           " threads"));
      }
    }
    if (cmf::fingerprint(&piece, 1) != hash) throw Failure("fingerprint: changes by itself");
  });
}

// A child of fork computes, though the parent's threads did not follow.
void test_after_fork(Random& random) {
#if defined(__linux__)
  const Problem p(random);
  const Floats expected = p.mixer(p.packed(), 1);
  const pid_t child = fork();
  if (child == 0) {
    int status = 1;
    try {
      test_every_item_once(100, 3);
      status = same_bits(p.mixer(p.packed(), 3), expected) ? 0 : 1;
    } catch (...) {
    }
    _exit(status);
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) throw Failure("fork: no child");
  if (status != 0) throw Failure(text("a child of fork: wait status ", status));
#else
  (void)random;
#endif
}

}  // namespace

std::string test_threads(const Options& options) {
  // Before anything else has chosen an instruction set: the first use, by several threads.
  all_at_once([](int) { cmf::active_isa(); });
  const std::string backend = cmf::threading_backend();
  const std::vector<std::string> isas = cmf::usable_isas();
  Random random(options.seed);
  test_after_fork(random);
  for (int64_t i = 0; i < options.problems; ++i) {
    const uint64_t seed = random.bits();
    all_at_once([seed](int caller) {
      Random own(seed + static_cast<uint64_t>(caller));
      const int threads = static_cast<int>(own.integer(1, 4));
      test_every_item_once(own.one_of({0, 1, 2, 7, 100, 1000}), threads);
      const int64_t count = own.integer(1, 50);
      test_own_part_first(count, threads);
      test_cuts_are_even(count, static_cast<int>(own.integer(1, 40)));
      test_exceptions_come_back(count, threads, own.integer(0, count - 1));
      test_regions_do_not_nest(threads);
      cmf::threading_backend();
    });
    test_operators(random, isas[static_cast<std::size_t>(i) % isas.size()]);
  }
  return text(options.problems, " problems right with ", kCallers, " callers at once on ", backend);
}

}  // namespace convmixer_fast_test
