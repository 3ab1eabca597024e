// native_test kernels|threads [--problems N] [--seed S]: the C++ core, tested without Python.
//
// Prints one line; exit status 1 and the failing problem where something is wrong, 2 for a wrong
// command line.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>

#include "support.h"

int main(int argc, char** argv) {
  using namespace convmixer_fast_test;
  const std::string what = argc > 1 ? argv[1] : "";
  Options options;
  bool understood = (what == "kernels" || what == "threads") && argc % 2 == 0;
  for (int i = 2; understood && i < argc; i += 2) {
    const std::string name = argv[i];
    if (name == "--problems") {
      options.problems = std::atoll(argv[i + 1]);
    } else if (name == "--seed") {
      options.seed = std::strtoull(argv[i + 1], nullptr, 10);
    } else {
      understood = false;
    }
  }
  if (!understood || options.problems < 1) {
    std::fprintf(stderr, "usage: native_test kernels|threads [--problems N] [--seed S]\n");
    return 2;
  }
  const auto start = std::chrono::steady_clock::now();
  try {
    const std::string summary =
        what == "kernels" ? test_kernels(options) : test_threads(options);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%s: %s, %.1f s\n", what.c_str(), summary.c_str(), seconds.count());
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: FAILED (--seed %llu): %s\n", what.c_str(),
                 static_cast<unsigned long long>(options.seed), error.what());
    return 1;
  }
}
