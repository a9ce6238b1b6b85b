// Products with packed weights, written once over an instruction set `V` (unnamed namespace: see scalars.h). V gives
//   reg                      16 FP32 sums, or what 16 rows of W are multiplied from
//   zero, load, store        of 16 FP32 numbers; mul_add(a, b, c) = a * b + c; add
//   dot(acc, w, x)           acc + w . x for one element x of a column (see Columns)
//   scales(const uint16_t*)  16 BF16 numbers as FP32; broadcast(float)
//   panels(columns)          panels at a time, 1 or 2, for so many columns, so that the sums stay in registers
//   columns                  most columns in a group
// and for each kind of weight a struct, on top of one below, with `depth` (columns of W in a tile); decode(tile, step, reg*), which gives
// `registers` a step in `steps` steps; `is_scaled`, `is_grouped` (a scale for each row and group); `factor` (what decoded
// numbers were divided by); `Decoded`, the kind that decoded tiles have.
#pragma once

#include <cstring>
#include <vector>

#include "packed.h"
#include "scalars.h"

namespace {

using kvern::Columns;
using kvern::kDepth;
using kvern::kLanes;
using kvern::kTileBytes;
using kvern::Output;
using kvern::Product;

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// The kinds of weights, whatever the instruction set.
struct F32Kind {
  static constexpr int64_t depth = 1;
  static constexpr bool is_scaled = false, is_grouped = false, is_decoded = false;
  static constexpr float factor = 1.0f;
};

struct Bf16Kind : F32Kind {
  static constexpr int64_t depth = 2;
};

struct E4m3Kind : F32Kind {
  static constexpr int64_t depth = 4;
  static constexpr bool is_scaled = true;
};

struct Int4Kind : F32Kind {
  static constexpr int64_t depth = 8;
  static constexpr bool is_scaled = true, is_grouped = true;
};

struct Int4TurnedKind : F32Kind {
  static constexpr int64_t depth = 8;
};

// Elements of x that a tile meets.
template <class K>
constexpr int kElements = K::steps * K::registers;

// Sums of P panels for M columns.
template <class V, int P, int M>
using Sums = typename V::reg[P][M];

template <class V, int P, int M>
[[gnu::always_inline]] inline void clear(Sums<V, P, M>& sums) {
  for (int p = 0; p < P; ++p) {
    for (int m = 0; m < M; ++m) sums[p][m] = V::zero();
  }
}

// Tiles are asked for before their turn, into L2 and then into L1: on some CPUs twice the bytes a second.
constexpr int64_t kAheadBytes = 4096, kNearBytes = 512;

// The tiles of P panels, `distance` bytes apart, and `stride` bytes from one tile to the next. They are part of a stream
// that is read up to `end` and goes on at `next`, where these are known.
struct Tiles {
  const uint8_t* first;
  int64_t distance, stride;
  const uint8_t *end = nullptr, *next = nullptr;

  const uint8_t* at(int64_t tile) const { return first + tile * stride; }
  const uint8_t* ahead(const uint8_t* tile) const {
    const uint8_t* there = tile + kAheadBytes;
    if (there < end || !end) return there;
    return next ? next + (there - end) : tile;
  }
};

// sums += `count` tiles of P panels times M columns.
template <class V, class K, int P, int M>
[[gnu::always_inline]] inline void accumulate_tiles(const Tiles& from, int64_t first, int64_t count, const uint32_t* x,
                                                    Sums<V, P, M>& sums) {
  const uint8_t* tiles = from.at(first);
  for (int64_t t = 0; t < count; ++t, tiles += from.stride) {
    if constexpr (!K::is_decoded) {
      for (int p = 0; p < P; ++p) {
        __builtin_prefetch(from.ahead(tiles + p * from.distance), 0, 2);
        __builtin_prefetch(tiles + p * from.distance + kNearBytes, 0, 3);
      }
    }
    for (int step = 0; step < K::steps; ++step, x += K::registers * M) {
      typename V::reg w[P][K::registers];
      for (int p = 0; p < P; ++p) K::decode(tiles + p * from.distance, step, w[p]);
      for (int u = 0; u < K::registers; ++u) {
        for (int m = 0; m < M; ++m) {
          for (int p = 0; p < P; ++p) sums[p][m] = V::dot(sums[p][m], w[p][u], x + u * M + m);
        }
      }
    }
  }
}

// Columns [begin, begin + count) of W of P panels, scaled, on top of totals[m * width + p].
template <class V, class K, int P, int M>
struct Panels {
  const kvern_packed& w;
  int64_t padded;   // columns of W in a panel
  int64_t first;    // panel

  int64_t group() const { return K::is_grouped ? w.group : kDepth; }

  typename V::reg scale(int p, int64_t group) const {
    if constexpr (K::is_grouped) {
      const int64_t groups = padded / w.group;
      return V::scales(static_cast<const uint16_t*>(w.scales) + ((first + p) * groups + group) * kLanes);
    } else {
      const int64_t groups = (padded + kDepth - 1) / kDepth;
      return V::broadcast(static_cast<const float*>(w.scales)[(first + p) * groups + group] * K::factor);
    }
  }

  // `tiles` begin with column `begin`, in the coding of D: K itself, or its decoded form.
  template <class D>
  [[gnu::always_inline]] void add(const Tiles& tiles, int64_t begin, int64_t count, const uint32_t* x, float* totals,
                                  int64_t width) const {
    if constexpr (!K::is_scaled) {
      Sums<V, P, M> sums;
      for (int p = 0; p < P; ++p) {
        for (int m = 0; m < M; ++m) sums[p][m] = V::load(totals + (m * width + p) * kLanes);
      }
      accumulate_tiles<V, D, P, M>(tiles, 0, count / D::depth, x, sums);
      for (int p = 0; p < P; ++p) {
        for (int m = 0; m < M; ++m) V::store(totals + (m * width + p) * kLanes, sums[p][m]);
      }
      return;
    }
    for (int64_t done = 0; done < count; done += group()) {
      const int64_t now = least(group(), count - done);
      Sums<V, P, M> sums;
      clear<V, P, M>(sums);
      accumulate_tiles<V, D, P, M>(tiles, done / D::depth, now / D::depth, x + done / D::depth * kElements<D> * M, sums);
      for (int p = 0; p < P; ++p) {
        const auto by = scale(p, (begin + done) / group());
        for (int m = 0; m < M; ++m) {
          float* total = totals + (m * width + p) * kLanes;
          V::store(total, V::mul_add(sums[p][m], by, V::load(total)));
        }
      }
    }
  }
};

// Writes the totals [columns, width, 16] of `count` panels to their rows of y.
template <class V>
void deliver(const Product& task, int64_t first, int64_t count, const float* totals, int64_t width, int64_t column,
             int64_t columns) {
  const Output& out = task.out;
  for (int64_t c = 0; c < columns; c += task.x.copies) {
    const int64_t row = (column + c) / task.x.copies;
    float* y = out.y + (out.place ? out.place[row] : row) * out.stride;
    for (int64_t p = 0; p < count; ++p) {
      const int64_t begin = (first + p) * kLanes, lanes = least(kLanes, task.w.n - begin);
      auto sum = V::load(totals + (c * width + p) * kLanes);
      if (task.x.copies == 2) sum = V::add(sum, V::load(totals + ((c + 1) * width + p) * kLanes));
      if (lanes == kLanes) {
        if (out.bias) sum = V::add(sum, V::load(out.bias + begin));
        if (out.adds) sum = V::add(sum, V::load(y + begin));
        V::store(y + begin, sum);
        continue;
      }
      alignas(64) float rest[kLanes];
      V::store(rest, sum);
      for (int64_t i = 0; i < lanes; ++i) {
        float value = rest[i] + (out.bias ? out.bias[begin + i] : 0.0f);
        if (out.adds) value += y[begin + i];
        y[begin + i] = value;
      }
    }
  }
}

// The tiles of `panel`, and of its partner beside them.
template <class K>
Tiles tiles_of(const kvern_packed& w, int64_t panel) {
  const auto place = kvern::place_of(panel, kvern::panels(w), kvern::padded_k(w) / K::depth * kTileBytes);
  return {static_cast<const uint8_t*>(w.tiles) + place.offset, kTileBytes, place.stride};
}

// The tiles of the panels from `panel` up to `last`, after which the thread reads what the task says.
template <class K>
Tiles stream_of(const Product& task, int64_t panel, int64_t last) {
  Tiles tiles = tiles_of<K>(task.w, panel);
  tiles.end = static_cast<const uint8_t*>(task.w.tiles) + last * (kvern::padded_k(task.w) / K::depth * kTileBytes);
  tiles.next = static_cast<const uint8_t*>(task.next);
  return tiles;
}

// All columns of x in one group: tiles are decoded straight into registers. `first` is even.
template <class V, class K, int P, int M>
void direct(const Product& task, int64_t first, int64_t last) {
  const int64_t padded = kvern::padded_k(task.w);
  for (; first + P <= last; first += P) {
    alignas(64) float totals[M * P * kLanes] = {};
    const Panels<V, K, P, M> panels{task.w, padded, first};
    panels.template add<K>(stream_of<K>(task, first, last), 0, padded, task.x.data, totals, P);
    deliver<V>(task, first, P, totals, P, 0, M);
  }
  if constexpr (P > 1) direct<V, K, 1, M>(task, first, last);
}

// Many columns: kDepth columns of some panels are decoded once, into L1, and multiplied with each group of x in turn.
template <class V, class K>
struct Tiled {
  static constexpr int kPanels = V::tiled_panels;
  using D = typename K::Decoded;
  const Product& task;
  float* totals;  // [columns, kPanels, 16]
  alignas(64) uint8_t decoded[kPanels][D::is_decoded ? kDepth / D::depth * kTileBytes : kTileBytes];

  static void decode_tile(const uint8_t* tile, uint8_t* to) {
    for (int step = 0; step < K::steps; ++step) {
      typename V::reg w[K::registers];
      K::decode(tile, step, w);
      for (int u = 0; u < K::registers; ++u) V::keep(to + (step * K::registers + u) * kTileBytes, w[u]);
    }
  }

  template <int P, int M>
  void add(int64_t first, int64_t begin, int64_t count, const Tiles& tiles, int64_t column) {
    const Columns& x = task.x;
    const Panels<V, K, P, M> panels{task.w, kvern::padded_k(task.w), first};
    const uint32_t* elements = x.data + column * x.elements + begin / D::depth * kElements<D> * M;
    panels.template add<D>(tiles, begin, count, elements, totals + column * kPanels * kLanes, kPanels);
  }

  template <int P, int M = V::columns>
  void group(int64_t columns, int64_t first, int64_t begin, int64_t count, const Tiles& tiles, int64_t column) {
    if constexpr (M > 1) {
      if (columns < M) return group<P, M - 1>(columns, first, begin, count, tiles, column);
    }
    add<P, M>(first, begin, count, tiles, column);
  }

  template <int P>
  void panels(int64_t first) {
    const int64_t padded = kvern::padded_k(task.w);
    const Tiles stored = tiles_of<K>(task.w, first);
    std::memset(totals, 0, static_cast<size_t>(task.x.count * kPanels * kLanes) * sizeof(float));
    for (int64_t begin = 0; begin < padded; begin += kDepth) {
      const int64_t count = least(kDepth, padded - begin);
      Tiles tiles{stored.at(begin / K::depth), stored.distance, stored.stride};
      if constexpr (D::is_decoded) {
        for (int p = 0; p < P; ++p) {
          for (int64_t t = 0; t < count / K::depth; ++t) {
            const uint8_t* tile = tiles.at(t) + p * tiles.distance;
            decode_tile(tile, decoded[p] + t * kElements<K> * kTileBytes);
            __builtin_prefetch(tile + kDepth / K::depth * tiles.stride, 0, 2);  // arrives while these are multiplied
          }
        }
        tiles = {decoded[0], sizeof decoded[0], kTileBytes};
      }
      for (int64_t column = 0; column < task.x.count; column += task.x.group) {
        group<P>(least(task.x.group, task.x.count - column), first, begin, count, tiles, column);
      }
    }
    deliver<V>(task, first, P, totals, kPanels, 0, task.x.count);
  }
};

template <class V, class K, int M = V::columns>
void multiply_direct(const Product& task, int64_t first, int64_t last) {
  if constexpr (M > 1) {
    if (task.x.count < M) return multiply_direct<V, K, M - 1>(task, first, last);
  }
  direct<V, K, V::panels(M), M>(task, first, last);
}

template <class V, class K>
void multiply(const Product& task, int64_t first, int64_t last) {
  if (task.x.count <= task.x.group) return multiply_direct<V, K>(task, first, last);
  static thread_local std::vector<float> memory;
  const auto numbers = static_cast<size_t>(task.x.count * V::tiled_panels * kLanes + kLanes);
  if (memory.size() < numbers) memory.resize(numbers);
  auto* aligned = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
  Tiled<V, K> tiled{task, aligned, {}};
  for (; first + V::tiled_panels <= last; first += V::tiled_panels) tiled.template panels<V::tiled_panels>(first);
  for (; first < last; ++first) tiled.template panels<1>(first);
}

// x times the scales of a group of rows of W, arranged as x is.
template <class V>
void scale_columns(const Columns& x, const uint16_t* scales, uint32_t* to) {
  const uint32_t* from = x.data;
  for (int64_t column = 0; column < x.count; column += x.group) {
    const int64_t count = least(x.group, x.count - column);
    for (int64_t e = 0; count == 1 && e < x.elements; e += kLanes) {
      const auto numbers = V::load(reinterpret_cast<const float*>(from + e));
      V::store(reinterpret_cast<float*>(to + e), V::mul_add(numbers, V::scales(scales + e), V::zero()));
    }
    for (int64_t e = 0; count > 1 && e < x.elements; ++e) {
      const float scale = float_of_bf16(scales[e]);
      for (int64_t c = e * count; c < (e + 1) * count; ++c) to[c] = bits_of_float(float_of_bits(from[c]) * scale);
    }
    from += count * x.elements;
    to += count * x.elements;
  }
}

// INT4_TURNED. Panels of one group of rows are multiplied with x that has their scales. `first` is even.
template <class V, class K>
void multiply_turned(const Product& task, int64_t first, int64_t last) {
  static thread_local std::vector<uint32_t> memory;
  const auto numbers = static_cast<size_t>(task.x.count * task.x.elements);
  if (memory.size() < numbers) memory.resize(numbers);
  Product part = task;
  part.x.data = memory.data();
  const int64_t step = task.w.group / kLanes, padded = kvern::padded_k(task.w);
  while (first < last) {
    const int64_t group = first / step, end = least(last, (group + 1) * step);
    scale_columns<V>(task.x, static_cast<const uint16_t*>(task.w.scales) + group * padded, memory.data());
    part.next = end < last ? static_cast<const uint8_t*>(task.w.tiles) + end * (padded / K::depth * kTileBytes) : task.next;
    multiply<V, K>(part, first, end);
    first = end;
  }
}

}  // namespace
