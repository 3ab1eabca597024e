#include "cpu/peak/peak.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/engine/isa.h"

namespace convmixer_fast {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// The median rate of one thread. A spell of 2^16 turns is about 200 microseconds: shorter than a
// scheduler's slice, so that most spells are undisturbed on a busy machine too. Not the best spell:
// a clock that rises for moments does not last for real work.
double one_thread(double seconds) {
  const PeakKernel kernel = active_isa().peak;
  std::vector<double> rates;
  float sink = 0.0f;
  const Clock::time_point begin = Clock::now();
  do {
    const Clock::time_point start = Clock::now();
    const double done = kernel(1 << 16, &sink);
    rates.push_back(done / seconds_since(start));
  } while (seconds_since(begin) < seconds);
  const auto middle = rates.begin() + static_cast<std::ptrdiff_t>(rates.size() / 2);
  std::nth_element(rates.begin(), middle, rates.end());
  return *middle;
}

}  // namespace

double multiply_add_rate(int threads, double seconds) {
  // Threads of their own: what the cores can do does not depend on whose pool asks.
  std::vector<double> rates(static_cast<std::size_t>(threads), 0.0);
  std::vector<std::thread> helpers;
  for (int i = 1; i < threads; ++i) {
    helpers.emplace_back([&rates, i, seconds] { rates[i] = one_thread(seconds); });
  }
  rates[0] = one_thread(seconds);
  for (std::thread& helper : helpers) helper.join();
  double sum = 0.0;
  for (double rate : rates) sum += rate;
  return sum;
}

}  // namespace convmixer_fast
