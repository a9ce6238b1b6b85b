// Packed products in plain C++, for any CPU.
#include "packed_body.h"
#include "rows_body.h"

namespace {

struct Scalar {
  struct reg {
    float lane[kLanes];
  };
  static constexpr int64_t columns = 4;
  static constexpr int tiled_panels = 1;
  static constexpr int panels(int) { return 1; }

  template <class F>
  static reg each(F number) {
    reg out;
    for (int i = 0; i < kLanes; ++i) out.lane[i] = number(i);
    return out;
  }
  static reg zero() { return broadcast(0.0f); }
  static reg load(const float* p) { return each([p](int i) { return p[i]; }); }
  static void store(float* p, const reg& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static void keep(uint8_t* p, const reg& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static reg add(const reg& a, const reg& b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static reg mul_add(const reg& a, const reg& b, const reg& c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static reg broadcast(float a) { return each([a](int) { return a; }); }
  static reg scales(const uint16_t* p) { return each([p](int i) { return float_of_bf16(p[i]); }); }
  static reg dot(const reg& acc, const reg& w, const uint32_t* x) {
    const float number = float_of_bits(*x);
    return each([&](int i) { return w.lane[i] * number + acc.lane[i]; });
  }
};

struct F32Single : F32Kind {
  static constexpr int steps = 1, registers = 1;
  using Decoded = F32Single;
  static void decode(const uint8_t* tile, int, Scalar::reg* w) { std::memcpy(w[0].lane, tile, kTileBytes); }
};

struct DecodedSingle : F32Single {
  static constexpr bool is_decoded = true;
};

struct Bf16Singles : Bf16Kind {
  static constexpr int steps = 2, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Scalar::reg* w) {
    uint16_t words[kLanes];
    std::memcpy(words, tile + 32 * step, sizeof words);
    w[0] = Scalar::scales(words);
  }
};

struct E4m3Singles : E4m3Kind {
  static constexpr int steps = 4, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Scalar::reg* w) {
    w[0] = Scalar::each([&](int i) { return float_of_e4m3(tile[16 * step + i]); });
  }
};

struct Int4Singles : Int4Kind {
  static constexpr int steps = 8, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Scalar::reg* w) {
    w[0] = Scalar::each([&](int i) {
      const int byte = tile[16 * (step % 4) + i];
      return static_cast<float>((step < 4 ? byte & 15 : byte >> 4) - 8);
    });
  }
};

struct Int4Turned : Int4TurnedKind {
  static constexpr int steps = 8, registers = 1;
  using Decoded = DecodedSingle;
  static void decode(const uint8_t* tile, int step, Scalar::reg* w) {
    w[0] = Scalar::each([&](int i) {
      uint32_t word;
      std::memcpy(&word, tile + 4 * i, sizeof word);
      return static_cast<float>(static_cast<int>(word >> 4 * step & 15) - 8);
    });
  }
};

}  // namespace

namespace kvern {
const PackedKernels kScalarPacked{
    kRowKernels,
    {Order::kSingles, Order::kSingles, Order::kSingles, Order::kSingles, Order::kSingles},
    {Scalar::columns, Scalar::columns, Scalar::columns, Scalar::columns, Scalar::columns},
    {multiply<Scalar, F32Single>, multiply<Scalar, Bf16Singles>, multiply<Scalar, E4m3Singles>,
     multiply<Scalar, Int4Singles>, multiply_turned<Scalar, Int4Turned>}};
}
