// What both forms of attention share: queries packed into lanes, and merged results scattered back.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "scalars.h"

namespace kvern {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline bool is_float(int dtype) { return dtype == KVERN_F32 || dtype == KVERN_BF16; }
inline float log2_scale(float scale) { return static_cast<float>(double{scale} * 1.4426950408889634); }

// Numbers of Attend::scratch: keys and values padded to kStep each; scores and weights.
inline int64_t attend_scratch(int64_t dim, int64_t rank) {
  return kDotRows * ((divide_up(dim, kStep) + divide_up(rank, kStep)) * kStep + 2 * kAttendLanes);
}

template <class T>
T* room(std::vector<T>& memory, int64_t numbers) {
  if (memory.size() < static_cast<size_t>(numbers)) memory.resize(static_cast<size_t>(numbers));
  return memory.data();
}

// The kernels for these dtypes and sizes, and how they want q and give sums.
struct Form {
  void (*attend)(const Attend&);
  void (*merge)(const Merge&);
  bool has_dots;  // q as attend_dots takes it
  bool by_lane;   // sums as attend_tiles gives them
  int64_t lanes;

  Form(const Kernels& kernels, int q_dtype, int rows_dtype, int64_t dim, int64_t rank)
      : attend(kernels.attend),
        merge(kernels.merge),
        has_dots(kernels.attend_dots && q_dtype == KVERN_BF16 && rows_dtype != KVERN_F32),
        by_lane(has_dots && kernels.attend_tiles && dim % kTileColumns == 0 && rank % kTileColumns == 0),
        lanes(kernels.lanes) {
    if (has_dots) attend = kernels.attend_dots;
    if (!by_lane) return;
    attend = kernels.attend_tiles;
    merge = kernels.merge_tiles;
  }

  int64_t q_size(int64_t dim) const { return (has_dots ? divide_up(dim, 2) : dim) * lanes; }  // 4-byte numbers a register
};

// Puts q[from, from + dim) into `lane` of the registers at `to` (see Attend::q), which hold zeros.
inline void pack_lane(const Form& form, const void* q, int dtype, int64_t from, int64_t dim, float* to, int64_t lane) {
  to += lane / form.lanes * form.q_size(dim) + lane % form.lanes;
  if (form.has_dots) {
    const uint16_t* numbers = static_cast<const uint16_t*>(q) + from;
    for (int64_t d = 0; d < dim; d += 2) {
      std::memcpy(to + d / 2 * form.lanes, numbers + d, d + 1 < dim ? 2 * sizeof *numbers : sizeof *numbers);
    }
  } else if (dtype == KVERN_BF16) {
    const uint16_t* numbers = static_cast<const uint16_t*>(q) + from;
    for (int64_t d = 0; d < dim; ++d) to[d * form.lanes] = float_of_bf16(numbers[d]);
  } else {
    const float* numbers = static_cast<const float*>(q) + from;
    for (int64_t d = 0; d < dim; ++d) to[d * form.lanes] = numbers[d];
  }
}

// out[index + r] = the merged result of `lane` for r in [0, count)
inline void scatter_lane(const Form& form, void* out, int dtype, int64_t index, const float* merged, int64_t lane, int64_t count) {
  const int64_t step = form.by_lane ? 1 : form.lanes;
  merged += form.by_lane ? lane * count : lane;
  if (dtype == KVERN_BF16) {
    uint16_t* to = static_cast<uint16_t*>(out) + index;
    for (int64_t r = 0; r < count; ++r) to[r] = bf16_of_float(merged[r * step]);
  } else {
    float* to = static_cast<float*>(out) + index;
    for (int64_t r = 0; r < count; ++r) to[r] = merged[r * step];
  }
}

}  // namespace kvern
