// Where the keys and values of a context lie; shared by the kernels of every instruction set. Included behind the loops
// of kernels_body.h, whose instruction set `V` decodes records. In an unnamed namespace: see scalars.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "latent8.h"

namespace {

inline int64_t padded(int64_t size) { return (size + kvern::kStep - 1) / kvern::kStep * kvern::kStep; }

// Whether the values are the first numbers of the key.
inline bool are_shared(const kvern::Context& context) { return context.value_at < context.nope; }

inline const uint8_t* stored_at(const kvern::Context& context, int64_t row) {
  if (context.table) row = context.table[row / context.block_size] * context.block_size + row % context.block_size;
  return static_cast<const uint8_t*>(context.data) + row * context.stride * row_element_bytes(context.dtype);
}

template <class T>
inline const T* row_at(const kvern::Context& context, int64_t row) {
  return reinterpret_cast<const T*>(stored_at(context, row));
}

// Asks for what is stored of a row's key and value, into L2.
inline void fetch_row(const kvern::Context& context, int64_t row, int64_t dim, int64_t rank) {
  const int64_t elements = are_shared(context) ? row_elements(context.dtype, rank, dim - rank) : dim + rank;
  const uint8_t* stored = stored_at(context, row);
  for (int64_t at = 0; at < elements * row_element_bytes(context.dtype); at += kLine) __builtin_prefetch(stored + at, 0, 2);
}

inline int64_t key_room(int64_t dim) { return padded(dim) + kvern::kStep; }

template <class V>
inline void store_all(const typename V::reg (&numbers)[kVecs], float* to) {
  for (int v = 0; v < kVecs; ++v) V::store(to + v * V::width, numbers[v]);
}

template <class V>
inline void store_all(const typename V::reg (&numbers)[kVecs], uint16_t* to) {
  for (int v = 0; v < kVecs; ++v) V::store_bf16(to + v * V::width, numbers[v]);
}

// A record as numbers of T, float or BF16: code * scale, rounded once. `out` has key_room(rank + rope) numbers, since whole
// registers are written.
template <class V, class T>
inline void decode_record(const uint8_t* record, int64_t rank, int64_t rope, T* out) {
  typename V::reg numbers[kVecs];
  for (int64_t d = 0; d < rank; d += kSmall<V>) {
    if (d + kSmall<V> <= rank) {
      V::decode(record + d, numbers);
    } else {
      decode_rest<V>(record + d, rank - d, numbers);
    }
    const auto scale = V::set1(latent_scale(record, rank, d / kLatentBlock));
    for (auto& one : numbers) one = V::mul(one, scale);
    store_all<V>(numbers, out + d);
  }
  const uint8_t* turned = record + rope_at(rank);
  if constexpr (sizeof(T) == 2) {
    std::memcpy(out + rank, turned, static_cast<size_t>(rope) * sizeof(T));
  } else {
    for (int64_t d = 0; d < rope; d += kSmall<V>) {
      uint16_t some[kSmall<V>] = {};
      std::memcpy(some, turned + 2 * d, static_cast<size_t>(smaller(kSmall<V>, rope - d)) * sizeof *some);
      V::decode(some, numbers);
      store_all<V>(numbers, out + rank + d);
    }
  }
}

// The key of a row as one stretch of T, which is float or BF16 (uint16_t): where it lies, or put together or decoded in
// `room`, which has key_room(dim) numbers.
template <class V, class T>
inline const T* key_of(const kvern::Context& context, int64_t row, T* room) {
  if (context.dtype == KVERN_LATENT8) {
    decode_record<V>(stored_at(context, row), context.rank, context.nope - context.rank, room);
    return room;
  }
  const T* first = row_at<T>(context, row);
  if (context.rope_size == 0) return first;
  const T* second = static_cast<const T*>(context.rope) + row * context.rope_stride;
  std::memcpy(room, first, static_cast<size_t>(context.nope) * sizeof(T));
  std::memcpy(room + context.nope, second, static_cast<size_t>(context.rope_size) * sizeof(T));
  return room;
}

// What the lanes of some registers have to do with the rows [first, first + count): only `count` of them are seen by
// anybody, and `is_ragged` tells whether some lane sees fewer.
struct Sight {
  int64_t count;
  bool is_ragged;
};

inline Sight sight_of(const int64_t* seen, int64_t lanes, int64_t first, int64_t count) {
  int64_t least = seen[0], most = seen[0];
  for (int64_t lane = 1; lane < lanes; ++lane) {
    least = seen[lane] < least ? seen[lane] : least;
    most = seen[lane] > most ? seen[lane] : most;
  }
  const int64_t here = most - first < count ? most - first : count;
  return {here > 0 ? here : 0, least - first < here};
}

// How many of `count` rows from `first` on each lane sees.
inline void limits_of(const int64_t* seen, int64_t lanes, int64_t first, int64_t count, float* limits) {
  for (int64_t lane = 0; lane < lanes; ++lane) {
    const int64_t here = seen[lane] - first;
    limits[lane] = static_cast<float>(here < 0 ? 0 : here < count ? here : count);
  }
}

}  // namespace
