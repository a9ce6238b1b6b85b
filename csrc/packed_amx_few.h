// Packed products on AMX tiles with one group of columns of x: what they wait for is memory.
//
// The panels of a call lie in one stream, pair by pair, cut into spans of 32 columns. While the tile unit multiplies one
// span, the next is decoded into L1 and what comes kAheadBytes later is asked for, at the end of the stream what the
// thread reads next: so memory never waits for sums, nor at the border of two panels. Sums are scaled a group later, when
// the tiles are done. The order of additions of a row of y is that of any other number of columns (packed_amx.cpp).
#pragma once

#include <immintrin.h>

#include "amx.h"
#include "packed_avx512.h"

namespace {

using kvern::kSpan;

constexpr int64_t kTileRows = 16;  // columns of x in a tile, at most

// K gives depth; group(w) and scale(w, panel, group), as in packed_amx_registers.h; is_decoded, and decode_tile(stored,
// decoded) for the kinds that are decoded.
template <class K>
class FewColumns {
 public:
  explicit FewColumns(const Product& the_task) : task(the_task) {}  // leaves the arrays as they are

  // All of [first, last), of which `first` is even.
  void run(int64_t first, int64_t last) {
    const int64_t pairs = (last - first) / 2;
    const bool has_single = (last - first) % 2;
    stream<2>(first, pairs, has_single ? tiles(first + 2 * pairs) : static_cast<const uint8_t*>(task.next));
    if (has_single) stream<1>(last - 1, 1, static_cast<const uint8_t*>(task.next));
  }

 private:
  static constexpr int64_t kTiles = kSpan / K::depth;  // of a panel in a span, as they are stored
  static constexpr int64_t kDecoded = K::is_decoded ? kSpan / 2 * kTileBytes : kTileBytes;
  static constexpr int kTurns = 4;

  // Sums that still wait for their scales.
  struct Waiting {
    const float* sums;
    __m512 scales[2];
    int64_t panel;
    bool is_first, is_last;  // of the groups of the panel
  };

  const uint8_t* tiles(int64_t panel) const {
    return static_cast<const uint8_t*>(task.w.tiles) + panel * (kvern::padded_k(task.w) / K::depth * kTileBytes);
  }

  template <int P>
  void decode(const uint8_t* stored, const uint8_t* ahead, uint8_t (&to)[2][kDecoded]) {
    for (int64_t t = 0; t < kTiles; ++t) {
      for (int p = 0; p < P; ++p) {
        const int64_t at = (t * P + p) * kTileBytes;
        if constexpr (K::is_decoded) K::decode_tile(stored + at, to[p] + t * kDecoded / kTiles);
        __builtin_prefetch(ahead + at, 0, 2);
        __builtin_prefetch(stored + kNearBytes + at, 0, 3);
      }
    }
  }

  template <int P>
  void settle(const Waiting& waiting) {
    if (!waiting.sums) return;
    const __m512 zero = _mm512_setzero_ps();
    for (int64_t at = 0; at < task.x.count * P; ++at) {
      const __m512 before = waiting.is_first ? zero : _mm512_load_ps(totals + at * kLanes);
      _mm512_store_ps(totals + at * kLanes, _mm512_fmadd_ps(_mm512_load_ps(waiting.sums + at * kLanes), waiting.scales[at % P], before));
    }
    if (waiting.is_last) deliver<Avx512Sums>(task, waiting.panel, P, totals, P, 0, task.x.count);
  }

  // `count` times P panels from `first` on; `next`: what is read afterwards, or nullptr.
  template <int P>
  void stream(int64_t first, int64_t count, const uint8_t* next) {
    constexpr int64_t kBytes = P * kTiles * kTileBytes;
    const int64_t spans = kvern::padded_k(task.w) / kSpan, all = count * spans;
    const int64_t of_group = K::group(task.w) / kSpan;
    const uint8_t* stored = tiles(first);
    const Tiles stream{stored, kTileBytes, P * kTileBytes, stored + all * kBytes, next};
    if (all) decode<P>(stored, stream.ahead(stored), decoded[0]);
    Waiting waiting{};
    int64_t span = 0, panel = first;
    int turn = 0;
    for (int64_t s = 0; s < all; ++s, stored += kBytes) {
      if (s + 1 < all) decode<P>(stored + kBytes, stream.ahead(stored + kBytes), decoded[(s + 1) % kTurns]);
      if (span % of_group == 0) kvern::clear_sums<P>();
      kvern::finish_stores();
      const uint8_t* w = K::is_decoded ? decoded[s % kTurns][0] : stored;
      const void* operands[kvern::kMostSums] = {w, K::is_decoded ? decoded[s % kTurns][1] : stored + kTileBytes, w, w};
      kvern::add_products<P>(task.x.data + span * kTileRows * task.x.group, kTileBytes, operands,
                             K::is_decoded || P == 1 ? kTileBytes : 2 * kTileBytes);
      ++span;
      if (span % of_group && span < spans) continue;
      float* to = sums[turn];
      turn = 1 - turn;
      kvern::store_sums<P>(to, kTileBytes, P * kTileBytes);
      settle<P>(waiting);
      const int64_t group = (span - 1) / of_group;
      waiting = {to, {}, panel, group == 0, span == spans};
      for (int p = 0; p < P; ++p) waiting.scales[p] = K::scale(task.w, panel + p, group);
      if (span < spans) continue;
      span = 0;
      panel += P;
    }
    settle<P>(waiting);
  }

  const Product& task;
  alignas(64) uint8_t decoded[kTurns][2][kDecoded];
  alignas(64) float sums[2][kTileRows * 2 * kLanes];
  alignas(64) float totals[kTileRows * 2 * kLanes];
};

}  // namespace
