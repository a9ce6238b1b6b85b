// Causal attention over expanded keys and values: checks, and cuts the work into (head, block of queries). A lane is a
// query, keys and values are read where they lie, and rows that no query of a block sees are never touched.
#include <algorithm>
#include <vector>

#include "attention.h"
#include "attention_common.h"
#include "kernels.h"
#include "kvern.h"
#include "pool.h"
#include "sound.h"

namespace kvern {
namespace {

struct Problem {
  const ExpandedAttention& call;
  const Kernels& kernels;
  Form form;
  int64_t blocks;  // of kAttendLanes queries
};

int64_t size_of(int dtype) { return dtype == KVERN_F32 ? 4 : 2; }

Attend task_of(const Problem& problem, int64_t head) {
  const ExpandedAttention& call = problem.call;
  const int64_t row = call.nope + call.value;
  Attend task{};
  task.dim = call.nope + call.rope_size;
  task.rank = call.value;
  task.scale = log2_scale(call.scale);
  task.context.data = static_cast<const char*>(call.kv) + head * row * size_of(call.dtype);
  task.context.dtype = call.dtype;
  task.context.stride = call.heads * row;
  task.context.rope = call.rope;
  task.context.rope_stride = call.rope_stride;
  task.context.nope = call.nope;
  task.context.rope_size = call.rope_size;
  task.context.value_at = call.nope;
  return task;
}

bool are_sizes_sound(const ExpandedAttention& call) {
  return is_float(call.dtype) && call.tokens >= 0 && call.tokens <= call.context && call.heads >= 1 && call.value >= 1 &&
         is_addressable({call.context, call.heads, call.nope}) && is_addressable({call.context, call.heads, call.rope_size}) &&
         is_addressable({call.context, call.heads, call.value}) && is_addressable({call.context, call.rope_stride}) &&
         call.rope_stride >= call.rope_size;
}

// The last blocks come first: they see most.
void attend_block(const Problem& problem, int64_t chunk) {
  thread_local std::vector<float> q, partial, scratch, merged;
  thread_local std::vector<int64_t> seen;
  const ExpandedAttention& call = problem.call;
  const int64_t lanes = problem.form.lanes, head = chunk % call.heads;
  const int64_t first = (problem.blocks - 1 - chunk / call.heads) * kAttendLanes;
  const int64_t count = std::min(kAttendLanes, call.tokens - first);
  Attend task = task_of(problem, head);
  task.vecs = divide_up(count, lanes);
  task.end = call.context - call.tokens + first + count;
  float* packed = room(q, task.vecs * problem.form.q_size(task.dim));
  int64_t* limits = room(seen, task.vecs * lanes);
  std::fill_n(packed, task.vecs * problem.form.q_size(task.dim), 0.0f);
  std::fill_n(limits, task.vecs * lanes, task.end);
  for (int64_t lane = 0; lane < count; ++lane) {
    const int64_t from = ((first + lane) * call.heads + head) * task.dim;
    pack_lane(problem.form, call.q, call.dtype, from, task.dim, packed, lane);
    limits[lane] = task.end - (count - 1 - lane);
  }
  const int64_t size = (task.rank + 2) * lanes;
  task.q = packed;
  task.seen = limits;
  task.partial = room(partial, task.vecs * size);
  task.scratch = room(scratch, attend_scratch(task.dim, task.rank));
  problem.form.attend(task);
  float* out = room(merged, task.rank * lanes);
  for (int64_t vec = 0; vec < task.vecs; ++vec) {
    problem.form.merge({task.partial + vec * size, 1, 0, task.rank, 0, task.rank, out});
    for (int64_t lane = vec * lanes; lane < std::min(count, (vec + 1) * lanes); ++lane) {
      const int64_t to = ((first + lane) * call.heads + head) * task.rank;
      scatter_lane(problem.form, call.out, call.out_dtype, to, out, lane % lanes, task.rank);
    }
  }
}

}  // namespace

void expanded_attention(const ExpandedAttention& call) {
  const Kernels& kernels = kernels_in_use();
  const Problem problem{call, kernels, Form(kernels, call.dtype, call.dtype, call.nope + call.rope_size, call.value), divide_up(call.tokens, kAttendLanes)};
  parallel_for(
      problem.blocks * call.heads,
      [](const void* context, int64_t chunk) { attend_block(*static_cast<const Problem*>(context), chunk); }, &problem);
}

}  // namespace kvern

int kvern_expanded_attention(void* out, const void* q, const void* kv, const void* rope, int64_t rope_stride, int dtype,
                             int64_t tokens, int64_t context, int64_t heads, int64_t nope, int64_t rope_size,
                             int64_t value, float scale) {
  const kvern::ExpandedAttention call{out, dtype, q, kv, rope, rope_stride, dtype, tokens, context, heads, nope, rope_size, value, scale};
  if (!kvern::are_sizes_sound(call)) return KVERN_BAD_ARGUMENT;
  if (tokens == 0) return KVERN_OK;
  if (!out || !kv || (nope + rope_size > 0 && !q) || (rope_size > 0 && !rope)) return KVERN_BAD_ARGUMENT;
  kvern::expanded_attention(call);
  return KVERN_OK;
}
