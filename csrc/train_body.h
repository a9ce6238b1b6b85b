// The loops of train.h, plain enough for the compiler to vectorise for the including file's instruction set: these files
// may reorder sums (-fassociative-math). In an unnamed namespace: see scalars.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "train.h"

namespace {

using namespace kvern;

using Bf16 = uint16_t;

inline float get(float value) { return value; }
inline float get(Bf16 value) {
  const uint32_t bits = uint32_t{value} << 16;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline void put(float& to, float value) { to = value; }
inline void put(Bf16& to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  to = static_cast<Bf16>((bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16 | 0x40) : rounded);
}

// e^x to 2e-7 relative within -87 .. 88, beyond them as at the ends; NaN for NaN. 2^n by its exponent bits, a polynomial for
// the rest of x log2(e).
inline float exponential(float x) {
  const float low = x < -87.0f ? -87.0f : x;
  const float in_range = low > 88.0f ? 88.0f : low;
  const float whole = std::nearbyint(in_range * 1.44269504f);
  const float f = (in_range - whole * 0.693145752f) - whole * 1.42860677e-6f;
  float value = 1.98756912e-4f;
  value = value * f + 1.39819994e-3f;
  value = value * f + 8.33345205e-3f;
  value = value * f + 4.16657962e-2f;
  value = value * f + 1.66666657e-1f;
  value = value * f + 5.00000012e-1f;
  value = value * f * f + f + 1.0f;
  const int32_t power = (static_cast<int32_t>(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &power, sizeof scale);
  return value * scale;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// As integers, floats are ordered with this; it is its own inverse. Compilers vectorise the largest of integers, and of
// floats only where there is no NaN. NaN counts as larger than infinity, or smaller than its negative, by its sign bit.
inline int32_t ordered(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits ^ (bits >> 31 & 0x7fffffff);
}

inline float unordered(int32_t order) {
  const int32_t bits = order ^ (order >> 31 & 0x7fffffff);
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
void norm(const NormTask& task, int64_t begin, int64_t end) {
  const int64_t size = task.size;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(task.x) + r * task.x_stride;
    T* out = static_cast<T*>(task.out) + r * size;
    float sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += get(x[i]) * get(x[i]);
    const float inverse = 1.0f / std::sqrt(sum / static_cast<float>(size) + task.eps);
    task.inverse[r] = inverse;
    for (int64_t i = 0; i < size; ++i) put(out[i], get(x[i]) * inverse * task.weight[i]);
  }
}

// dx = inverse (w dy - x inverse^2 mean(w dy x)),   dw += dy x inverse
template <class T>
void norm_back(const NormTask& task, int64_t begin, int64_t end) {
  const int64_t size = task.size;
  for (int64_t r = begin; r < end; ++r) {
    const T* x = static_cast<const T*>(task.x) + r * task.x_stride;
    const T* dy = static_cast<const T*>(task.dy) + r * size;
    T* out = static_cast<T*>(task.out) + r * size;
    const float inverse = task.inverse[r];
    float sum = 0;
    for (int64_t i = 0; i < size; ++i) sum += get(dy[i]) * task.weight[i] * get(x[i]);
    const float back = sum * inverse * inverse / static_cast<float>(size);
    for (int64_t i = 0; i < size; ++i) {
      const float number = get(x[i]), above = get(dy[i]);
      task.dw[i] += above * number * inverse;
      put(out[i], inverse * (above * task.weight[i] - number * back));
    }
  }
}

template <class T>
void glu(const GluTask& task, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(task.gate) + r * task.stride;
    const T* up = static_cast<const T*>(task.up) + r * task.stride;
    T* out = static_cast<T*>(task.out) + r * task.size;
    for (int64_t i = 0; i < task.size; ++i) put(out[i], get(gate[i]) * sigmoid(get(gate[i])) * get(up[i]));
  }
}

template <class T>
void glu_back(const GluTask& task, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    const T* gate = static_cast<const T*>(task.gate) + r * task.stride;
    const T* up = static_cast<const T*>(task.up) + r * task.stride;
    const T* dy = static_cast<const T*>(task.dy) + r * task.size;
    T* dgate = static_cast<T*>(task.dgate) + r * task.dstride;
    T* dup = static_cast<T*>(task.dup) + r * task.dstride;
    for (int64_t i = 0; i < task.size; ++i) {
      const float g = get(gate[i]), above = get(dy[i]), s = sigmoid(g);
      put(dgate[i], above * get(up[i]) * s * (1.0f + g * (1.0f - s)));
      put(dup[i], above * g * s);
    }
  }
}

template <class T>
void rope(const RopeTask& task, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const float* rotation = task.rotation + t * task.pairs * 2;
    for (int64_t h = 0; h < task.heads; ++h) {
      const T* x = static_cast<const T*>(task.x) + t * task.token_stride + h * task.head_stride;
      T* out = static_cast<T*>(task.out) + (t * task.heads + h) * task.pairs * 2;
      for (int64_t i = 0; i < task.pairs; ++i) {
        const float real = rotation[2 * i], imaginary = rotation[2 * i + 1] * task.sign;
        const float a = get(x[2 * i]), b = get(x[2 * i + 1]);
        put(out[2 * i], a * real - b * imaginary);
        put(out[2 * i + 1], a * imaginary + b * real);
      }
    }
  }
}

constexpr int64_t kStrip = 256;  // numbers of a token whose sum is held at a time

template <class T>
void combine(const CombineTask& task, int64_t begin, int64_t end) {
  const T* rows = static_cast<const T*>(task.rows);
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t first = 0; first < task.size; first += kStrip) {
      const int64_t count = task.size - first < kStrip ? task.size - first : kStrip;
      float sum[kStrip] = {};
      for (int64_t k = 0; k < task.k; ++k) {
        const float weight = task.weights ? task.weights[t * task.k + k] : 1.0f;
        const T* row = rows + task.places[t * task.k + k] * task.size + first;
        for (int64_t i = 0; i < count; ++i) sum[i] += weight * get(row[i]);
      }
      T* out = static_cast<T*>(task.out) + t * task.size + first;
      for (int64_t i = 0; i < count; ++i) put(out[i], sum[i]);
    }
  }
}

template <class T>
void combine_back(const CombineTask& task, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    const T* dy = static_cast<const T*>(task.dy) + t * task.size;
    for (int64_t k = 0; k < task.k; ++k) {
      const int64_t place = task.places[t * task.k + k];
      const T* row = static_cast<const T*>(task.rows) + place * task.size;
      T* drow = static_cast<T*>(task.drows) + place * task.size;
      const float weight = task.weights[t * task.k + k];
      float sum = 0;
      for (int64_t i = 0; i < task.size; ++i) {
        const float above = get(dy[i]);
        sum += above * get(row[i]);
        put(drow[i], above * weight);
      }
      task.dweights[t * task.k + k] = sum;
    }
  }
}

// loss = log(sum(e^z)) - z[target];   dz = e^z / sum(e^z) - (1 at the target)
template <class T>
void entropy(const EntropyTask& task, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* z = static_cast<T*>(task.logits) + r * task.columns;
    const int64_t target = task.targets[r];
    if (target < 0) {
      task.losses[r] = 0;
      if (task.gradient) std::memset(z, 0, static_cast<size_t>(task.columns) * sizeof(T));
      continue;
    }
    int32_t order = ordered(get(z[0]));
    for (int64_t i = 1; i < task.columns; ++i) {
      const int32_t other = ordered(get(z[i]));
      order = other > order ? other : order;
    }
    const float largest = unordered(order);
    float sum = 0;
    for (int64_t i = 0; i < task.columns; ++i) sum += exponential(get(z[i]) - largest);
    task.losses[r] = std::log(sum) + largest - get(z[target]);
    if (!task.gradient) continue;
    const float share = exponential(get(z[target]) - largest) / sum - 1.0f, by = 1.0f / sum;
    for (int64_t i = 0; i < task.columns; ++i) put(z[i], exponential(get(z[i]) - largest) * by);
    put(z[target], share);
  }
}

template <class T>
void adam(const AdamTask& task, int64_t begin, int64_t end) {
  float* p = task.parameter;
  const float* g = task.gradient;
  T *mean = static_cast<T*>(task.mean), *square = static_cast<T*>(task.square);
  for (int64_t i = begin; i < end; ++i) {
    const float m = get(mean[i]) + (g[i] - get(mean[i])) * task.first;
    const float v = get(square[i]) * task.second + g[i] * g[i] * (1.0f - task.second);
    put(mean[i], m);
    put(square[i], v);
    p[i] = p[i] * task.decay - task.rate * m / (std::sqrt(v * task.correction) + task.eps);
  }
}

// The bits of |value|: as integers they are ordered as the magnitudes are, with infinity and then NaN above all.
inline int32_t magnitude(float value) {
  int32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits & 0x7fffffff;
}

// largest / 448, at least smallest / 448; rounded up to a power of two where wanted. NaN and infinity stay.
inline float scale_of(int32_t largest, const TileTask& task) {
  float amax;
  std::memcpy(&amax, &largest, sizeof amax);
  const float scale = (amax < task.smallest ? task.smallest : amax) / 448.0f;
  int32_t bits = magnitude(scale);
  if (!task.power_of_two || bits >= 0x7f800000 || (bits & 0x7fffff) == 0) return scale;
  bits = (bits & 0x7f800000) + 0x800000;
  float up;
  std::memcpy(&up, &bits, sizeof up);
  return up;
}

// To the nearest E4M3, ties to even; NaN for NaN and for what is nearer to 480 than to 448. A number under 2^-6 is rounded
// to a multiple of 2^-9 by adding 2^14, whose last bit that is.
inline uint32_t e4m3(float value) {
  uint32_t bits, rounded;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t size = bits & 0x7fffffff;
  float shifted;
  std::memcpy(&shifted, &size, sizeof size);
  shifted += 16384.0f;
  std::memcpy(&rounded, &shifted, sizeof rounded);
  const uint32_t normal = (size + 0x7ffff + (size >> 20 & 1) - (120u << 23)) >> 20;
  const uint32_t finite = size < (121u << 23) ? rounded - 0x46800000 : normal;
  return (size > 0x43e80000 ? 0x7f : finite) | (bits >> 24 & 0x80);
}

inline float number_of(uint8_t code) {
  const uint32_t size = code & 0x7fu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(size)) * 0x1p-9f;
  uint32_t small;
  std::memcpy(&small, &subnormal, sizeof small);
  const uint32_t finite = size < 8 ? small : (size << 20) + (120u << 23);
  const uint32_t bits = (size == 0x7f ? 0x7fc00000 : finite) | uint32_t{code & 0x80u} << 24;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

// Strip `unit` of all bands: rows [top, bottom), `count` columns from `first` on, and the scales of its tiles.
struct Strip {
  int64_t first, count, top, bottom;
  float* scale;

  Strip(const TileTask& task, int64_t unit) {
    const int64_t strips = strips_of(task), band = unit / strips, rest = task.rows - band * task.tile_rows;
    first = unit % strips * strip_of(task);
    count = task.columns - first < strip_of(task) ? task.columns - first : strip_of(task);
    top = band * task.tile_rows;
    bottom = top + (rest < task.tile_rows ? rest : task.tile_rows);
    scale = task.scale + band * ((task.columns + task.tile_columns - 1) / task.tile_columns) + first / task.tile_columns;
  }
};

// First the largest magnitudes of a strip, then, while it is in the cache, its codes.
template <class T>
void quantize(const TileTask& task, int64_t begin, int64_t end) {
  int32_t largest[kStripColumns];
  float by[kStripColumns];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Strip strip(task, unit);
    const int64_t first = strip.first, count = strip.count, top = strip.top, bottom = strip.bottom;
    const T* x = static_cast<const T*>(task.x) + first;
    for (int64_t i = 0; i < count; ++i) largest[i] = 0;
    for (int64_t r = top; r < bottom; ++r) {
      const T* row = x + r * task.x_stride;
      for (int64_t i = 0; i < count; ++i) largest[i] = magnitude(get(row[i])) > largest[i] ? magnitude(get(row[i])) : largest[i];
    }
    for (int64_t from = 0; from < count; from += task.tile_columns) {
      const int64_t to = count - from < task.tile_columns ? count : from + task.tile_columns;
      int32_t most = 0;
      for (int64_t i = from; i < to; ++i) most = largest[i] > most ? largest[i] : most;
      const float scale = scale_of(most, task);
      strip.scale[from / task.tile_columns] = scale;
      for (int64_t i = from; i < to; ++i) by[i] = scale;
    }
    for (int64_t r = top; r < bottom; ++r) {
      const T* row = x + r * task.x_stride;
      uint8_t* codes = task.codes + r * task.code_stride + first;
      for (int64_t i = 0; i < count; ++i) codes[i] = static_cast<uint8_t>(e4m3(get(row[i]) / by[i]));
    }
  }
}

void dequantize(const TileTask& task, int64_t begin, int64_t end) {
  float by[kStripColumns];
  for (int64_t unit = begin; unit < end; ++unit) {
    const Strip strip(task, unit);
    const int64_t first = strip.first, count = strip.count, top = strip.top, bottom = strip.bottom;
    const float* scale = strip.scale;
    for (int64_t from = 0; from < count; from += task.tile_columns, ++scale) {
      const int64_t to = count - from < task.tile_columns ? count : from + task.tile_columns;
      for (int64_t i = from; i < to; ++i) by[i] = *scale;
    }
    for (int64_t r = top; r < bottom; ++r) {
      const uint8_t* codes = task.codes + r * task.code_stride + first;
      float* out = task.out + r * task.columns + first;
      for (int64_t i = 0; i < count; ++i) out[i] = number_of(codes[i]) * by[i];
    }
  }
}

const TrainKernels kTrainKernels = {
    {norm<float>, norm<Bf16>},       {norm_back<float>, norm_back<Bf16>}, {glu<float>, glu<Bf16>},
    {glu_back<float>, glu_back<Bf16>}, {rope<float>, rope<Bf16>},         {combine<float>, combine<Bf16>},
    {combine_back<float>, combine_back<Bf16>}, {entropy<float>, entropy<Bf16>}, {adam<float>, adam<Bf16>},
    {quantize<float>, quantize<Bf16>}, dequantize,
};

}  // namespace
