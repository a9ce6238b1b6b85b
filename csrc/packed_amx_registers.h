// Packed products of a few columns of x in the order of AMX tiles, without tiles: what they wait for is memory.
//
// A tile product sums the even and the odd products of 32 columns apart, each in order and from zero, and adds even + odd
// to the sum (amx.h). The same with FP32 multiply-adds of numbers that stay in registers gives the same bits: a BF16 number
// is the upper half of an FP32 one. That reads memory faster than tiles that are nearly empty (docs/LOG.md): each has to
// be decoded into L1 first, and with 4 bits its sums are stored for each group, to be scaled. (vdpbf16ps sums in the same
// way, but begins every other cycle only.)
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

// The first and the second of 16 pairs of BF16 numbers, in FP32.
inline __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 second_of(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}

// The columns of x in FP32, each span's even numbers before its odd ones.
inline void widen(const Columns& x, float* out) {
  for (int64_t c = 0; c < x.count; ++c) {
    for (int64_t e = 0; e < x.elements; e += 16, out += kSpan) {
      const __m512i pairs = _mm512_loadu_si512(x.data + e * x.group + c * kvern::kTileElements);
      _mm512_store_ps(out, first_of(pairs));
      _mm512_store_ps(out + kSpan / 2, second_of(pairs));
    }
  }
}

// M columns of x. K gives depth; load(tile), a `Loaded`; first(loaded, i) and second(loaded, i), its columns 2 i and
// 2 i + 1 of 16 rows in FP32; group(w), columns of W that share a scale; scale(w, panel, group).
template <class K, int M>
class InRegisters {
 public:
  explicit InRegisters(const Product& the_task) : task(the_task), padded(kvern::padded_k(the_task.w)) {}

  // All of [first, last), of which `first` is even.
  void run(int64_t first, int64_t last) {
    const FlushSubnormals flush;
    float* wide = scratch(M * padded);
    widen(task.x, wide);
    x = wide;
    const int64_t pairs = (last - first) / 2;
    const bool has_single = (last - first) % 2;
    stream<2>(first, pairs, has_single ? tiles(first + 2 * pairs) : static_cast<const uint8_t*>(task.next));
    if (has_single) stream<1>(last - 1, 1, static_cast<const uint8_t*>(task.next));
  }

 private:
  static constexpr int64_t kTiles = kSpan / K::depth;  // of a panel in a span
  static constexpr int kPairs = K::depth / 2;          // of columns in a tile

  const uint8_t* tiles(int64_t panel) const {
    return static_cast<const uint8_t*>(task.w.tiles) + panel * (padded / K::depth * kTileBytes);
  }

  // sums[p] += one span of panel p times the numbers of x that it meets: of each column 16 even and 16 odd ones.
  template <int P>
  [[gnu::always_inline]] void add_span(const uint8_t* stored, const uint8_t* ahead, const float* numbers, __m512 (&sums)[P][M]) const {
    __m512 even[P][M], odd[P][M];
    clear<Avx512Sums, P, M>(even);
    clear<Avx512Sums, P, M>(odd);
#pragma GCC unroll 8
    for (int64_t t = 0; t < kTiles; ++t) {
      typename K::Loaded loaded[P];
      for (int p = 0; p < P; ++p) {
        const int64_t at = (t * P + p) * kTileBytes;
        __builtin_prefetch(ahead + at, 0, 2);
        __builtin_prefetch(stored + kNearBytes + at, 0, 3);
        __asm__ volatile("" ::: "memory");  // GCC would ask for all tiles of the span at once, and they would wait in line
        loaded[p] = K::load(stored + at);
      }
      for (int i = 0; i < kPairs; ++i) {
        for (int p = 0; p < P; ++p) {
          const __m512 first = K::first(loaded[p], i), second = K::second(loaded[p], i);
          for (int m = 0; m < M; ++m) {
            const float* meets = numbers + m * padded + t * kPairs + i;
            even[p][m] = _mm512_fmadd_ps(first, _mm512_set1_ps(meets[0]), even[p][m]);
            odd[p][m] = _mm512_fmadd_ps(second, _mm512_set1_ps(meets[kSpan / 2]), odd[p][m]);
          }
        }
      }
    }
    for (int p = 0; p < P; ++p) {
      for (int m = 0; m < M; ++m) sums[p][m] = _mm512_add_ps(sums[p][m], _mm512_add_ps(even[p][m], odd[p][m]));
    }
  }

  // `count` times P panels from `first` on; `next`: what is read afterwards, or nullptr.
  template <int P>
  void stream(int64_t first, int64_t count, const uint8_t* next) const {
    constexpr int64_t kBytes = P * kTiles * kTileBytes;
    const int64_t spans = padded / kSpan, of_group = K::group(task.w) / kSpan, groups = (spans + of_group - 1) / of_group;
    const uint8_t* stored = tiles(first);
    const Tiles stream{stored, kTileBytes, P * kTileBytes, stored + count * spans * kBytes, next};
    for (int64_t panel = first; panel < first + count * P; panel += P) {
      __m512 totals[P][M];
      clear<Avx512Sums, P, M>(totals);
      for (int64_t group = 0; group < groups; ++group) {
        __m512 sums[P][M];
        clear<Avx512Sums, P, M>(sums);
        const int64_t end = least((group + 1) * of_group, spans);
        for (int64_t span = group * of_group; span < end; ++span, stored += kBytes) {
          add_span<P>(stored, stream.ahead(stored), x + span * kSpan, sums);
        }
        for (int p = 0; p < P; ++p) {
          const __m512 by = K::scale(task.w, panel + p, group);
          for (int m = 0; m < M; ++m) totals[p][m] = _mm512_fmadd_ps(sums[p][m], by, totals[p][m]);
        }
      }
      alignas(64) float delivered[M * P * kLanes];
      for (int p = 0; p < P; ++p) {
        for (int m = 0; m < M; ++m) _mm512_store_ps(delivered + (m * P + p) * kLanes, totals[p][m]);
      }
      deliver<Avx512Sums>(task, panel, P, delivered, P, 0, M);
    }
  }

  const Product& task;
  const int64_t padded;      // columns of W in a panel
  const float* x = nullptr;  // its numbers, see `widen`
};

}  // namespace
