// The machine's multiply-add rate: the limit that every kernel is measured against.
#pragma once

#include <cstdint>

namespace convmixer_fast {

// One instruction set's loop of independent multiply-adds on registers alone, `turns` times;
// returns how many float multiply-adds that was. `sink` takes a value that depends on all of them.
using PeakKernel = double (*)(int64_t turns, float* sink);

// Float multiply-adds a second of `threads` threads at once, the best of many short spells within
// `seconds`, for the instruction set in use.
double multiply_add_rate(int threads, double seconds);

}  // namespace convmixer_fast
