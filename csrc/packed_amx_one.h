// Packed products of one column of x in the order of AMX tiles, without tiles: what they wait for is memory.
//
// A tile product sums the even and the odd products of 32 columns apart, each in order and from zero, and adds even + odd
// to the sum (amx.h). The same with FP32 multiply-adds of numbers that stay in registers gives the same bits: a BF16 number
// is the upper half of an FP32 one. That reads memory faster than tiles with one row (docs/LOG.md).
#pragma once

#include <immintrin.h>

#include "packed_amx_order.h"
#include "packed_avx512.h"

namespace {

// K gives depth, is_scaled, and decode(tile, pairs): depth / 2 registers, each two columns of 16 rows in BF16.
template <class K>
class OneColumn {
 public:
  explicit OneColumn(const Product& the_task) : task(the_task) {}

  // All of [first, last), of which `first` is even.
  void run(int64_t first, int64_t last) {
    const FlushSubnormals flush;
    float* wide = scratch(kvern::padded_k(task.w));
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
    return static_cast<const uint8_t*>(task.w.tiles) + panel * (kvern::padded_k(task.w) / K::depth * kTileBytes);
  }

  static __m512 first_of(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static __m512 second_of(__m512i pairs) {
    return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
  }

  // sums[p] += one span of panel p times the numbers of x that it meets: 16 even, 16 odd.
  template <int P>
  [[gnu::always_inline]] void add_span(const uint8_t* stored, const uint8_t* ahead, const float* numbers, __m512 (&sums)[P]) const {
    __m512 even[P], odd[P];
    for (int p = 0; p < P; ++p) even[p] = odd[p] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int64_t t = 0; t < kTiles; ++t) {
      for (int p = 0; p < P; ++p) {
        const int64_t at = (t * P + p) * kTileBytes;
        __builtin_prefetch(ahead + at, 0, 2);
        __builtin_prefetch(stored + kNearBytes + at, 0, 3);
        __asm__ volatile("" ::: "memory");  // GCC would ask for all tiles of the span at once, and they would wait in line
        __m512i pairs[kPairs];
        K::decode(stored + at, pairs);
        for (int i = 0; i < kPairs; ++i) {
          even[p] = _mm512_fmadd_ps(first_of(pairs[i]), _mm512_set1_ps(numbers[t * kPairs + i]), even[p]);
          odd[p] = _mm512_fmadd_ps(second_of(pairs[i]), _mm512_set1_ps(numbers[kSpan / 2 + t * kPairs + i]), odd[p]);
        }
      }
    }
    for (int p = 0; p < P; ++p) sums[p] = _mm512_add_ps(sums[p], _mm512_add_ps(even[p], odd[p]));
  }

  // `count` times P panels from `first` on; `next`: what is read afterwards, or nullptr.
  template <int P>
  void stream(int64_t first, int64_t count, const uint8_t* next) const {
    constexpr int64_t kBytes = P * kTiles * kTileBytes;
    const int64_t spans = kvern::padded_k(task.w) / kSpan, of_group = K::is_scaled ? kDepth / kSpan : spans;
    const int64_t groups = (spans + of_group - 1) / of_group;
    const uint8_t* stored = tiles(first);
    const Tiles stream{stored, kTileBytes, P * kTileBytes, stored + count * spans * kBytes, next};
    for (int64_t panel = first; panel < first + count * P; panel += P) {
      __m512 totals[P];
      for (int p = 0; p < P; ++p) totals[p] = _mm512_setzero_ps();
      for (int64_t group = 0; group < groups; ++group) {
        __m512 sums[P];
        for (int p = 0; p < P; ++p) sums[p] = _mm512_setzero_ps();
        const int64_t end = least((group + 1) * of_group, spans);
        for (int64_t span = group * of_group; span < end; ++span, stored += kBytes) {
          add_span<P>(stored, stream.ahead(stored), x + span * kSpan, sums);
        }
        for (int p = 0; p < P; ++p) {
          const float by = K::is_scaled ? static_cast<const float*>(task.w.scales)[(panel + p) * groups + group] : 1.0f;
          totals[p] = _mm512_fmadd_ps(sums[p], _mm512_set1_ps(by), totals[p]);
        }
      }
      alignas(64) float delivered[P * kLanes];
      for (int p = 0; p < P; ++p) _mm512_store_ps(delivered + p * kLanes, totals[p]);
      deliver<Avx512Sums>(task, panel, P, delivered, P, 0, 1);
    }
  }

  const Product& task;
  const float* x = nullptr;  // its numbers, see `widen`
};

}  // namespace
