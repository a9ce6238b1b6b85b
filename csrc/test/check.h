// What the parts of the driver share.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "../kvern.h"
#include "../latent8.h"
#include "../scalars.h"

namespace {

inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s (%s)\n", what, kvern_isa());
  std::exit(1);
}

struct Random {
  std::mt19937 engine{7};

  float number() { return std::normal_distribution<float>()(engine); }

  // `count` numbers as `dtype`, in a block of exactly their size
  std::vector<uint8_t> stored(int64_t count, int dtype) {
    const size_t size = dtype == KVERN_F32 ? 4 : dtype == KVERN_BF16 ? 2 : 1;
    std::vector<uint8_t> bytes(static_cast<size_t>(count) * size);
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == KVERN_F8_E4M3) {
        bytes[static_cast<size_t>(i)] = static_cast<uint8_t>(engine() % 127 + 128 * (engine() % 2));
      } else {
        write_scalar(bytes.data(), dtype, i, number());
      }
    }
    return bytes;
  }
};

inline float weight_at(const std::vector<uint8_t>& bytes, int dtype, int64_t index) {
  return dtype == KVERN_F8_E4M3 ? float_of_e4m3(bytes[static_cast<size_t>(index)]) : read_scalar(bytes.data(), dtype, index);
}

inline void close(double actual, double expected, double bound, const char* what) {
  require(std::abs(actual - expected) <= 1e-5 * bound + 1e-30, what);
}

}  // namespace

void check_packed();
void check_sample();
void check_train();
