/* The second half of Kvern's C interface: packed weights, and a whole decoder layer of the DeepSeek-V3 architecture over
 * them. Conventions as in kvern.h. The structs hold pointers that the caller keeps alive; nothing is copied or freed. */
#ifndef KVERN_LAYER_H
#define KVERN_LAYER_H

#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Kinds of packed weights, beside the dtypes of kvern.h: F32, BF16, and F8_E4M3 with its scales, */
enum { KVERN_INT4 = 3,  /* values -8 .. 7 with a BF16 scale for each row and `group` (32 or 128) columns, */
       KVERN_INT4_TURNED = 4, /* the transpose of such: a BF16 scale for each column and `group` rows, */
       KVERN_PICKS = 5, /* rows with one number that is not zero: y[i] = factors[i] * x[picks[i]] */
       KVERN_HAS_NAN = 3 };  /* a code of kvern_pack: these E4M3 weights hold a NaN, pack them as F32 */

/* A weight [n, k]. Which bytes `tiles` holds depends on the instruction set in use (kvern_packed_order). */
typedef struct {
  const void* tiles;  /* kvern_packed_bytes */
  const void* scales; /* kvern_scale_bytes */
  const int32_t* picks;
  const float* factors;
  int64_t n, k;
  int32_t kind, group;
} kvern_packed;

/* A name for the arrangement of the tiles: files of packed weights made for one are useless for another. */
const char* kvern_packed_order(void);
/* 0 for arguments that cannot be packed. */
int64_t kvern_packed_bytes(int kind, int64_t n, int64_t k);
int64_t kvern_scale_bytes(int kind, int64_t n, int64_t k, int64_t group);

/* Packs weight [n, k] (dtype F32, BF16 or F8_E4M3 with scale [ceil(n / 128), ceil(k / 128)] FP32; or INT4: int32 words
 * [n, ceil(k / 8)], value + 8 in four bits, the first in the lowest, with scale [n, k / group] BF16; or INT4_TURNED: the
 * same words with scale [n / group, k]) as `kind`: its own, or F32 for everything but 4 bits. Strides count elements; words
 * for 4 bits. */
int kvern_pack(void* tiles, void* scales, int kind, const void* weight, int dtype, int64_t stride, const void* scale,
               int64_t scale_stride, int64_t group, int64_t n, int64_t k);

/* y[m, n] = x[m, k] w^T (+ bias[n]), all FP32, rows dense. `activations` is what x is rounded to: F32 or BF16; F32 counts
 * with 16 bits of mantissa where the kernels multiply BF16 pairs, else with all. */
int kvern_multiply(const kvern_packed* w, const float* x, int64_t m, int activations, const float* bias, float* y);

/* 64-bit hash of a buffer, for files: computed with all threads, the same whatever their number. */
uint64_t kvern_hash(const void* data, int64_t bytes);

/* down(silu(gate x) * up x): a routed expert, the shared experts as one, or the feed-forward of a dense layer. */
typedef struct {
  kvern_packed gate, up; /* [width, hidden] */
  kvern_packed down;     /* [hidden, width] */
} kvern_expert;

typedef struct {
  int64_t hidden, heads, nope, rope, value, rank;
  int64_t q_rank; /* 0: no query latent, q_a gives the queries themselves */
  float norm_eps, latent_eps, softmax_scale;
  const float *input_norm, *q_norm, *kv_norm, *post_norm;
  kvern_packed q_a, kv_a; /* [q_rank or heads * (nope + rope), hidden]; [rank + rope, hidden] */
  const float *q_a_bias, *kv_a_bias; /* or NULL */
  kvern_packed q_b;       /* [heads * (nope + rope), q_rank], when q_rank > 0 */
  const kvern_packed* absorb; /* [heads] of [rank, nope], when nope > 0; of one kind, as are the next two */
  const kvern_packed* keys;   /* [heads] of [nope, rank], when nope > 0 */
  const kvern_packed* values; /* [heads] of [value, rank] */
  kvern_packed o_proj;        /* [hidden, heads * value] */
  const float* o_bias;        /* or NULL */
  /* Feed-forward: the first `common` experts see every token, the `routed` ones after them those that the gate picks. */
  const kvern_expert* experts; /* [common + routed] */
  int64_t common, routed, top_k, groups, kept_groups, normalise;
  float factor;
  kvern_packed gate;      /* [routed, hidden] */
  const float* gate_bias; /* [routed] */
} kvern_layer;

/* What kvern_step.counters counts: nanoseconds of each stage, bytes of weights (each product's once) and of cache rows
 * (those that the last token of each sequence sees) that had to be read. */
enum { KVERN_STAGE_PROJECT, KVERN_STAGE_ATTEND, KVERN_STAGE_OUTPUT, KVERN_STAGE_ROUTE, KVERN_STAGE_EXPERTS, KVERN_STAGE_HEAD,
       KVERN_WEIGHT_BYTES, KVERN_CACHE_BYTES, KVERN_COUNTERS };

/* Tokens of several sequences, one after the other (see kvern_paged_latent_attention for the books). */
typedef struct {
  int64_t tokens;
  float* x;        /* [tokens, hidden], what flows between layers */
  float* rotation; /* [tokens, rope / 2, 2]: cosine and sine of each pair */
  int64_t* slots;  /* [tokens]: the cache row of each */
  const int32_t *tables, *contexts, *starts;
  const uint8_t* expanded; /* [sequences]: attend over expanded keys and values; NULL: none does */
  int64_t table_stride, sequences, block_size;
  int64_t row_count, row_stride; /* row_stride counts elements, for rows in LATENT8 bytes */
  int32_t rows_dtype;            /* F32, BF16, or LATENT8: records of bytes, see kvern_encode_latents */
  int32_t activations;           /* F32 or BF16 */
  int64_t* counters; /* [KVERN_COUNTERS], added to; or NULL */
} kvern_step;

/* KVERN_OK when every size of the layer fits together; to be called once. */
int kvern_check_layer(const kvern_layer* layer);

/* Fills slots and rotation from the books: angle = position * frequencies[i] in FP32, times `factor`. frequencies is
 * [rope / 2]. Then, with a table [vocabulary, hidden] (dtype F32 or BF16), x from ids [tokens]; without one x stays. */
int kvern_begin_step(const kvern_step* step, const float* frequencies, int64_t rope, float factor, const void* table,
                     int dtype, int64_t vocabulary, int64_t hidden, const int64_t* ids);

/* `count` decoder layers one after another: step->x += attention(norm(x)); step->x += feed_forward(norm(x)). `rows` is the
 * cache of the first, that of the next lies layer_bytes further; the latents of the tokens are written to it first.
 * Checks the step's books, and nothing is written when they are bad. */
int kvern_run_layers(const kvern_layer* layers, int64_t count, const kvern_step* step, void* rows, int64_t layer_bytes);

/* out[i] = norm(x[rows[i]]) in FP32 [count, hidden]; logits [count, head->n] = out head^T, when head is not NULL. */
int kvern_run_head(const kvern_packed* head, const float* norm, float eps, const kvern_step* step, int64_t hidden,
                   const int64_t* rows, int64_t count, float* out, float* logits);

#ifdef __cplusplus
}
#endif

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
