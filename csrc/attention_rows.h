// Where the keys and values of a context lie; shared by the kernels of every instruction set. In an unnamed namespace:
// see scalars.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace {

inline int64_t padded(int64_t size) { return (size + kvern::kStep - 1) / kvern::kStep * kvern::kStep; }

// Whether the values are the first numbers of the key.
inline bool are_shared(const kvern::Context& context) { return context.value_at < context.nope; }

template <class T>
inline const T* row_at(const kvern::Context& context, int64_t row) {
  if (context.table) row = context.table[row / context.block_size] * context.block_size + row % context.block_size;
  return static_cast<const T*>(context.data) + row * context.stride;
}

// The key of a row as one stretch: where it lies, or put together in `room`.
template <class T>
inline const T* key_of(const kvern::Context& context, int64_t row, T* room) {
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
