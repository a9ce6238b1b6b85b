// The C interface of train_attention.h: checks arguments, and cuts the work into heads of documents, the longest first.
#include "train_attention.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <numeric>
#include <vector>

#include "kvern.h"
#include "pool.h"
#include "sound.h"

namespace kvern {
namespace {

// nullptr where there are none.
const DocumentKernels* kernels() {
#if defined(KVERN_X86)
  if (std::strcmp(kvern_isa(), "avx512bf16") == 0 || std::strcmp(kvern_isa(), "amx") == 0) return &kAvx512Bf16Documents;
#endif
  return nullptr;
}

using HeadKernel = decltype(DocumentKernels::forward);

struct Documents {
  const int64_t* starts;
  int64_t count;

  int64_t length(int64_t document) const { return starts[document + 1] - starts[document]; }
  bool cover(int64_t tokens) const {
    if (count < 0 || !starts || starts[0] != 0 || starts[count] != tokens) return false;
    return std::is_sorted(starts, starts + count + 1);
  }
};

bool is_sound(const DocumentAttention& task, const Documents& documents, int64_t tokens) {
  return task.heads >= 1 && task.nope >= 0 && task.shared >= 0 && task.value >= 1 && (task.nope > 0 || task.shared > 0) &&
         task.rope_stride >= task.shared && is_addressable({tokens, task.heads, task.nope}) &&
         is_addressable({tokens, task.heads, task.shared}) && is_addressable({tokens, task.heads, task.value}) &&
         is_addressable({tokens, task.rope_stride}) && documents.cover(tokens);
}

struct Work {
  const DocumentAttention& task;
  const Documents& documents;
  HeadKernel kernel;
  int64_t room;
  std::vector<int64_t> order;
  mutable std::atomic<int64_t> next{0};

  // Each thread takes heads until none is left, so that it needs room for one only.
  void take_heads() const {
    const std::unique_ptr<uint8_t[]> mine(new uint8_t[static_cast<size_t>(room)]);
    for (int64_t at; (at = next.fetch_add(1)) < documents.count * task.heads;) {
      const int64_t document = order[static_cast<size_t>(at / task.heads)];
      kernel(task, at % task.heads, documents.starts[document], documents.length(document), mine.get());
    }
  }
};

void run(const DocumentAttention& task, const Documents& documents, const DocumentKernels& kernels, HeadKernel kernel) {
  std::vector<int64_t> order(static_cast<size_t>(documents.count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return documents.length(a) > documents.length(b); });
  const Work work{task, documents, kernel, kernels.room(task, documents.length(order[0])), order};
  parallel_for(
      std::min<int64_t>(threads(), documents.count * task.heads),
      [](const void* context, int64_t) { static_cast<const Work*>(context)->take_heads(); }, &work);
}

}  // namespace
}  // namespace kvern

using namespace kvern;

int kvern_document_attention(uint16_t* out, float* lse, const uint16_t* q, const uint16_t* kv, const uint16_t* rope,
                             int64_t rope_stride, const int64_t* starts, int64_t documents, int64_t tokens, int64_t heads,
                             int64_t nope, int64_t rope_size, int64_t value, float scale) {
  const DocumentAttention task{out, lse, q, kv, rope, rope_stride, heads, nope, rope_size, value, scale, nullptr, nullptr, nullptr, nullptr};
  const Documents all{starts, documents};
  if (!is_sound(task, all, tokens)) return KVERN_BAD_ARGUMENT;
  if (!kernels()) return KVERN_UNSUPPORTED_ISA;
  if (tokens == 0) return KVERN_OK;
  if (!out || !lse || !q || !kv || (rope_size && !rope)) return KVERN_BAD_ARGUMENT;
  run(task, all, *kernels(), kernels()->forward);
  return KVERN_OK;
}

int kvern_document_attention_backward(uint16_t* dq, uint16_t* dkv, float* drope, const uint16_t* dout, const uint16_t* out,
                                      const float* lse, const uint16_t* q, const uint16_t* kv, const uint16_t* rope,
                                      int64_t rope_stride, const int64_t* starts, int64_t documents, int64_t tokens, int64_t heads,
                                      int64_t nope, int64_t rope_size, int64_t value, float scale) {
  const DocumentAttention task{const_cast<uint16_t*>(out), const_cast<float*>(lse), q, kv, rope, rope_stride, heads, nope, rope_size,
                               value, scale, dout, dq, dkv, drope};
  const Documents all{starts, documents};
  if (!is_sound(task, all, tokens)) return KVERN_BAD_ARGUMENT;
  if (!kernels()) return KVERN_UNSUPPORTED_ISA;
  if (tokens == 0) return KVERN_OK;
  if (!dq || !dkv || !dout || !out || !lse || !q || !kv || (rope_size && (!rope || !drope))) return KVERN_BAD_ARGUMENT;
  run(task, all, *kernels(), kernels()->backward);
  return KVERN_OK;
}
