#include "cpu/epilogue/pass.h"

#include "cpu/engine/isa.h"
#include "cpu/engine/threads.h"

namespace convmixer_fast {
namespace {

// As in depthwise.cpp: what one core computes while a parallel region opens.
constexpr double kSerialValues = 1 << 14;

}  // namespace

void apply_epilogue(const Epilogue& p, Layout layout, int threads) {
  if (p.n == 0 || p.c == 0 || p.pixels == 0) return;
  const EpilogueKernels& kernels = active_isa().epilogue;
  if (1.0 * p.n * p.c * p.pixels < kSerialValues) threads = 1;
  parallel_for(kernels.pieces(p, layout), threads, [&](Share& share) {
    for (Range r; share.next(r);) kernels.run(p, layout, r.begin, r.end);
  });
}

}  // namespace convmixer_fast
