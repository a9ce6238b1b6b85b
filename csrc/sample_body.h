// The loops of sample.h over registers of the widest size that the including file's instruction set has, in the vector
// extension of GCC and Clang. In an unnamed namespace: see scalars.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "sample.h"

namespace {

using kvern::kSpan;

constexpr int64_t kLanes = 16;  // partial results of loops that the compiler vectorises

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

// A register of T, and of what comparing them gives: -1 or 0, as wide.
template <class T>
struct Register {
  static constexpr int64_t width = kBytes / sizeof(T);
  typedef T reg __attribute__((vector_size(kBytes)));
  typedef decltype(reg{} != reg{}) mask;
};

using Doubles = Register<double>;
using Floats = Register<float>;
typedef float HalfFloats __attribute__((vector_size(kBytes / 2)));

template <class R>
inline R loaded(const void* from) {
  R values;
  std::memcpy(&values, from, sizeof values);
  return values;
}

inline Doubles::reg doubles(const double* from) { return loaded<Doubles::reg>(from); }
inline Doubles::reg doubles(const float* from) { return __builtin_convertvector(loaded<HalfFloats>(from), Doubles::reg); }

template <class R>
inline auto total_of(R sums, int64_t width) {
  auto total = sums[0];
  for (int64_t j = 1; j < width; ++j) total += sums[j];
  return total;
}

template <class To, class From>
inline To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "as wide");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// e^x for x <= 0, to 4e-16 relative; 0 below -708.8. 2^n by its exponent bits, which are 0 for the least n, and a polynomial,
// fitted by relative error, for what is left of x log2(e).
inline Doubles::reg exponential(Doubles::reg x) {
  constexpr double kTerms[] = {2.7626371065696354e-07, 2.764019739169484e-06, 2.480150431378554e-05,  0.00019841170230570286,
                               0.001388888893251478,   0.008333333385699212,  0.041666666666573066,   0.16666666666554314,
                               0.5000000000000006,     1.0000000000000067,    1.0};
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52: the integer next to a number added to it lands in the low bits
  const auto floor = Doubles::reg{} - 709.1;
  const auto in_range = x > floor ? x : floor;
  const auto shifted = in_range * 1.4426950408889634 + kShift;
  const auto whole = shifted - kShift;
  const auto f = (in_range - whole * 0.693147180369123816490) - whole * 1.90821492927058770002e-10;  // ln 2 in two parts
  auto value = Doubles::reg{} + kTerms[0];
  for (int i = 1; i < 11; ++i) value = value * f + kTerms[i];
  const auto power = (bits_as<Doubles::mask>(shifted) + 1023) << 52;
  return value * bits_as<Doubles::reg>(power);
}

// The same in FP32, to 2e-7.
inline Floats::reg exponential(Floats::reg x) {
  constexpr float kTerms[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23
  const auto floor = Floats::reg{} - 87.0f;
  const auto in_range = x > floor ? x : floor;
  const auto shifted = in_range * 1.44269504f + kShift;
  const auto whole = shifted - kShift;
  const auto f = (in_range - whole * 0.693145752f) - whole * 1.42860677e-6f;
  auto value = Floats::reg{} + kTerms[0];
  for (int i = 1; i < 7; ++i) value = value * f + kTerms[i];
  const auto power = (bits_as<Floats::mask>(shifted) + 127) << 23;
  return value * bits_as<Floats::reg>(power);
}

template <class T>
bool maxima(const T* x, int64_t size, T* out) {
  using R = Register<T>;
  typename R::mask is_nan{};
  bool rest_is_nan = false;
  for (int64_t at = 0; at < size; at += kSpan) {
    const int64_t count = size - at < kSpan ? size - at : kSpan;
    const T* span = x + at;
    typename R::reg most[4];
    for (auto& one : most) one = typename R::reg{} + span[0];
    int64_t i = 0;
    for (; i + 4 * R::width <= count; i += 4 * R::width) {
      for (int r = 0; r < 4; ++r) {
        const auto values = loaded<typename R::reg>(span + i + r * R::width);
        most[r] = values > most[r] ? values : most[r];
        is_nan |= values != values;
      }
    }
    most[0] = most[1] > most[0] ? most[1] : most[0];
    most[2] = most[3] > most[2] ? most[3] : most[2];
    most[0] = most[2] > most[0] ? most[2] : most[0];
    T best = most[0][0];
    for (int64_t j = 1; j < R::width; ++j) best = most[0][j] > best ? most[0][j] : best;
    for (; i < count; ++i) {
      best = span[i] > best ? span[i] : best;
      rest_is_nan = rest_is_nan || span[i] != span[i];
    }
    out[at / kSpan] = best;
  }
  for (int64_t j = 0; j < R::width; ++j) rest_is_nan = rest_is_nan || is_nan[j] != 0;
  return !rest_is_nan;
}

template <class T>
T smallest(const T* x, int64_t size) {
  using R = Register<T>;
  auto low = typename R::reg{} + x[0];
  int64_t i = 0;
  for (; i + R::width <= size; i += R::width) {
    const auto values = loaded<typename R::reg>(x + i);
    low = values < low ? values : low;
  }
  T least = low[0];
  for (int64_t j = 1; j < R::width; ++j) least = low[j] < least ? low[j] : least;
  for (; i < size; ++i) least = x[i] < least ? x[i] : least;
  return least;
}

template <class T>
int64_t count(const T* x, int64_t size, T least) {
  using Whole = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Whole sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) sums[j] += x[i + j] >= least ? Whole{1} : Whole{0};
  }
  int64_t total = 0;
  for (int64_t j = 0; j < kLanes; ++j) total += sums[j];
  for (; i < size; ++i) total += x[i] >= least;
  return total;
}

// Calls one(position, weights) for registers of weights; the last may hold zeros behind the end of the row.
template <class T, class F>
inline void each_weight(const T* x, int64_t size, double largest, double by, F one) {
  int64_t i = 0;
  for (; i + Doubles::width <= size; i += Doubles::width) one(i, exponential((doubles(x + i) - largest) * by));
  if (i == size) return;
  Doubles::reg rest = Doubles::reg{} - 1000.0;
  for (int64_t j = 0; i + j < size; ++j) rest[j] = (static_cast<double>(x[i + j]) - largest) * by;
  one(i, exponential(rest));
}

template <class T>
double weigh(const T* x, int64_t size, double largest, double by, double* out) {
  Doubles::reg sums{};
  each_weight(x, size, largest, by, [&](int64_t i, Doubles::reg weights) {
    sums += weights;
    const int64_t count = size - i < Doubles::width ? size - i : Doubles::width;
    std::memcpy(out + i, &weights, static_cast<size_t>(count) * sizeof(double));
  });
  return total_of(sums, Doubles::width);
}

template <class T>
double sum(const T* x, int64_t size, double largest, double by) {
  Doubles::reg sums{};
  each_weight(x, size, largest, by, [&](int64_t, Doubles::reg weights) { sums += weights; });
  return total_of(sums, Doubles::width);
}

double rough_sum(const float* x, int64_t size, double largest, double by) {
  const float top = static_cast<float>(largest), factor = static_cast<float>(by);
  Floats::reg sums{};
  int64_t i = 0;
  for (; i + Floats::width <= size; i += Floats::width) sums += exponential((loaded<Floats::reg>(x + i) - top) * factor);
  const double total = total_of(sums, Floats::width);
  return i == size ? total : total + sum(x + i, size - i, largest, by);
}

template <class T>
double cut(const T* x, int64_t size, T least, double* weights) {
  double sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    for (int64_t j = 0; j < kLanes; ++j) {
      const double weight = x[i + j] >= least ? weights[i + j] : 0.0;
      weights[i + j] = weight;
      sums[j] += weight;
    }
  }
  for (; i < size; ++i) sums[0] += weights[i] = x[i] >= least ? weights[i] : 0.0;
  return total_of(sums, kLanes);
}

template <class T>
void bins(const T* x, int64_t size, T largest, T width, int32_t count, int32_t* out) {
  const T by = static_cast<T>(count) / width;
  for (int64_t i = 0; i < size; ++i) {
    const T below = largest - x[i];
    const int32_t bin = static_cast<int32_t>((below < width ? below : width) * by);
    out[i] = bin < count ? bin : count;
  }
}

template <class T>
constexpr kvern::ScoreKernels<T> kScoreKernels{maxima<T>, smallest<T>, count<T>, weigh<T>, sum<T>, cut<T>, bins<T>};

constexpr kvern::SampleKernels kSampleKernels{kScoreKernels<float>, kScoreKernels<double>, rough_sum};

}  // namespace
