// The C interface of train.h's loops: checks arguments, picks the kernels, cuts the work into chunks of rows.
#include "train.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"
#include "kvern.h"
#include "pool.h"
#include "sound.h"

namespace kvern {
namespace {

constexpr int64_t kNumbersTogether = 16 * 1024;  // of a chunk: some microseconds, small beside a stolen core

const TrainKernels& kernels() {
#if defined(KVERN_X86)
  const char* isa = kvern_isa();
  if (std::strcmp(isa, "avx2") == 0) return kAvx2Train;
  if (std::strcmp(isa, "scalar") != 0) return kAvx512Train;
#endif
  return kScalarTrain;
}

bool is_float(int dtype) { return dtype == KVERN_F32 || dtype == KVERN_BF16; }

bool has_tiles(int64_t rows, int64_t stride, int64_t columns, int64_t tile_rows, int64_t tile_columns) {
  return columns >= 0 && stride >= columns && tile_rows >= 1 && tile_columns >= 1 && tile_columns <= kStripColumns &&
         is_addressable({rows, stride}) && is_addressable({rows, tile_rows});
}

template <class Task>
void run(void (*body)(const Task&, int64_t, int64_t), const Task& task, int64_t rows, int64_t size) {
  const int64_t step = std::max<int64_t>(1, kNumbersTogether / std::max<int64_t>(1, size));
  const auto chunk = [&](int64_t index) { body(task, index * step, std::min(rows, (index + 1) * step)); };
  parallel_for(
      (rows + step - 1) / step,
      [](const void* context, int64_t index) { (*static_cast<const decltype(chunk)*>(context))(index); }, &chunk);
}

int64_t units_of(const TileTask& task) { return (task.rows + task.tile_rows - 1) / task.tile_rows * strips_of(task); }
int64_t numbers_of(const TileTask& task) { return std::min(task.rows, task.tile_rows) * std::min(task.columns, strip_of(task)); }

}  // namespace
}  // namespace kvern

using namespace kvern;

int kvern_rms_norm(void* y, float* inverse, const void* x, int64_t stride, const float* weight, int dtype, int64_t rows, int64_t size,
                   float eps) {
  if (!is_float(dtype) || size < 1 || stride < size || !is_addressable({rows, stride})) return KVERN_BAD_ARGUMENT;
  run(kernels().norm[dtype], NormTask{x, nullptr, y, weight, inverse, nullptr, stride, size, eps}, rows, size);
  return KVERN_OK;
}

int kvern_rms_norm_backward(void* dx, float* dw, int64_t parts, const void* dy, const void* x, int64_t stride, const float* weight,
                            const float* inverse, int dtype, int64_t rows, int64_t size) {
  if (!is_float(dtype) || size < 1 || parts < 1 || stride < size || !is_addressable({rows, stride}) || !is_addressable({parts, size}))
    return KVERN_BAD_ARGUMENT;
  const auto body = kernels().norm_back[dtype];
  const int64_t step = (rows + parts - 1) / parts;
  const auto chunk = [&](int64_t part) {
    const NormTask task{x, dy, dx, weight, const_cast<float*>(inverse), dw + part * size, stride, size, 0};
    body(task, std::min(rows, part * step), std::min(rows, (part + 1) * step));
  };
  parallel_for(
      parts, [](const void* context, int64_t index) { (*static_cast<const decltype(chunk)*>(context))(index); }, &chunk);
  return KVERN_OK;
}

int kvern_swiglu(void* y, const void* gate, const void* up, int64_t stride, int dtype, int64_t rows, int64_t size) {
  if (!is_float(dtype) || size < 0 || stride < size || !is_addressable({rows, stride})) return KVERN_BAD_ARGUMENT;
  run(kernels().glu[dtype], GluTask{gate, up, nullptr, y, nullptr, nullptr, stride, 0, size}, rows, size);
  return KVERN_OK;
}

int kvern_swiglu_backward(void* dgate, void* dup, int64_t dstride, const void* dy, const void* gate, const void* up, int64_t stride,
                          int dtype, int64_t rows, int64_t size) {
  if (!is_float(dtype) || size < 0 || stride < size || dstride < size || !is_addressable({rows, stride}) ||
      !is_addressable({rows, dstride}))
    return KVERN_BAD_ARGUMENT;
  run(kernels().glu_back[dtype], GluTask{gate, up, dy, nullptr, dgate, dup, stride, dstride, size}, rows, size);
  return KVERN_OK;
}

int kvern_rotate(void* y, const void* x, int64_t token_stride, int64_t head_stride, const float* rotation, int back, int dtype,
                 int64_t tokens, int64_t heads, int64_t pairs) {
  if (!is_float(dtype) || heads < 0 || pairs < 0 || !is_addressable({tokens, heads, pairs, 2})) return KVERN_BAD_ARGUMENT;
  const RopeTask task{x, y, rotation, token_stride, head_stride, heads, pairs, back ? -1.0f : 1.0f};
  run(kernels().rope[dtype], task, tokens, heads * pairs * 2);
  return KVERN_OK;
}

int kvern_combine(void* out, const void* rows, const float* weights, const int64_t* places, int dtype, int64_t tokens, int64_t k,
                  int64_t size) {
  if (!is_float(dtype) || k < 0 || size < 0 || !is_addressable({tokens, k, size})) return KVERN_BAD_ARGUMENT;
  run(kernels().combine[dtype], CombineTask{rows, nullptr, out, nullptr, weights, nullptr, places, k, size}, tokens, k * size);
  return KVERN_OK;
}

int kvern_combine_backward(void* drows, float* dweights, const void* dy, const void* rows, const float* weights, const int64_t* places,
                           int dtype, int64_t tokens, int64_t k, int64_t size) {
  if (!is_float(dtype) || k < 0 || size < 0 || !is_addressable({tokens, k, size})) return KVERN_BAD_ARGUMENT;
  const CombineTask task{rows, dy, nullptr, drows, weights, dweights, places, k, size};
  run(kernels().combine_back[dtype], task, tokens, k * size);
  return KVERN_OK;
}

int kvern_cross_entropy(float* losses, void* logits, const int64_t* targets, int gradient, int dtype, int64_t rows, int64_t columns) {
  if (!is_float(dtype) || columns < 1 || !is_addressable({rows, columns})) return KVERN_BAD_ARGUMENT;
  for (int64_t r = 0; r < rows; ++r) {
    if (targets[r] >= columns) return KVERN_BAD_ARGUMENT;
  }
  run(kernels().entropy[dtype], EntropyTask{logits, targets, losses, columns, gradient != 0}, rows, columns);
  return KVERN_OK;
}

int kvern_adamw(float* parameter, const float* gradient, void* mean, void* square, int dtype, int64_t count, float first, float second,
                float decay, float rate, float correction, float eps) {
  if (!is_float(dtype) || !is_addressable({count})) return KVERN_BAD_ARGUMENT;
  run(kernels().adam[dtype], AdamTask{parameter, gradient, mean, square, first, second, decay, rate, correction, eps}, count, 1);
  return KVERN_OK;
}

int kvern_quantize_tiles(uint8_t* codes, float* scale, const void* x, int64_t stride, int dtype, int64_t rows, int64_t columns,
                         int64_t tile_rows, int64_t tile_columns, int power_of_two, float smallest) {
  if (!is_float(dtype) || !(smallest >= 1e-30f) || !has_tiles(rows, stride, columns, tile_rows, tile_columns)) return KVERN_BAD_ARGUMENT;
  if (columns == 0) return KVERN_OK;
  const TileTask task{x, codes, scale, nullptr, stride, columns, rows, columns, tile_rows, tile_columns, smallest, power_of_two != 0};
  run(kernels().quantize[dtype], task, units_of(task), numbers_of(task));
  return KVERN_OK;
}

int kvern_dequantize_tiles(float* out, const uint8_t* codes, int64_t stride, const float* scale, int64_t rows, int64_t columns,
                           int64_t tile_rows, int64_t tile_columns) {
  if (!has_tiles(rows, stride, columns, tile_rows, tile_columns)) return KVERN_BAD_ARGUMENT;
  if (columns == 0) return KVERN_OK;
  const TileTask task{nullptr, const_cast<uint8_t*>(codes), const_cast<float*>(scale), out, 0, stride, rows, columns, tile_rows,
                      tile_columns, 0, false};
  run(kernels().dequantize, task, units_of(task), numbers_of(task));
  return KVERN_OK;
}
