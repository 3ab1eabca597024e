// Runs csrc/cuda/pointwise_mma.cu, as bindings call it, on a CPU.
//
//   pointwise_emulated TYPE ACT M N K A_STRIDE A_OFFSET D_OFFSET BIAS SEED ROWS_BEFORE < operands > d
//
// Operands, one after the other: a as it lies in memory ((M - 1) A_STRIDE + K elements), w, bias where
// BIAS is 1, scale, shift. a and d begin OFFSET elements after a multiple of 16 bytes. ROWS_BEFORE rows
// are added in front of a and d, which are memory that nobody touches, and no tile of theirs is run.
#include "pointwise_mma.cu"

#include <sys/mman.h>

using namespace convmixer_fast;

// Of exactly `bytes` bytes, so that AddressSanitizer sees the end, after `before` that are untouched.
static uint8_t* room(int64_t bytes, int64_t offset, int64_t before) {
  if (before == 0) {
    auto* p = static_cast<uint8_t*>(malloc(bytes + offset));
    memset(p, 0xff, bytes + offset);
    return p + offset;
  }
  void* p = mmap(nullptr, before + bytes + offset, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) emu::die("mmap");
  return static_cast<uint8_t*>(p) + offset;
}

static void take(void* to, int64_t bytes) {
  if (static_cast<int64_t>(fread(to, 1, bytes, stdin)) != bytes) emu::die("operands are missing");
}

int main(int argc, char** argv) {
  if (argc != 12) emu::die("eleven arguments");
  auto number = [&](int i) { return static_cast<int64_t>(atoll(argv[i])); };
  cuda::Pointwise p{};
  p.type = static_cast<cuda::Type>(number(1));
  p.act = static_cast<Activation>(number(2));
  const int64_t rows = number(3), before = number(11);
  p.m = rows + before;
  p.n = number(4);
  p.k = number(5);
  p.a_stride = number(6);
  const int64_t size = p.type == cuda::Type::tf32 ? 4 : 2;
  const int64_t a_bytes = rows > 0 ? ((rows - 1) * p.a_stride + p.k) * size : 0;
  const int64_t d_bytes = rows * p.n * size;
  uint8_t* a = room(a_bytes, number(7) * size, before * p.a_stride * size);
  uint8_t* w = room(p.n * p.k * size, 0, 0);
  uint8_t* d = room(d_bytes, number(8) * size, before * p.n * size);
  float* vectors[3] = {};
  take(a + before * p.a_stride * size, a_bytes);
  take(w, p.n * p.k * size);
  for (int i = number(9) ? 0 : 1; i < 3; ++i) {
    vectors[i] = reinterpret_cast<float*>(room(p.n * 4, 0, 0));
    take(vectors[i], p.n * 4);
  }
  p.a = a, p.w = w, p.d = d;
  p.bias = vectors[0], p.scale = vectors[1], p.shift = vectors[2];
  emulated_seed = static_cast<unsigned>(number(10));
  if (before != 0) {
    emulated_wants = [&](unsigned block) {
      const int64_t tile = cuda::variant(p.type, p.act, cuda::way_for(p)).tile_m;
      const auto tiles_m = static_cast<uint32_t>((p.m + tile - 1) / tile);
      const auto tiles_n = static_cast<uint32_t>((p.n + tile - 1) / tile);
      return cuda::place_of(block, tiles_m, tiles_n).m >= before / tile;
    };
  }
  const std::string why = cuda::mma_family().launch(p, __CUDA_ARCH__ / 10, nullptr);
  if (!why.empty()) {
    if (cudaGetLastError() != cudaSuccess) emu::die("an error was left on the runtime's record");
    emu::die(why.c_str());
  }
  fwrite(d + before * p.n * size, 1, d_bytes, stdout);
  return 0;
}
