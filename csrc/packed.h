// Weights packed into tiles, and products with them.
//
// A panel holds 16 rows of W side by side, so that a register has one number of each and no sum ever crosses lanes. A
// tile is 64 bytes of a panel, 16 rows by as many columns as fit (16 x 4 for E4M3, 16 x 2 for BF16, 16 x 1 for FP32,
// 16 x 8 for 4 bits). Panels lie in pairs, tile by tile in turn, and the pairs follow each other: a product reads one
// stream, and has two independent sums to add to even with a single row of x. A last panel without a partner lies alone.
//
// Where there are BF16 pairs, a 4-bit tile has a word of 32 bits for each row: the even columns in its lower half, the odd
// ones in its upper half. Shifted by 0, 4, 8 or 12 bits, the lowest bits of both halves are a pair.
//
// Where scales belong to columns of 16 rows or more (INT4_TURNED) a tile's word holds eight columns in their order, and the
// scales are multiplied into x, in FP32: exactly, where x is rounded to BF16.
//
// y[m] = sum over groups g of columns of scale[g] * (sum over k in g, in order, of W[:, k] x[m, k]) is summed in the same
// order in every form of the kernels, so a row of y depends on its row of x alone, bit for bit: not on how many rows
// are multiplied together, nor on the threads.
#pragma once

#include <cstdint>

#include "kvern.h"
#include "kvern_layer.h"

namespace kvern {

constexpr int64_t kLanes = 16;    // rows of W in a panel
constexpr int64_t kTileBytes = 64;
constexpr int64_t kDepth = 128;   // columns that share an FP8 scale, and that are decoded together
constexpr int64_t kPadding = 32;  // K is padded with zeros to a multiple of this: whole tiles and whole 4-bit groups
constexpr int kKinds = 5;

inline int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// Rows of x, rounded and arranged for the kernels: in groups of `group` columns (the last may have fewer), element e of
// column c of a group of C columns lies at e * C + c. An element is 32 bits: two BF16 numbers, or one FP32. For tiles all
// groups have room for `group` columns, and element e of column c lies at (e / 16 * group + c) * 16 + e % 16.
// With two `copies` a row of x is two columns, its BF16 rounding and the rounding of what that left over: together
// 16 bits of mantissa.
struct Columns {
  const uint32_t* data;
  int64_t count, group, elements;
  int copies;
};

// Where a product goes: row r of y at y + (place ? place[r] : r) * stride, n numbers of it.
struct Output {
  float* y;
  int64_t stride;
  const int32_t* place;
  const float* bias;
  bool adds;
};

struct Product {
  const kvern_packed& w;
  Columns x;
  Output out;
  const void* next = nullptr;  // tiles that the thread is going to read afterwards, where that is known
};

// How elements of x look and lie for a kind of weight: FP32, pairs of BF16, or these sixteen to a column (tiles).
enum class Order { kPairs, kSingles, kTiles };

constexpr int64_t kTileElements = 16;

// Loops over one row, from rows_body.h, where they are described.
struct RowKernels {
  void (*norm)(const float* x, const float* weight, float eps, int64_t size, float* out);
  void (*gate)(float* gate, const float* up, int64_t size, float weight);
  void (*round)(const float* x, int64_t size, uint16_t* out);
  void (*encode)(const float* x, int64_t rank, int64_t rope, uint8_t* record);
  void (*decode)(const uint8_t* record, int64_t rank, int64_t rope, float* out);
  void (*arrange_pairs)(const float* x, int64_t size, int64_t elements, int copies, int64_t stride, uint32_t* out);
  // For Order::kTiles, nullptr where there are none: sixteen elements to each of `columns` columns, and so on.
  void (*arrange_tiles)(const float* x, int64_t size, int64_t elements, int copies, int64_t columns, uint32_t* out);
  void (*arrange_singles)(const float* x, int64_t size, int64_t elements, bool rounds, int64_t stride, uint32_t* out);
};

struct PackedKernels {
  RowKernels rows;
  Order order[kKinds];
  int64_t group[kKinds];  // most columns in a group
  void (*multiply[kKinds])(const Product&, int64_t first_panel, int64_t last_panel);
};

const PackedKernels& packed_kernels();

extern const PackedKernels kScalarPacked;
extern const PackedKernels kAvx2Packed;
extern const PackedKernels kAvx512Packed;
extern const PackedKernels kAvx512Bf16Packed;

// What AMX does otherwise than kAvx512Bf16Packed: for BF16, FP8 and 4-bit weights.
struct TileKernels {
  int64_t group;
  void (*arrange)(const float* x, int64_t size, int64_t elements, int copies, int64_t columns, uint32_t* out);
  void (*bf16)(const Product&, int64_t first_panel, int64_t last_panel);
  void (*e4m3)(const Product&, int64_t first_panel, int64_t last_panel);
};
extern const TileKernels kAmxPacked;
extern void (*const kAmxInt4)(const Product&, int64_t first_panel, int64_t last_panel);  // takes what kAmxPacked takes

// Where the tiles of a panel lie: the first, and how many bytes further the next.
struct Place {
  int64_t offset, stride;
};

inline Place place_of(int64_t panel, int64_t panels, int64_t panel_bytes) {
  if (panel % 2 == 0 && panel + 1 == panels) return {panel * panel_bytes, kTileBytes};
  return {panel / 2 * 2 * panel_bytes + panel % 2 * kTileBytes, 2 * kTileBytes};
}

inline int64_t padded_k(const kvern_packed& w) { return round_up(w.k, kPadding); }
inline int64_t panels(const kvern_packed& w) { return (w.n + kLanes - 1) / kLanes; }

}  // namespace kvern
