// The loops of a training step that are not products: norms, SwiGLU, rotations, adding up experts, cross entropy, AdamW,
// and what FP8 adds: numbers to codes with a scale for each tile, and back.
// Numbers are read and stored in `dtype` (F32 or BF16, rounded to nearest even) and computed in FP32.
#pragma once

#include <cstdint>

namespace kvern {

struct NormTask {
  const void *x, *dy;  // x [rows, size], rows x_stride apart; dy [rows, size] dense
  void* out;           // y, or dx: [rows, size] dense
  const float* weight;
  float *inverse, *dw;  // inverse [rows]: 1 / sqrt(mean(x^2) + eps); dw [size]: added to
  int64_t x_stride, size;
  float eps;
};

struct GluTask {
  const void *gate, *up, *dy;  // gate, up: rows `stride` apart; dy [rows, size] dense
  void *out, *dgate, *dup;     // out [rows, size] dense; dgate, dup: rows dstride apart
  int64_t stride, dstride, size;
};

struct RopeTask {
  const void* x;          // token and head strides in numbers
  void* out;              // [tokens, heads, 2 pairs] dense
  const float* rotation;  // [tokens, pairs, 2]: real and imaginary part
  int64_t token_stride, head_stride, heads, pairs;
  float sign;  // -1: turn back
};

struct CombineTask {
  const void *rows, *dy;   // rows [tokens * k, size]; dy [tokens, size]
  void *out, *drows;       // out [tokens, size]; drows [tokens * k, size]
  const float* weights;    // [tokens, k]; nullptr: ones
  float* dweights;         // [tokens, k]
  const int64_t* places;   // [tokens, k]: which row
  int64_t k, size;
};

struct EntropyTask {
  void* logits;            // [rows, columns]; becomes the gradient where one is wanted
  const int64_t* targets;  // [rows]; negative: no loss, a gradient of zeros
  float* losses;           // [rows]
  int64_t columns;
  bool gradient;
};

struct AdamTask {
  float* parameter;
  const float* gradient;
  void *mean, *square;
  float first, second, decay, rate, correction, eps;  // see kvern_adamw
};

struct TileTask {
  const void* x;         // [rows, columns], rows x_stride apart
  uint8_t* codes;        // E4M3 [rows, columns], rows code_stride apart
  float* scale;          // [bands, ceil(columns / tile_columns)] dense; a band is tile_rows rows
  float* out;            // [rows, columns] dense
  int64_t x_stride, code_stride, rows, columns, tile_rows, tile_columns;
  float smallest;        // of a tile's largest magnitude
  bool power_of_two;
};

constexpr int64_t kStripColumns = 512;  // of a band that are held together; a tile has no more

inline int64_t strip_of(const TileTask& task) { return kStripColumns / task.tile_columns * task.tile_columns; }
inline int64_t strips_of(const TileTask& task) { return (task.columns + strip_of(task) - 1) / strip_of(task); }

// Each over rows (tokens, numbers; strips of bands) [begin, end), for both dtypes: [0] F32, [1] BF16.
struct TrainKernels {
  void (*norm[2])(const NormTask&, int64_t begin, int64_t end);
  void (*norm_back[2])(const NormTask&, int64_t begin, int64_t end);
  void (*glu[2])(const GluTask&, int64_t begin, int64_t end);
  void (*glu_back[2])(const GluTask&, int64_t begin, int64_t end);
  void (*rope[2])(const RopeTask&, int64_t begin, int64_t end);
  void (*combine[2])(const CombineTask&, int64_t begin, int64_t end);
  void (*combine_back[2])(const CombineTask&, int64_t begin, int64_t end);
  void (*entropy[2])(const EntropyTask&, int64_t begin, int64_t end);
  void (*adam[2])(const AdamTask&, int64_t begin, int64_t end);
  void (*quantize[2])(const TileTask&, int64_t begin, int64_t end);
  void (*dequantize)(const TileTask&, int64_t begin, int64_t end);
};

extern const TrainKernels kScalarTrain;
extern const TrainKernels kAvx2Train;
extern const TrainKernels kAvx512Train;

}  // namespace kvern
