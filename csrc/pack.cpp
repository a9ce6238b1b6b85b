// Packs weights into tiles (see packed.h) and hashes them for the file that keeps them.
#include <atomic>
#include <cstring>

#include "packed.h"
#include "pool.h"
#include "scalars.h"
#include "sound.h"

namespace kvern {
namespace {

struct Packing {
  uint8_t* tiles;
  void* scales;
  int kind, dtype;
  Order order;
  const void* weight;
  int64_t stride;
  const void* scale;
  int64_t scale_stride, group, n, k;
  std::atomic<bool>* has_nan;

  int64_t padded() const { return round_up(k, kPadding); }
};

// Columns of W in a tile.
int64_t depth_of(int kind) { return kind == KVERN_F32 ? 1 : kind == KVERN_BF16 ? 2 : kind == KVERN_F8_E4M3 ? 4 : 8; }

// Where row r, column j of a tile of 4 bytes a row lies, in bytes.
int64_t byte_place(Order order, int64_t r, int64_t j) {
  return order != Order::kSingles ? 16 * (r / 4) + 8 * (j / 2) + 2 * (r % 4) + j % 2 : 16 * j + r;
}

// The same for row r, column j of a 4-bit tile, in nibbles. For pairs a row is a word of 32 bits, its even columns in the
// lower half, so that one shift brings a pair to the lowest bits of both halves.
int64_t nibble_place(Order order, int64_t r, int64_t j) {
  return order != Order::kSingles ? 8 * r + j % 2 * 4 + j / 2 : 2 * (16 * (j % 4) + r) + j / 4;
}

float number_at(const Packing& task, int64_t row, int64_t column) {
  const int64_t at = row * task.stride + column;
  if (task.dtype != KVERN_F8_E4M3) return read_scalar(task.weight, task.dtype, at);
  const float scale = static_cast<const float*>(task.scale)[row / kDepth * task.scale_stride + column / kDepth];
  return float_of_e4m3(static_cast<const uint8_t*>(task.weight)[at]) * scale;
}

void pack_e4m3(const Packing& task, int64_t panel, uint8_t* tiles, int64_t stride) {
  const auto* codes = static_cast<const uint8_t*>(task.weight);
  const int64_t rows = task.n - panel * kLanes < kLanes ? task.n - panel * kLanes : kLanes;
  bool has_nan = false;
  for (int64_t r = 0; r < rows; ++r) {
    const uint8_t* row = codes + (panel * kLanes + r) * task.stride;
    for (int64_t c = 0; c < task.k; ++c) {
      has_nan |= (row[c] & 0x7f) == 0x7f;
      tiles[c / 4 * stride + byte_place(task.order, r, c % 4)] = row[c];
    }
  }
  if (has_nan) task.has_nan->store(true);
  const int64_t groups = (task.padded() + kDepth - 1) / kDepth;
  auto* scales = static_cast<float*>(task.scales) + panel * groups;
  const auto* from = static_cast<const float*>(task.scale) + panel * kLanes / kDepth * task.scale_stride;
  for (int64_t g = 0; g < groups; ++g) scales[g] = g * kDepth < task.k ? from[g] : 0.0f;
}

void pack_bf16(const Packing& task, int64_t panel, uint8_t* tiles, int64_t stride) {
  const auto* words = static_cast<const uint16_t*>(task.weight);
  for (int64_t r = 0; r < kLanes && panel * kLanes + r < task.n; ++r) {
    const uint16_t* row = words + (panel * kLanes + r) * task.stride;
    for (int64_t c = 0; c < task.k; ++c) {
      const int64_t place = task.order != Order::kSingles ? 2 * r + c % 2 : 16 * (c % 2) + r;
      std::memcpy(tiles + c / 2 * stride + 2 * place, row + c, sizeof *row);
    }
  }
}

void pack_f32(const Packing& task, int64_t panel, uint8_t* tiles, int64_t stride) {
  for (int64_t r = 0; r < kLanes && panel * kLanes + r < task.n; ++r) {
    for (int64_t c = 0; c < task.k; ++c) {
      const float number = number_at(task, panel * kLanes + r, c);
      std::memcpy(tiles + c * stride + 4 * r, &number, sizeof number);
    }
  }
}

void pack_int4(const Packing& task, int64_t panel, uint8_t* tiles, int64_t stride) {
  const auto* words = static_cast<const uint32_t*>(task.weight);
  const int64_t groups = task.padded() / task.group;
  auto* scales = static_cast<uint16_t*>(task.scales) + panel * groups * kLanes;
  const auto* from = static_cast<const uint16_t*>(task.scale);
  std::memset(scales, 0, static_cast<size_t>(groups * kLanes) * sizeof(uint16_t));
  for (int64_t r = 0; r < kLanes && panel * kLanes + r < task.n; ++r) {
    const int64_t row = panel * kLanes + r;
    for (int64_t c = 0; c < task.k; ++c) {
      const uint32_t value = words[row * task.stride + c / 8] >> (4 * (c % 8)) & 15;
      const int64_t place = nibble_place(task.order, r, c % 8);
      uint8_t& byte = tiles[c / 8 * stride + place / 2];
      byte = static_cast<uint8_t>(place % 2 ? (byte & 0x0f) | value << 4 : (byte & 0xf0) | value);
    }
    for (int64_t g = 0; g < task.k / task.group; ++g) scales[g * kLanes + r] = from[row * task.scale_stride + g];
  }
}

// The words lie as they come; what fills the last one meets zeros of x.
void pack_int4_turned(const Packing& task, int64_t panel, uint8_t* tiles, int64_t stride) {
  const auto* words = static_cast<const uint32_t*>(task.weight);
  for (int64_t r = 0; r < kLanes; ++r) {
    const uint32_t* row = words + (panel * kLanes + r) * task.stride;
    for (int64_t word = 0; word < (task.k + 7) / 8; ++word) std::memcpy(tiles + word * stride + 4 * r, row + word, sizeof *row);
  }
  const int64_t first = panel * kLanes, group = first / task.group;
  if (first % task.group) return;
  auto* scales = static_cast<uint16_t*>(task.scales) + group * task.padded();
  std::memset(scales, 0, static_cast<size_t>(task.padded()) * sizeof *scales);
  std::memcpy(scales, static_cast<const uint16_t*>(task.scale) + group * task.scale_stride, static_cast<size_t>(task.k) * sizeof *scales);
}

void pack_panel(const Packing& task, int64_t panel, Place place) {
  uint8_t* tiles = task.tiles + place.offset;
  switch (task.kind) {
    case KVERN_F32: return pack_f32(task, panel, tiles, place.stride);
    case KVERN_BF16: return pack_bf16(task, panel, tiles, place.stride);
    case KVERN_F8_E4M3: return pack_e4m3(task, panel, tiles, place.stride);
    case KVERN_INT4: return pack_int4(task, panel, tiles, place.stride);
    default: return pack_int4_turned(task, panel, tiles, place.stride);
  }
}

// A pair of panels, first filled with zeros, for which 8 stands in 4 bits.
void pack_pair(const void* context, int64_t pair) {
  const auto& task = *static_cast<const Packing*>(context);
  const int64_t bytes = task.padded() / depth_of(task.kind) * kTileBytes, all = round_up(task.n, kLanes) / kLanes;
  const int64_t first = 2 * pair, last = first + 2 < all ? first + 2 : all;
  std::memset(task.tiles + first * bytes, task.kind >= KVERN_INT4 ? 0x88 : 0, static_cast<size_t>((last - first) * bytes));
  for (int64_t panel = first; panel < last; ++panel) pack_panel(task, panel, place_of(panel, all, bytes));
}

bool is_group(int64_t group, int64_t size) { return (group == 32 || group == 128) && size % group == 0; }

bool can_pack(const Packing& task) {
  const bool is_turned = task.dtype == KVERN_INT4_TURNED, is_int4 = task.dtype == KVERN_INT4 || is_turned, is_f8 = task.dtype == KVERN_F8_E4M3;
  if (task.dtype < KVERN_F32 || task.dtype > KVERN_INT4_TURNED || task.n < 1 || task.k < 1 || !is_addressable({task.n, task.k})) return false;
  if (!is_addressable({task.n, task.stride}) || (task.scale && !is_addressable({task.n, task.scale_stride}))) return false;
  if (task.kind != task.dtype && (task.kind != KVERN_F32 || is_int4)) return false;
  if (!task.tiles || !task.weight || task.stride < (is_int4 ? (task.k + 7) / 8 : task.k)) return false;
  if (is_int4) {
    const int64_t grouped = is_turned ? task.n : task.k;
    return is_group(task.group, grouped) && task.scale && task.scales &&
           task.scale_stride >= (is_turned ? task.k : task.k / task.group);
  }
  if (!is_f8) return true;
  return task.scale && task.scale_stride >= (task.k + kDepth - 1) / kDepth && (task.kind == KVERN_F32 || task.scales);
}

constexpr int64_t kHashBytes = 1 << 20;  // hashed by one thread at a time

uint64_t mix(uint64_t a, uint64_t b) {
  const auto product = static_cast<unsigned __int128>(a ^ 0x9e3779b97f4a7c15u) * (b ^ 0xd6e8feb86659fd93u);
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

uint64_t hash_part(const uint8_t* data, int64_t bytes, uint64_t seed) {
  uint64_t lanes[4] = {seed, seed + 1, seed + 2, seed + 3};
  int64_t at = 0;
  for (; at + 64 <= bytes; at += 64) {
    uint64_t words[8];
    std::memcpy(words, data + at, sizeof words);
    for (int i = 0; i < 4; ++i) lanes[i] = mix(lanes[i] ^ words[2 * i], words[2 * i + 1]);
  }
  uint64_t hash = mix(mix(lanes[0], lanes[1]), mix(lanes[2], lanes[3]));
  for (; at < bytes; ++at) hash = mix(hash, data[at]);
  return mix(hash, static_cast<uint64_t>(bytes));
}

}  // namespace
}  // namespace kvern

using namespace kvern;

const char* kvern_packed_order(void) {
  return packed_kernels().order[KVERN_BF16] != Order::kSingles ? "pairs" : "singles";
}

int64_t kvern_packed_bytes(int kind, int64_t n, int64_t k) {
  if (kind < KVERN_F32 || kind > KVERN_INT4_TURNED || n < 1 || k < 1 || !is_addressable({n, k})) return 0;
  return round_up(n, kLanes) / kLanes * (round_up(k, kPadding) / depth_of(kind)) * kTileBytes;
}

int64_t kvern_scale_bytes(int kind, int64_t n, int64_t k, int64_t group) {
  if (n < 1 || k < 1 || !is_addressable({n, k})) return 0;
  const int64_t panels = round_up(n, kLanes) / kLanes, padded = round_up(k, kPadding);
  if (kind == KVERN_F8_E4M3) return panels * ((padded + kDepth - 1) / kDepth) * 4;
  if (kind == KVERN_INT4 && is_group(group, k)) return panels * (padded / group) * kLanes * 2;
  if (kind == KVERN_INT4_TURNED && is_group(group, n)) return n / group * padded * 2;
  return 0;
}

int kvern_pack(void* tiles, void* scales, int kind, const void* weight, int dtype, int64_t stride, const void* scale,
               int64_t scale_stride, int64_t group, int64_t n, int64_t k) {
  std::atomic<bool> has_nan{false};
  Packing task{static_cast<uint8_t*>(tiles), scales, kind, dtype, Order::kSingles, weight, stride, scale, scale_stride,
               group, n, k, &has_nan};
  if (!can_pack(task)) return KVERN_BAD_ARGUMENT;
  task.order = packed_kernels().order[kind];
  parallel_for(round_up(n, 2 * kLanes) / (2 * kLanes), pack_pair, &task);
  if (has_nan.load()) return KVERN_HAS_NAN;
  return KVERN_OK;
}

uint64_t kvern_hash(const void* data, int64_t bytes) {
  struct Work {
    const uint8_t* data;
    int64_t bytes;
    std::atomic<uint64_t> sum{0};
  } work{static_cast<const uint8_t*>(data), bytes, {}};
  parallel_for(
      (bytes + kHashBytes - 1) / kHashBytes,
      [](const void* context, int64_t part) {
        auto& mine = *static_cast<Work*>(const_cast<void*>(context));
        const int64_t at = part * kHashBytes, rest = mine.bytes - at;
        mine.sum.fetch_add(hash_part(mine.data + at, rest < kHashBytes ? rest : kHashBytes, static_cast<uint64_t>(part)));
      },
      &work);
  return mix(work.sum.load(), static_cast<uint64_t>(bytes));
}
