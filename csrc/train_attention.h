// Causal attention within documents and its gradients, for a training step: what kvern_document_attention has checked.
#pragma once

#include <cstdint>

namespace kvern {

// All rows are those of kvern.h; of gradients, only backward reads and writes.
struct DocumentAttention {
  uint16_t* out;
  float* lse;
  const uint16_t *q, *kv, *rope;
  int64_t rope_stride, heads, nope, shared, value;
  float scale;
  const uint16_t* dout;
  uint16_t *dq, *dkv;
  float* drope;
};

// Of one head of the document [first, first + length), in `room` bytes.
struct DocumentKernels {
  int64_t (*room)(const DocumentAttention&, int64_t length);
  void (*forward)(const DocumentAttention&, int64_t head, int64_t first, int64_t length, uint8_t* room);
  void (*backward)(const DocumentAttention&, int64_t head, int64_t first, int64_t length, uint8_t* room);
};

extern const DocumentKernels kAvx512Bf16Documents;

}  // namespace kvern
