// KVERN_LATENT8 (see kvern.h), a cache row of 8-bit latents as a record of bytes: `rank` E4M3 codes, an FP32 scale for
// each 128 of them (ragged: the last block is shorter), `rope` numbers in BF16. Nothing is padded, so that scales and rope
// part may lie at odd addresses: they are copied, never pointed at. 656 bytes at V3's 512 + 64, as FlashMLA lays them out.
// In an unnamed namespace: see scalars.h.
#pragma once

#include <cstdint>
#include <cstring>

#include "kvern.h"

namespace {

constexpr int64_t kLatentBlock = 128;

constexpr int64_t latent_blocks(int64_t rank) { return (rank + kLatentBlock - 1) / kLatentBlock; }
constexpr int64_t rope_at(int64_t rank) { return rank + 4 * latent_blocks(rank); }
constexpr int64_t latent8_bytes(int64_t rank, int64_t rope) { return rope_at(rank) + 2 * rope; }

inline float latent_scale(const uint8_t* record, int64_t rank, int64_t block) {
  float scale;
  std::memcpy(&scale, record + rank + 4 * block, sizeof scale);
  return scale;
}

constexpr bool is_rows_dtype(int dtype) { return dtype == KVERN_F32 || dtype == KVERN_BF16 || dtype == KVERN_LATENT8; }

// Bytes of one element of a cache row, in which its stride is counted, and how many elements a row has.
constexpr int64_t row_element_bytes(int dtype) { return dtype == KVERN_F32 ? 4 : dtype == KVERN_BF16 ? 2 : 1; }
constexpr int64_t row_elements(int dtype, int64_t rank, int64_t rope) {
  return dtype == KVERN_LATENT8 ? latent8_bytes(rank, rope) : rank + rope;
}

}  // namespace
