#include "cpu/depthwise/depthwise.h"

#include "cpu/engine/isa.h"
#include "cpu/engine/threads.h"
#include "cpu/memory.h"

namespace convmixer_fast {
namespace {

// A parallel region costs a few microseconds to open: 2^17 multiply-adds of one core. Below that one thread is
// faster.
constexpr double kSerialMultiplyAdds = 1 << 17;

}  // namespace

void depthwise_mix(const DepthwiseMix& p, Layout layout, int threads) {
  if (p.n == 0 || p.c == 0 || p.h == 0 || p.w == 0) return;
  const DepthwiseKernels& kernels = active_isa().depthwise;
  const DepthwiseBlocks blocks = kernels.blocks(p, layout);
  const double work = 1.0 * p.n * p.c * p.h * p.w * p.k * p.k;
  if (work < kSerialMultiplyAdds) threads = 1;
  parallel_for(blocks.count, threads, [&](Share& share) {
    const auto scratch = aligned_floats(blocks.scratch_floats);
    for (Range r; share.next(r);) {
      kernels.run(p, layout, blocks, r.begin, r.end, scratch.get());
    }
  });
}

}  // namespace convmixer_fast
