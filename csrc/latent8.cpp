// Cache rows in 8 bits for callers outside the library: encoded and decoded row by row on the pool.
#include "latent8.h"

#include <algorithm>

#include "kvern.h"
#include "packed.h"
#include "pool.h"
#include "sound.h"

namespace kvern {
namespace {

constexpr int64_t kRowsTogether = 16;

template <class Body>
void each_row(int64_t count, const Body& body) {
  const auto chunk = [&](int64_t index) {
    for (int64_t r = index * kRowsTogether; r < std::min(count, (index + 1) * kRowsTogether); ++r) body(r);
  };
  parallel_for(
      (count + kRowsTogether - 1) / kRowsTogether,
      [](const void* context, int64_t index) { (*static_cast<const decltype(chunk)*>(context))(index); }, &chunk);
}

bool are_sound(const void* records, int64_t stride, const void* numbers, int64_t count, int64_t rank, int64_t rope) {
  if (rank < 1 || !is_addressable({count, rank}) || !is_addressable({count, rope}) || !is_addressable({count, stride})) return false;
  if (stride < latent8_bytes(rank, rope)) return false;
  return count == 0 || (records && numbers);
}

}  // namespace
}  // namespace kvern

using namespace kvern;

int kvern_encode_latents(uint8_t* records, int64_t stride, const float* latents, int64_t count, int64_t rank, int64_t rope) {
  if (!are_sound(records, stride, latents, count, rank, rope)) return KVERN_BAD_ARGUMENT;
  const auto encode = packed_kernels().rows.encode;
  each_row(count, [&](int64_t r) { encode(latents + r * (rank + rope), rank, rope, records + r * stride); });
  return KVERN_OK;
}

int kvern_decode_latents(float* latents, const uint8_t* records, int64_t stride, int64_t count, int64_t rank, int64_t rope) {
  if (!are_sound(records, stride, latents, count, rank, rope)) return KVERN_BAD_ARGUMENT;
  const auto decode = packed_kernels().rows.decode;
  each_row(count, [&](int64_t r) { decode(records + r * stride, rank, rope, latents + r * (rank + rope)); });
  return KVERN_OK;
}
