// What the parts of the fuzzer share: seeded choices, and buffers of exactly the stated size.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <random>
#include <vector>

#include "../kvern.h"
#include "../kvern_layer.h"
#include "../latent8.h"
#include "../scalars.h"
#include "check.h"

inline int64_t bytes_of(int dtype) { return dtype == KVERN_F32 ? 4 : dtype == KVERN_BF16 ? 2 : 1; }

// A heap block of exactly `size` bytes, so that AddressSanitizer sees the first byte past it.
struct Buffer {
  std::unique_ptr<uint8_t[]> memory;
  size_t size = 0;

  Buffer() = default;
  explicit Buffer(int64_t bytes) : memory(new uint8_t[static_cast<size_t>(bytes)]), size(static_cast<size_t>(bytes)) {
    std::memset(memory.get(), 0xa5, size);
  }
  uint8_t* data() const { return memory.get(); }
  float* floats() const { return reinterpret_cast<float*>(memory.get()); }
  std::vector<uint8_t> copy() const { return {memory.get(), memory.get() + size}; }
  bool holds(const std::vector<uint8_t>& bytes) const { return size == 0 || std::memcmp(memory.get(), bytes.data(), size) == 0; }
};

template <class T>
Buffer buffer_of(const std::vector<T>& numbers) {
  Buffer one(static_cast<int64_t>(numbers.size() * sizeof(T)));
  if (one.size) std::memcpy(one.data(), numbers.data(), one.size);
  return one;
}

struct Fuzz {
  std::mt19937_64 engine;
  bool is_wild = false;  // NaN, infinities, subnormal and huge numbers as well

  explicit Fuzz(uint64_t seed) : engine(seed) { is_wild = chance(3); }

  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(engine() % static_cast<uint64_t>(high - low + 1)); }
  bool chance(int64_t of) { return between(1, of) == 1; }
  template <class T>
  T one_of(std::initializer_list<T> all) { return all.begin()[between(0, static_cast<int64_t>(all.size()) - 1)]; }

  // Sizes from 1 to `most`: often small, or next to what kernels count in.
  int64_t size(int64_t most) {
    int64_t size = between(1, most);
    if (chance(3)) size = between(1, 4);
    if (chance(3)) size = one_of<int64_t>({16, 32, 64, 128}) + between(-1, 1);
    return size > most ? most : size;
  }

  float number() {
    if (is_wild && chance(8)) return float_of_bits(static_cast<uint32_t>(engine()));
    if (is_wild && chance(8)) return one_of({INFINITY, -INFINITY, NAN, 0.0f, -0.0f, 1e-40f, 3e38f, -3e38f});
    return std::normal_distribution<float>()(engine);
  }

  // `count` numbers of a dtype; any code of E4M3 where is_wild, else none that is a NaN.
  Buffer numbers(int64_t count, int dtype) {
    Buffer one(count * bytes_of(dtype));
    for (int64_t i = 0; i < count; ++i) {
      if (dtype == KVERN_F8_E4M3 || dtype == KVERN_LATENT8) {
        one.data()[i] = static_cast<uint8_t>(is_wild ? engine() : engine() % 127 + 128 * (engine() % 2));
      } else {
        write_scalar(one.data(), dtype, i, number());
      }
    }
    return one;
  }
};

namespace {

// Equal bit for bit; a NaN equals any other.
inline bool same(float a, float b) { return bits_of_float(a) == bits_of_float(b) || (std::isnan(a) && std::isnan(b)); }

// Runs `call` after one value of it was spoilt: it must refuse, and leave every byte of `out`.
template <class Call>
void must_refuse(const Call& call, std::initializer_list<const Buffer*> out, const char* what) {
  std::vector<std::vector<uint8_t>> before;
  for (const Buffer* one : out) before.push_back(one->copy());
  require(call() == KVERN_BAD_ARGUMENT, what);
  size_t i = 0;
  for (const Buffer* one : out) require(one->holds(before[i++]), what);
}

template <class T, class Call>
void must_refuse_with(T& value, T bad, const Call& call, std::initializer_list<const Buffer*> out, const char* what) {
  const T good = value;
  value = bad;
  must_refuse(call, out, what);
  value = good;
}

constexpr int64_t kHuge = INT64_MAX, kWide = int64_t{1} << 61;  // products of them overflow

}  // namespace

void fuzz_product(Fuzz& fuzz);
void fuzz_pack(Fuzz& fuzz);
void fuzz_layer(Fuzz& fuzz);
