// Attention for callers inside the library; kvern.h has the same as plain C, and says what is computed. Both run on the
// pool, and must not be called from within a chunk of the pool. They check nothing: the C functions check their arguments,
// kvern_check_layer and kvern_run_layers those of a layer.
#pragma once

#include <cstdint>

namespace kvern {

// kvern_paged_latent_attention, with a dtype of its own for the output.
struct PagedAttention {
  void* out;  // [queries, heads, rank] dense
  int out_dtype;
  const void* q;  // [queries, heads, dim] dense
  int q_dtype;
  int64_t queries;
  const void* rows;  // [row_count, dim], or records
  int rows_dtype;
  int64_t row_count, row_stride;
  const int32_t* tables;  // [sequences, ...]
  int64_t table_stride;
  const int32_t* contexts;  // [sequences]
  const int32_t* starts;    // [sequences + 1]
  int64_t sequences, block_size, heads, dim, rank;
  float scale;
};

void paged_latent_attention(const PagedAttention& call);

// kvern_expanded_attention, with a dtype of its own for the output.
struct ExpandedAttention {
  void* out;  // [tokens, heads, value] dense
  int out_dtype;
  const void* q;     // [tokens, heads, nope + rope_size] dense
  const void* kv;    // [context, heads, nope + value] dense
  const void* rope;  // [context, rope_size]
  int64_t rope_stride;
  int dtype;  // of q, kv and rope
  int64_t tokens, context, heads, nope, rope_size, value;
  float scale;
};

void expanded_attention(const ExpandedAttention& call);

}  // namespace kvern
