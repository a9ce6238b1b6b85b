// Packed products of 4-bit weights on CPUs with AMX, in two forms that give the same numbers, bit for bit.
//
// With many columns of x the tiles do it, with few packed_amx_registers.h in the tiles' order of additions: 11.5 cycles
// for 64 bytes, little more than memory takes. What it gives up: subnormal numbers count as zeros, as they do in tiles.
#include <immintrin.h>

#include "amx.h"
#include "packed_amx_registers.h"
#include "packed_avx512.h"

namespace {

constexpr int64_t kRows = 16;       // columns of x in a tile
constexpr int64_t kSpanTiles = 4;   // stored
constexpr int64_t kSpanBytes = 16 * kTileBytes;  // decoded
constexpr int64_t kBlock = 128;     // columns of W decoded at a time
constexpr int kFew = 3;             // up to so many columns of x are multiplied without tiles
constexpr int kMostPanels = 4;

struct Int4Words : Int4Kind {
  using Loaded = __m512i;
  static __m512i load(const uint8_t* tile) { return _mm512_loadu_si512(tile); }
  static __m512 first(__m512i words, int i) { return look_up(i ? _mm512_srli_epi32(words, 4 * i) : words); }
  static __m512 second(__m512i words, int i) { return look_up(_mm512_srli_epi32(words, 16 + 4 * i)); }
  static int64_t group(const kvern_packed& w) { return w.group; }
  static __m512 scale(const kvern_packed& w, int64_t panel, int64_t group) {
    return bf16_lanes(static_cast<const uint16_t*>(w.scales) + (panel * (kvern::padded_k(w) / w.group) + group) * kLanes);
  }

 private:
  // The numbers of the lowest four bits of each word.
  static __m512 look_up(__m512i words) {
    const __m512 numbers = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return _mm512_permutexvar_ps(words, numbers);
  }
};

// Many columns: kBlock columns of P panels are decoded once, into L1, and multiplied with each group of x in turn.
struct Many {
  const Product& task;
  float* totals;  // [columns, P, 16]
  alignas(64) uint8_t decoded[kMostPanels][kBlock / kSpan * kSpanBytes];
  alignas(64) float sums[2][kRows * kLanes];

  Many(const Product& the_task, float* memory) : task(the_task), totals(memory) {}  // leaves the arrays as they are

  template <int P>
  void decode(int64_t first, int64_t begin, int64_t count) {
    constexpr int kTogether = P > 1 ? 2 : 1;
    for (int p = 0; p < P; p += kTogether) {
      const Tiles tiles = tiles_of<Int4Words>(task.w, first + p);
      for (int64_t t = 0; t < count / Int4Words::depth; ++t) {
        for (int beside = 0; beside < kTogether; ++beside) {
          const uint8_t* tile = tiles.at(begin / Int4Words::depth + t) + beside * kTileBytes;
          uint8_t* to = decoded[p + beside] + t * kSpanBytes / kSpanTiles;
          const __m512i words = _mm512_loadu_si512(tile);
          __builtin_prefetch(tile + kAheadBytes, 0, 2);
          _mm512_store_si512(to, int4_pairs<0>(words));
          _mm512_store_si512(to + kTileBytes, int4_pairs<1>(words));
          _mm512_store_si512(to + 2 * kTileBytes, int4_pairs<2>(words));
          _mm512_store_si512(to + 3 * kTileBytes, int4_pairs<3>(words));
        }
      }
    }
  }

  // Columns [begin, begin + count) of W of the panel `first + p`, times M columns of x or fewer: those from `column` on.
  template <int M>
  void multiply(int64_t first, int p, int width, int64_t begin, int64_t count, int64_t column) {
    const int64_t group = task.w.group;
    const uint32_t* x = task.x.data + column * task.x.elements + begin / 2 * task.x.group;
    const uint8_t* tile = decoded[p];
    float* at = totals + (column * width + p) * kLanes;
    __m512 total[M];
    for (int m = 0; m < M; ++m) total[m] = _mm512_load_ps(at + m * width * kLanes);
    for (int64_t done = 0, turn = 0; done < count; done += group, turn ^= 1) {
      _tile_zero(0);
      for (int64_t span = 0; span < group; span += kSpan, x += kSpan / 2 * task.x.group, tile += kSpanBytes) {
        _tile_loadd(4, x, kTileBytes);
        _tile_loadd(5, tile, kTileBytes);
        _tile_dpbf16ps(0, 4, 5);
      }
      _tile_stored(0, sums[turn], kTileBytes);
      const __m512 by = Int4Words::scale(task.w, first + p, (begin + done) / group);
      for (int m = 0; m < M; ++m) total[m] = _mm512_fmadd_ps(_mm512_load_ps(sums[turn] + m * kLanes), by, total[m]);
    }
    for (int m = 0; m < M; ++m) {
      if (m < task.x.group) _mm512_store_ps(at + m * width * kLanes, total[m]);  // what follows belongs to the next group
    }
  }

  template <int P, int M>
  void panels(int64_t first) {
    const int64_t padded = kvern::padded_k(task.w);
    const int64_t columns = kvern::round_up(task.x.count, task.x.group) + kRows;
    std::memset(totals, 0, static_cast<size_t>(columns * P * kLanes) * sizeof(float));
    for (int64_t begin = 0; begin < padded; begin += kBlock) {
      const int64_t count = least(kBlock, padded - begin);
      decode<P>(first, begin, count);
      kvern::finish_stores();
      for (int64_t column = 0; column < task.x.count; column += task.x.group) {
        for (int p = 0; p < P; ++p) multiply<M>(first, p, P, begin, count, column);
      }
    }
    deliver<Avx512Sums>(task, first, P, totals, P, 0, task.x.count);
  }

  template <int M>
  void all(int64_t first, int64_t last) {
    for (; task.x.count > task.x.group && first + 4 <= last; first += 4) panels<4, M>(first);
    for (; first + 2 <= last; first += 2) panels<2, M>(first);
    if (first < last) panels<1, M>(first);
  }
};

[[gnu::noinline]] void multiply_many(const Product& task, int64_t first, int64_t last) {
  const Columns& x = task.x;
  Many many(task, scratch((kvern::round_up(x.count, x.group) + kRows) * kMostPanels * kLanes));
  const kvern::TileRows rows(static_cast<int>(x.group));
  if (x.group <= kRows / 2) {
    many.all<kRows / 2>(first, last);
  } else {
    many.all<kRows>(first, last);
  }
}

// M columns of x or fewer.
template <int M>
void multiply_few(const Product& task, int64_t first, int64_t last) {
  if constexpr (M > 1) {
    if (task.x.count < M) return multiply_few<M - 1>(task, first, last);
  }
  InRegisters<Int4Words, M>(task).run(first, last);
}

void multiply_int4(const Product& task, int64_t first, int64_t last) {
  if (task.x.count <= kFew) return multiply_few<kFew>(task, first, last);
  const FlushSubnormals flush;
  multiply_many(task, first, last);
}

}  // namespace

namespace kvern {
void (*const kAmxInt4)(const Product&, int64_t, int64_t) = multiply_int4;
}
