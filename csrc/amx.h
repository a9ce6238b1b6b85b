// AMX tiles: the permission to use them, and their shapes for as long as a kernel runs.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace kvern {

// What was stored so far is in memory: GCC 12's tile loads do not say that they read any.
inline void finish_stores() { __asm__ volatile("" ::: "memory"); }

// Tiles 0 to 4 with `rows` rows, 5 to 7 with 16, all of 64 bytes. Released at the end, so that a waiting thread has no
// tiles to save.
class TileRows {
 public:
  explicit TileRows(int rows) {
    Shapes shapes{};
    shapes.palette = 1;
    for (int i = 0; i < 8; ++i) {
      shapes.bytes[i] = 64;
      shapes.rows[i] = static_cast<uint8_t>(i < 5 ? rows : 16);
    }
    __asm__ volatile("ldtilecfg %0" ::"m"(shapes));  // GCC 12's _tile_loadconfig reads 8 of these 64 bytes
  }
  ~TileRows() { _tile_release(); }
  TileRows(const TileRows&) = delete;
  TileRows& operator=(const TileRows&) = delete;

 private:
  struct alignas(64) Shapes {  // as ldtilecfg reads it
    uint8_t palette, start, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
  };
};

}  // namespace kvern
