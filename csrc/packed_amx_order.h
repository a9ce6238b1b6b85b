// What products without tiles need to sum in the order of AMX tiles (amx.h): x in FP32, even and odd columns apart, and
// subnormal numbers as zeros.
#pragma once

#include <immintrin.h>

#include <vector>

#include "amx.h"
#include "packed_avx512.h"

namespace {

using kvern::kSpan;

// While one lives, subnormal numbers count as zeros.
class FlushSubnormals {
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned saved_;
};

// So many numbers of the thread's own memory, aligned, until the next call.
inline float* scratch(int64_t numbers) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < numbers + kLanes) memory.resize(static_cast<size_t>(numbers + kLanes));
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
}

// The columns of x in FP32, each span's even numbers before its odd ones.
inline void widen(const Columns& x, float* out) {
  for (int64_t c = 0; c < x.count; ++c) {
    for (int64_t e = 0; e < x.elements; e += 16, out += kSpan) {
      const __m512i pairs = _mm512_loadu_si512(x.data + e * x.group + c * kvern::kTileElements);
      _mm512_store_si512(out, _mm512_slli_epi32(pairs, 16));
      _mm512_store_si512(out + 16, _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
  }
}

}  // namespace
