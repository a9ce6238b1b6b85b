// The C interface: checks arguments, picks the kernels, cuts the work into chunks of rows.
#include "kvern.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "scalars.h"
#include "sound.h"

#if defined(KVERN_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace kvern {
namespace {

constexpr int64_t kChunkBytes = 64 * 1024;  // 2 to 4 microseconds of memory traffic: small beside a stolen core
constexpr int64_t kRowGroup = 4;            // kernels work on this many rows at a time

#if defined(KVERN_X86)
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c(); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vbmi");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Leaf 7 tells of the tiles and of products with bit matrices, XCR0 that the system keeps them; Linux lets a process use them when it asks, once.
bool has_amx() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kTileBits = 1u << 22 | 1u << 24;  // amx-bf16, amx-tile
  constexpr unsigned kBitMatrices = 1u << 8;           // gfni
  constexpr unsigned kTileState = 1u << 17 | 1u << 18;
  constexpr long kAskForState = 0x1023, kTileData = 18;
  unsigned a, b, c, d, low, high;
  if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTileBits) != kTileBits || !(c & kBitMatrices)) return false;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState && syscall(SYS_arch_prctl, kAskForState, kTileData) == 0;
#else
  return false;
#endif
}

const Kernels& avx512bf16_kernels() {
  static const Kernels kernels = [] {
    Kernels table = kAvx512Kernels;
    table.name = "avx512bf16";
    table.attend_dots = attend_dots_avx512bf16;
    return table;
  }();
  return kernels;
}

const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels table = avx512bf16_kernels();
    table.name = "amx";
    table.attend_tiles = attend_tiles_amx;
    table.merge_tiles = merge_tiles_amx;
    return table;
  }();
  return kernels;
}
#endif

struct Candidate {
  const char* name;
  const Kernels* kernels;  // nullptr: not on this CPU or not in this build
};

std::vector<Candidate> candidates() {  // best first
#if defined(KVERN_X86)
  return {{"amx", has_amx() ? &amx_kernels() : nullptr},
          {"avx512bf16", has_avx512bf16() ? &avx512bf16_kernels() : nullptr},
          {"avx512", has_avx512() ? &kAvx512Kernels : nullptr},
          {"avx2", has_avx2() ? &kAvx2Kernels : nullptr},
          {"scalar", &kScalarKernels}};
#else
  return {{"amx", nullptr}, {"avx512bf16", nullptr}, {"avx512", nullptr}, {"avx2", nullptr}, {"scalar", &kScalarKernels}};
#endif
}

const Kernels* best_kernels() {
  for (const auto& one : candidates()) {
    if (one.kernels) return one.kernels;
  }
  return &kScalarKernels;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{best_kernels()};
  return kernels;
}

bool is_float(int dtype) { return dtype == KVERN_F32 || dtype == KVERN_BF16; }
int64_t size_of(int dtype) { return dtype == KVERN_F32 ? 4 : dtype == KVERN_BF16 ? 2 : 1; }
int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Runs rows(task, begin, end) over [0, n) in chunks of about kChunkBytes that start at multiples of kRowGroup.
template <class Task>
void over_rows(const Task& task, int64_t row_bytes, void (*rows)(const Task&, int64_t, int64_t)) {
  struct Work {
    const Task& task;
    void (*rows)(const Task&, int64_t, int64_t);
    int64_t size;
  };
  const int64_t groups = kChunkBytes / (row_bytes * kRowGroup + 1);
  const Work work{task, rows, (groups > 0 ? groups : 1) * kRowGroup};
  parallel_for(
      divide_up(task.n, work.size),
      [](const void* context, int64_t chunk) {
        const auto& mine = *static_cast<const Work*>(context);
        const int64_t begin = chunk * mine.size;
        const int64_t end = begin + mine.size;
        mine.rows(mine.task, begin, end < mine.task.n ? end : mine.task.n);
      },
      &work);
}

// x as the kernels want it: see Linear::x.
const float* packed(const void* x, int dtype, int64_t m, int64_t k, int64_t stride, int64_t group) {
  thread_local std::vector<float> scratch;
  if (scratch.size() < static_cast<size_t>(m * stride)) scratch.resize(static_cast<size_t>(m * stride));
  for (int64_t row = 0; row < m; ++row) {
    const int64_t first = row / group * group;
    const int64_t size = m - first < group ? m - first : group;
    float* to = scratch.data() + first * stride + (row - first) * kStep;
    for (int64_t at = 0; at < k; at += kStep, to += size * kStep) {
      const int64_t count = k - at < kStep ? k - at : kStep;
      if (dtype == KVERN_F32) {
        std::memcpy(to, static_cast<const float*>(x) + row * k + at, static_cast<size_t>(count) * sizeof(float));
      } else {
        const uint16_t* from = static_cast<const uint16_t*>(x) + row * k + at;
        for (int64_t i = 0; i < count; ++i) to[i] = float_of_bf16(from[i]);
      }
      std::memset(to + count, 0, static_cast<size_t>(kStep - count) * sizeof(float));
    }
  }
  return scratch.data();
}

}  // namespace

const Kernels& kernels_in_use() { return *chosen().load(); }

}  // namespace kvern

using namespace kvern;

int kvern_abi(void) { return KVERN_ABI; }

const char* kvern_isa(void) { return kernels_in_use().name; }

int kvern_select_isa(const char* name) {
  if (!name) {
    chosen().store(best_kernels());
    return KVERN_OK;
  }
  for (const auto& one : candidates()) {
    if (std::strcmp(one.name, name) != 0) continue;
    if (!one.kernels) return KVERN_UNSUPPORTED_ISA;
    chosen().store(one.kernels);
    return KVERN_OK;
  }
  return KVERN_BAD_ARGUMENT;
}

int kvern_set_threads(int threads) {
  if (threads < 1 || threads > 1024) return KVERN_BAD_ARGUMENT;
  set_threads(threads);
  return KVERN_OK;
}

int kvern_threads(void) { return threads(); }

int kvern_linear(void* y, int y_dtype, const void* x, int x_dtype, const void* weight, int weight_dtype,
                 int64_t weight_stride, const float* scale, int64_t scale_stride, const void* bias, int bias_dtype,
                 int64_t m, int64_t n, int64_t k) {
  const bool is_f8 = weight_dtype == KVERN_F8_E4M3;
  if (!is_float(y_dtype) || !is_float(x_dtype) || !(is_f8 || is_float(weight_dtype))) return KVERN_BAD_ARGUMENT;
  if (!is_addressable({m, k}) || !is_addressable({m, n}) || !is_addressable({n, weight_stride}) || weight_stride < k || is_f8 != (scale != nullptr)) return KVERN_BAD_ARGUMENT;
  if (is_f8 && (scale_stride < divide_up(k, kBlock) || !is_addressable({n, scale_stride}))) return KVERN_BAD_ARGUMENT;
  if (bias && !is_float(bias_dtype)) return KVERN_BAD_ARGUMENT;
  if (m == 0 || n == 0) return KVERN_OK;
  if (!y || (k > 0 && (!x || !weight))) return KVERN_BAD_ARGUMENT;
  const int64_t x_stride = divide_up(k, kStep) * kStep;
  const Kernels& kernels = kernels_in_use();
  const int64_t group = m <= kDirect ? m : kernels.x_group[weight_dtype];
  const float* rows = packed(x, x_dtype, m, k, x_stride, group);
  const Linear task{y, y_dtype, rows, x_stride, weight, weight_stride, scale, scale_stride, bias, bias_dtype, m, n, k};
  over_rows(task, k * size_of(weight_dtype), kernels.linear[weight_dtype]);
  return KVERN_OK;
}

int kvern_dequantize(void* out, int out_dtype, const void* weight, int64_t weight_stride, const float* scale,
                     int64_t scale_stride, int64_t n, int64_t k) {
  if (!is_float(out_dtype) || k < 0 || weight_stride < k || !is_addressable({n, weight_stride})) return KVERN_BAD_ARGUMENT;
  if (n == 0 || k == 0) return KVERN_OK;
  if (!out || !weight || !scale || scale_stride < divide_up(k, kBlock) || !is_addressable({n, scale_stride})) return KVERN_BAD_ARGUMENT;
  const Dequantize task{out, out_dtype, static_cast<const uint8_t*>(weight), weight_stride, scale, scale_stride, n, k};
  over_rows(task, k * (1 + size_of(out_dtype)), kernels_in_use().dequantize);
  return KVERN_OK;
}

uint64_t kvern_read(const void* data, int64_t bytes) {
  constexpr int64_t kStretch = 256 * 1024, kLine = 64, kAhead = 4096;  // asked for ahead as packed weights are
  struct Read {
    const uint8_t* data;
    int64_t bytes;
    std::atomic<uint64_t> sum{0};
  };
  Read task{static_cast<const uint8_t*>(data), bytes / 8 * 8};
  parallel_for(
      divide_up(task.bytes, kStretch),
      [](const void* context, int64_t stretch) {
        auto& read = *static_cast<Read*>(const_cast<void*>(context));
        const uint8_t* at = read.data + stretch * kStretch;
        const uint8_t* end = read.data + std::min(read.bytes, (stretch + 1) * kStretch);
        const auto word = [](const uint8_t* from) {  // which may be any address
          uint64_t bits;
          std::memcpy(&bits, from, sizeof bits);
          return bits;
        };
        uint64_t lanes[8] = {};
        for (; end - at >= kLine; at += kLine) {
          __builtin_prefetch(at + kAhead, 0, 2);
          for (int lane = 0; lane < 8; ++lane) lanes[lane] += word(at + 8 * lane);
        }
        for (; at < end; at += 8) lanes[0] += word(at);
        for (int lane = 1; lane < 8; ++lane) lanes[0] += lanes[lane];
        read.sum.fetch_add(lanes[0], std::memory_order_relaxed);
      },
      &task);
  return task.sum.load();
}
