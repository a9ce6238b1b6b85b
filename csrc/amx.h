// AMX tiles: their shapes for as long as a kernel runs, and sums of tile products. A tile has up to 16 rows of 64 bytes.
//     c[m][n] += sum_k a[m][2k] b[k][n][0]  +  sum_k a[m][2k + 1] b[k][n][1]      for BF16 a and b and FP32 c,
// each of the two sums in order and from zero, so that a row of c comes from its row of a and from all of b alone.
// Subnormal numbers count as zeros. (The tile instructions of GCC 12 name their tiles in text: hence no loops over tiles.)
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvern {

constexpr int64_t kSpan = 32;  // columns of W in a tile, of which 16 are even
constexpr int kMostSums = 4;  // tiles 0 to 3 hold sums, 4 the operand that all share, 5 to 7 the others

// Tiles 0 to 4 with `rows` rows, the others with 16. Released at the end, so that a waiting thread has no tiles to save.
class TileRows {
 public:
  explicit TileRows(int rows) {
    Shapes shapes{};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.bytes[i] = 64;
      shapes.rows[i] = static_cast<uint8_t>(i < 5 ? rows : 16);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));  // GCC 12's _tile_loadconfig reads 8 of these 64 bytes
  }
  ~TileRows() { _tile_release(); }
  TileRows(const TileRows&) = delete;
  TileRows& operator=(const TileRows&) = delete;

 private:
  struct alignas(64) Shapes {  // as ldtilecfg reads it
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
};

// What was stored so far is in memory: GCC 12's tile loads do not say that they read any.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// P tiles `step` bytes apart, their rows `stride` bytes apart.
template <int P>
inline void clear_sums() {
  _tile_zero(0);
  if constexpr (P > 1) _tile_zero(1);
  if constexpr (P > 2) _tile_zero(2);
  if constexpr (P > 3) _tile_zero(3);
}

template <int P>
inline void load_sums(const float* from, int64_t step, int64_t stride) {
  const auto* base = reinterpret_cast<const uint8_t*>(from);
  _tile_loadd(0, base, stride);
  if constexpr (P > 1) _tile_loadd(1, base + step, stride);
  if constexpr (P > 2) _tile_loadd(2, base + 2 * step, stride);
  if constexpr (P > 3) _tile_loadd(3, base + 3 * step, stride);
}

template <int P>
inline void store_sums(float* to, int64_t step, int64_t stride) {
  auto* base = reinterpret_cast<uint8_t*>(to);
  _tile_stored(0, base, stride);
  if constexpr (P > 1) _tile_stored(1, base + step, stride);
  if constexpr (P > 2) _tile_stored(2, base + 2 * step, stride);
  if constexpr (P > 3) _tile_stored(3, base + 3 * step, stride);
}

// sums[p] += a b[p]
template <int P>
inline void add_products(const void* a, int64_t a_stride, const void* const (&b)[kMostSums], int64_t b_stride) {
  _tile_loadd(4, a, a_stride);
  _tile_loadd(5, b[0], b_stride);
  if constexpr (P > 1) _tile_loadd(6, b[1], b_stride);
  if constexpr (P > 2) _tile_loadd(7, b[2], b_stride);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (P > 3) _tile_loadd(5, b[3], b_stride);
  if constexpr (P > 1) _tile_dpbf16ps(1, 4, 6);
  if constexpr (P > 2) _tile_dpbf16ps(2, 4, 7);
  if constexpr (P > 3) _tile_dpbf16ps(3, 4, 5);
}

// sums[p] += a[p] b, all tiles with 16 rows
template <int P>
inline void add_products_with(const void* b, const void* const (&a)[kMostSums], const int64_t (&a_stride)[kMostSums]) {
  _tile_loadd(4, b, 64);
  _tile_loadd(5, a[0], a_stride[0]);
  if constexpr (P > 1) _tile_loadd(6, a[1], a_stride[1]);
  if constexpr (P > 2) _tile_loadd(7, a[2], a_stride[2]);
  _tile_dpbf16ps(0, 5, 4);
  if constexpr (P > 3) _tile_loadd(5, a[3], a_stride[3]);
  if constexpr (P > 1) _tile_dpbf16ps(1, 6, 4);
  if constexpr (P > 2) _tile_dpbf16ps(2, 7, 4);
  if constexpr (P > 3) _tile_dpbf16ps(3, 5, 4);
}

}  // namespace kvern
