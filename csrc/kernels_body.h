// The kernels themselves, written once over an instruction set `V` that the including file defines (unnamed namespace:
// see scalars.h). V gives
//   width                           numbers in a register
//   direct_rows                     rows of W at a time in `multiply_rows` with 2 to 4 rows of x
//   decodes_tiles                   whether E4M3 is decoded into a tile before more than kDirect rows of x use it
//   tile_rows, tile_columns         the part of y that stays in registers in `multiply_tile`
//   sums, head_vecs                 registers of sums, and of heads, in `attend`
//   reg, zero, load, store, set1, add, sub, mul, divide, fma(a, b, c) = a * b + c, sum(a), max(a, b) (b where one is a NaN)
//   exp2(a)                         for a <= 0, relative error under 1e-6; NaN of NaN
//   keep(limit, at, a, b)           a in the lanes where limit > at, else b
//   decode(const T*, reg*)          kVecs registers of FP32 from kSmall<V> stored numbers, exactly; T = float, uint16_t
//                                   (BF16), uint8_t (E4M3)
//   Watch, decode_watched, saw_nan  the same for E4M3 where cheaper: numbers come out divided by `Watch::factor`, and
//                                   instead of making a NaN the watch remembers that the row has one
//   store_bf16(uint16_t*, reg)      width numbers, round to nearest even
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels.h"
#include "scalars.h"

namespace {

using kvern::Dequantize;
using kvern::kBlock;
using kvern::kDirect;
using kvern::kStep;
using kvern::Linear;

constexpr int64_t kLine = 64;      // bytes of a cache line
constexpr int kVecs = 4;           // registers filled by one decode step
constexpr int64_t kTile = 1024;    // columns of W decoded at a time when several rows of x use them (fits L1)
constexpr int64_t kTileRows = 32;  // rows of x that share one decoded tile; a multiple of every tile_columns
constexpr int64_t kHeld = 4;       // rows of W that are used by all groups of x before the next are

template <class V>
constexpr int64_t kSmall = kVecs * V::width;

template <class T>
constexpr bool kScaled = sizeof(T) == 1;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// 2^f on [-0.5, 0.5] to 2e-9, fitted by relative error.
constexpr float kExp2[] = {1.0f,          0.693147182f,   0.240226462f,  0.0555032864f,
                           0.00961848907f, 0.00133999309f, 0.000153457993f};

template <class V>
inline typename V::reg exp2_of_fraction(typename V::reg f) {
  auto value = V::set1(kExp2[6]);
  for (int i = 5; i >= 0; --i) value = V::fma(value, f, V::set1(kExp2[i]));
  return value;
}

// Where column `at`, a multiple of kSmall, of the first row of a group of `rows` rows of x begins (see Linear::x).
inline const float* x_at(const float* group, int64_t rows, int64_t at) {
  const auto column = static_cast<uint64_t>(at);
  return group + column / kStep * static_cast<uint64_t>(rows * kStep) + column % kStep;
}

// Decodes `count` < kSmall stored numbers; the rest of the registers are zeros. Nothing past the row is read.
template <class V, class T>
inline void decode_rest(const T* stored, int64_t count, typename V::reg* out) {
  T padded[kSmall<V>] = {};
  std::memcpy(padded, stored, static_cast<size_t>(count) * sizeof(T));
  V::decode(padded, out);
}

// Asks for the bytes that the next group of rows has at this place. The hardware follows one stream a page well, and
// short rows put R of them into a page: without this, FP8 ran at half the speed. Into L2, since L1 is too small; an
// address past the weights is never read, only hinted.
template <class V, class T>
[[gnu::always_inline]] inline void fetch_ahead(const T* stored, int64_t distance) {
  const auto next = reinterpret_cast<uintptr_t>(stored) + static_cast<uintptr_t>(distance) * sizeof(T);
  for (uintptr_t line = 0; line < kSmall<V> * sizeof(T); line += kLine) {
    __builtin_prefetch(reinterpret_cast<const void*>(next + line), 0, 2);
  }
}

// acc[r][m] += W[r, begin:end] . x[m, begin:end]; end - begin is a multiple of kStep. Always inlined and without a tail,
// so that the sums stay in registers from the first column to the last.
template <class V, class T, int R, int M>
[[gnu::always_inline]] inline void accumulate(const T* const (&rows)[R], int64_t stride, const float* x, int64_t begin,
                                              int64_t end, typename V::reg (&acc)[R][M],
                                              typename V::Watch (&watch)[R]) {
  const float* columns = x + begin * M;
  for (int64_t at = begin; at < end; at += kStep, columns += M * kStep) {
#pragma GCC unroll 2
    for (int64_t part = 0; part < kStep; part += kSmall<V>) {
      for (int r = 0; r < R; ++r) {
        const T* stored = rows[r] + at + part;
        fetch_ahead<V>(stored, R * stride);
        typename V::reg w[kVecs];
        if constexpr (kScaled<T>) {
          V::decode_watched(stored, w, watch[r]);
        } else {
          V::decode(stored, w);
        }
        for (int m = 0; m < M; ++m) {
          for (int v = 0; v < kVecs; ++v) {
            acc[r][m] = V::fma(w[v], V::load(columns + m * kStep + part + v * V::width), acc[r][m]);
          }
        }
      }
    }
  }
}

// W[row, begin:k] . x, the columns after the last full step or scale block; x is a row in a group of `rows`.
template <class V, class T>
[[gnu::noinline]] float rest_of_row(const Linear& task, int64_t row, const float* x, int64_t rows, int64_t begin) {
  const T* stored = static_cast<const T*>(task.weight) + row * task.weight_stride;
  auto total = V::zero();
  for (int64_t at = begin; at < task.k; at += kSmall<V>) {
    typename V::reg w[kVecs];
    if (at + kSmall<V> <= task.k) {
      V::decode(stored + at, w);
    } else {
      decode_rest<V>(stored + at, task.k - at, w);
    }
    for (int v = 0; v < kVecs; ++v) total = V::fma(w[v], V::load(x_at(x, rows, at) + v * V::width), total);
  }
  const float scale = kScaled<T> ? task.scale[row / kBlock * task.scale_stride + begin / kBlock] : 1.0f;
  return V::sum(total) * scale;
}

inline float bias_of(const Linear& task, int64_t column) {
  return task.bias ? read_scalar(task.bias, task.bias_dtype, column) : 0.0f;
}

template <class V, int R, int M>
[[gnu::always_inline]] inline void clear(typename V::reg (&sums)[R][M]) {
  for (auto& line : sums) {
    for (auto& one : line) one = V::zero();
  }
}

// R rows of W from `row` on against M rows of x from `first` on (a group), everything in registers. R streams in flight
// hide the memory latency, and R * M independent sums the latency of the FMA. The R rows lie in one scale block.
template <class V, class T, int R, int M>
void multiply_rows(const Linear& task, int64_t row, int64_t first) {
  constexpr int64_t kUnit = kScaled<T> ? kBlock : kStep;
  const int64_t full = task.k / kUnit * kUnit;
  const float* x = task.x + first * task.x_stride;
  const T* rows[R];
  for (int r = 0; r < R; ++r) rows[r] = static_cast<const T*>(task.weight) + (row + r) * task.weight_stride;
  typename V::Watch watch[R];
  typename V::reg total[R][M];
  clear<V>(total);
  if constexpr (kScaled<T>) {
    const float* scale = task.scale + row / kBlock * task.scale_stride;
    for (int64_t k = 0; k < full; k += kBlock) {
      typename V::reg part[R][M];
      clear<V>(part);
      accumulate<V>(rows, task.weight_stride, x, k, k + kBlock, part, watch);
      const auto factor = V::set1(scale[k / kBlock] * V::Watch::factor);
      for (int r = 0; r < R; ++r) {
        for (int m = 0; m < M; ++m) total[r][m] = V::fma(part[r][m], factor, total[r][m]);
      }
    }
  } else {
    accumulate<V>(rows, task.weight_stride, x, 0, full, total, watch);
  }
  for (int r = 0; r < R; ++r) {
    const float bias = V::saw_nan(watch[r]) ? std::numeric_limits<float>::quiet_NaN() : bias_of(task, row + r);
    for (int m = 0; m < M; ++m) {
      float y = V::sum(total[r][m]) + bias;
      if (full < task.k) y += rest_of_row<V, T>(task, row + r, x + m * kStep, M, full);
      write_scalar(task.y, task.y_dtype, (first + m) * task.n + row + r, y);
    }
  }
}

// One group of x, of up to M rows, against the rows [begin, end) of W.
template <class V, class T, int M = kDirect>
void multiply_group(const Linear& task, int64_t begin, int64_t end, int64_t first, int64_t size) {
  if constexpr (M > 1) {
    if (size < M) return multiply_group<V, T, M - 1>(task, begin, end, first, size);
  }
  constexpr int R = M == 1 ? 4 : V::direct_rows;
  int64_t row = begin;
  // begin is a multiple of R, and R divides kBlock
  for (; row + R <= end; row += R) multiply_rows<V, T, R, M>(task, row, first);
  for (; row < end; ++row) multiply_rows<V, T, 1, M>(task, row, first);
}

// Group by group; a few rows of W stay in the inner caches until all groups have used them.
template <class V, class T>
void multiply_direct(const Linear& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; row += kHeld) {
    for (int64_t first = 0; first < task.m; first += kDirect) {
      multiply_group<V, T>(task, row, smaller(row + kHeld, end), first, smaller(kDirect, task.m - first));
    }
  }
}

// W[row, k : end] as FP32, scaled; zeros up to the next full step.
template <class V, class T>
void decode_tile(const Linear& task, int64_t row, int64_t k, int64_t end, float* tile) {
  const T* stored = static_cast<const T*>(task.weight) + row * task.weight_stride;
  typename V::reg w[kVecs];
  for (int64_t at = k; at < end; at += kSmall<V>) {
    fetch_ahead<V>(stored + at, V::tile_rows * task.weight_stride);
    if (at + kSmall<V> <= end) {
      V::decode(stored + at, w);
    } else {
      decode_rest<V>(stored + at, end - at, w);
    }
    if constexpr (kScaled<T>) {
      const auto factor = V::set1(task.scale[row / kBlock * task.scale_stride + at / kBlock]);
      for (auto& one : w) one = V::mul(one, factor);
    }
    for (int v = 0; v < kVecs; ++v) V::store(tile + at - k + v * V::width, w[v]);
  }
}

// sums[m][r] += tile[r] . x[m] over `size` columns (a multiple of kSmall), R x M sums in registers; x is a group of M.
template <class V, int R, int M>
void multiply_tile(const float* tile, const float* x, int64_t size, float (*sums)[R]) {
  typename V::reg acc[R][M];
  clear<V>(acc);
  for (int64_t at = 0; at < size; at += kSmall<V>) {
    const float* columns = x_at(x, M, at);
    for (int v = 0; v < kVecs; ++v) {
      typename V::reg w[R];
      for (int r = 0; r < R; ++r) w[r] = V::load(tile + r * kTile + at + v * V::width);
      for (int m = 0; m < M; ++m) {
        const auto column = V::load(columns + m * kStep + v * V::width);
        for (int r = 0; r < R; ++r) acc[r][m] = V::fma(w[r], column, acc[r][m]);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    for (int r = 0; r < R; ++r) sums[m][r] += V::sum(acc[r][m]);
  }
}

template <class V, int R, int M = V::tile_columns>
inline void multiply_tile_group(const float* tile, const float* x, int64_t rows, int64_t k, int64_t size,
                                float (*sums)[R]) {
  if constexpr (M > 1) {
    if (rows < M) return multiply_tile_group<V, R, M - 1>(tile, x, rows, k, size, sums);
  }
  multiply_tile<V, R, M>(tile, x_at(x, M, k), size, sums);
}

// Where decoding costs more than a few instructions: a tile of W is decoded once, into L1, and used by up to kTileRows
// rows of x.
template <class V, class T>
void multiply_decoded(const Linear& task, int64_t begin, int64_t end) {
  constexpr int R = V::tile_rows;
  constexpr int M = V::tile_columns;
  static_assert(kTileRows % M == 0);
  alignas(64) float tile[R * kTile] = {};
  for (int64_t first_m = 0; first_m < task.m; first_m += kTileRows) {
    const int64_t ms = smaller(kTileRows, task.m - first_m);
    for (int64_t row = begin; row < end; row += R) {
      const int64_t rows = smaller(R, end - row);
      float sums[kTileRows][R] = {};
      for (int64_t k = 0; k < task.k; k += kTile) {
        const int64_t stop = smaller(k + kTile, task.k);
        const int64_t size = (stop - k + kSmall<V> - 1) / kSmall<V> * kSmall<V>;
        for (int64_t r = 0; r < rows; ++r) decode_tile<V, T>(task, row + r, k, stop, tile + r * kTile);
        for (int64_t m = 0; m < ms; m += M) {
          const float* x = task.x + (first_m + m) * task.x_stride;
          multiply_tile_group<V, R>(tile, x, smaller(M, ms - m), k, size, sums + m);
        }
      }
      for (int64_t m = 0; m < ms; ++m) {
        for (int64_t r = 0; r < rows; ++r) {
          write_scalar(task.y, task.y_dtype, (first_m + m) * task.n + row + r, sums[m][r] + bias_of(task, row + r));
        }
      }
    }
  }
}

template <class V, class T>
void linear(const Linear& task, int64_t begin, int64_t end) {
  if (task.m <= kDirect || !kScaled<T> || !V::decodes_tiles) return multiply_direct<V, T>(task, begin, end);
  multiply_decoded<V, T>(task, begin, end);
}

template <class V>
void dequantize_row(const Dequantize& task, int64_t row) {
  const uint8_t* stored = task.weight + row * task.weight_stride;
  const float* scale = task.scale + row / kBlock * task.scale_stride;
  float* out32 = static_cast<float*>(task.out) + row * task.k;
  uint16_t* out16 = static_cast<uint16_t*>(task.out) + row * task.k;
  typename V::reg w[kVecs];
  int64_t at = 0;
  for (; at + kSmall<V> <= task.k; at += kSmall<V>) {
    V::decode(stored + at, w);
    const auto factor = V::set1(scale[at / kBlock]);
    for (int v = 0; v < kVecs; ++v) {
      const auto value = V::mul(w[v], factor);
      if (task.out_dtype == KVERN_BF16) {
        V::store_bf16(out16 + at + v * V::width, value);
      } else {
        V::store(out32 + at + v * V::width, value);
      }
    }
  }
  for (; at < task.k; ++at) {
    write_scalar(task.out, task.out_dtype, row * task.k + at, float_of_e4m3(stored[at]) * scale[at / kBlock]);
  }
}

template <class V>
void dequantize(const Dequantize& task, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) dequantize_row<V>(task, row);
}

}  // namespace

#include "attention_body.h"

namespace {

template <class V>
constexpr kvern::Kernels kernels(const char* name) {
  return {name,
          V::width,
          {kDirect, kDirect, V::decodes_tiles ? V::tile_columns : kDirect},
          {linear<V, float>, linear<V, uint16_t>, linear<V, uint8_t>},
          dequantize<V>,
          attend<V>,
          nullptr,
          merge<V>,
          nullptr,
          nullptr};
}

}  // namespace
