// Plain C++: the fallback for any CPU, and the form to read first. Eight lanes, so that a compiler may vectorise.
#include <cmath>

#include "kernels_body.h"

namespace {

struct E4m3Values {
  float of[256];

  E4m3Values() {
    for (int code = 0; code < 256; ++code) of[code] = float_of_e4m3(static_cast<uint8_t>(code));
  }
};

const E4m3Values kValues;

struct Scalar {
  static constexpr int width = 8;
  static constexpr int direct_rows = 1;
  static constexpr bool decodes_tiles = false;
  static constexpr int tile_rows = 2;
  static constexpr int tile_columns = 2;
  static constexpr int sums = 2;
  static constexpr int head_vecs = 1;

  struct reg {
    float lane[width];
  };

  template <class F>
  static reg each(F value) {
    reg out;
    for (int i = 0; i < width; ++i) out.lane[i] = value(i);
    return out;
  }

  static reg set1(float value) { return each([=](int) { return value; }); }
  static reg zero() { return set1(0.0f); }
  static reg load(const float* p) { return each([=](int i) { return p[i]; }); }
  static reg add(const reg& a, const reg& b) { return each([&](int i) { return a.lane[i] + b.lane[i]; }); }
  static reg sub(const reg& a, const reg& b) { return each([&](int i) { return a.lane[i] - b.lane[i]; }); }
  static reg max(const reg& a, const reg& b) {
    return each([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static reg exp2(const reg& a) { return each([&](int i) { return std::exp2(a.lane[i]); }); }
  static reg mul(const reg& a, const reg& b) { return each([&](int i) { return a.lane[i] * b.lane[i]; }); }
  static reg fma(const reg& a, const reg& b, const reg& c) {
    return each([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static void store(float* p, const reg& a) { std::memcpy(p, a.lane, sizeof a.lane); }
  static void store_bf16(uint16_t* p, const reg& a) {
    for (int i = 0; i < width; ++i) p[i] = bf16_of_float(a.lane[i]);
  }
  static reg divide(const reg& a, const reg& b) { return each([&](int i) { return a.lane[i] / b.lane[i]; }); }
  static reg keep(const reg& limit, float at, const reg& a, const reg& b) {
    return each([&](int i) { return limit.lane[i] > at ? a.lane[i] : b.lane[i]; });
  }
  static float sum(const reg& a) {
    float total = 0.0f;
    for (float lane : a.lane) total += lane;
    return total;
  }

  static void decode(const float* p, reg* out) {
    for (int v = 0; v < kVecs; ++v) out[v] = load(p + v * width);
  }
  static void decode(const uint16_t* p, reg* out) {
    for (int v = 0; v < kVecs; ++v) out[v] = each([=](int i) { return float_of_bf16(p[v * width + i]); });
  }
  static void decode(const uint8_t* p, reg* out) {
    for (int v = 0; v < kVecs; ++v) out[v] = each([=](int i) { return kValues.of[p[v * width + i]]; });
  }

  struct Watch {
    static constexpr float factor = 1.0f;
  };
  static void decode_watched(const uint8_t* p, reg* out, Watch&) { decode(p, out); }
  static bool saw_nan(const Watch&) { return false; }
};

}  // namespace

namespace kvern {
const Kernels kScalarKernels = kernels<Scalar>("scalar");
}
