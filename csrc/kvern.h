/* Kvern's CPU kernels: a plain C interface of raw pointers and sizes, without Python or torch headers.
 *
 * All matrices are row-major; a stride counts elements from one row to the next and the last dimension is dense.
 * Functions that return int return KVERN_OK or one of the codes below and then have written nothing.
 * Calls are safe from several threads; while one call owns the thread pool, others run on their own thread.
 */
#ifndef KVERN_H
#define KVERN_H

#include <stdint.h>

#if defined(__GNUC__)
#pragma GCC visibility push(default)
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define KVERN_ABI 6

enum { KVERN_F32 = 0, KVERN_BF16 = 1, KVERN_F8_E4M3 = 2 };                 /* dtypes; E4M3 is the "fn" form: no infinities */
enum { KVERN_LATENT8 = 5 }; /* of cache rows only: records of bytes, see kvern_encode_latents */
enum { KVERN_OK = 0, KVERN_BAD_ARGUMENT = 1, KVERN_UNSUPPORTED_ISA = 2 };

int kvern_abi(void); /* KVERN_ABI of the library: a caller built for another number must not use it */

/* Picks the kernels: "scalar", "avx2", "avx512", "avx512bf16", "amx", or NULL for the best of this CPU (the state at load).
 * KVERN_UNSUPPORTED_ISA when this CPU or this build lacks it, KVERN_BAD_ARGUMENT for an unknown name. */
int kvern_select_isa(const char* name);
const char* kvern_isa(void);

/* Threads that take part in a call, the caller included. Starts at 1. The workers start with the next call. */
int kvern_set_threads(int threads);
int kvern_threads(void);

/* y[m, n] = sum_k x[m, k] * weight[n, k] (+ bias[n]), accumulated in FP32.
 *   y       [m, n] dense, dtype y_dtype (F32 or BF16, rounded to nearest even)
 *   x       [m, k] dense, dtype x_dtype (F32 or BF16)
 *   weight  [n, k] dtype weight_dtype, rows weight_stride apart
 *   scale   [ceil(n / 128), ceil(k / 128)] FP32, rows scale_stride apart; for F8 weights only, else NULL.
 *           The weight that counts is weight[n, k] * scale[n / 128, k / 128].
 *   bias    [n] dtype bias_dtype (F32 or BF16), or NULL */
int kvern_linear(void* y, int y_dtype, const void* x, int x_dtype, const void* weight, int weight_dtype,
                 int64_t weight_stride, const float* scale, int64_t scale_stride, const void* bias, int bias_dtype,
                 int64_t m, int64_t n, int64_t k);

/* out[n, k] = weight[n, k] * scale[n / 128, k / 128], dense, F32 or BF16 (rounded to nearest even). */
int kvern_dequantize(void* out, int out_dtype, const void* weight, int64_t weight_stride, const float* scale,
                     int64_t scale_stride, int64_t n, int64_t k);

/* Attention in latent space (MLA, absorbed) over latents that lie in blocks, softmax in FP32:
 *   out[t, h] = sum_r p[r] * row_r[:rank],   p = softmax over the visible rows r of q[t, h] . row_r * scale
 *   out       [queries, heads, rank] dense, dtype
 *   q         [queries, heads, dim] dense, dtype (F32 or BF16)
 *   rows      [row_count, dim] rows_dtype (F32, BF16 or LATENT8), rows row_stride apart: in elements, for LATENT8 in
 *             bytes. Numbers of LATENT8 are rounded to BF16 where they meet BF16 dot products, else they count in FP32.
 *   tables    [sequences, ceil(context / block_size) or more], rows table_stride apart: row r of sequence s is
 *             rows[tables[s, r / block_size] * block_size + r % block_size]
 *   contexts  [sequences] rows that the last query of a sequence sees; each query before it sees one fewer
 *   starts    [sequences + 1] offsets into q, from 0 to queries; a sequence has no more queries than rows
 * Every block number that is read is checked against row_count. A query's result depends on its rows alone, bit for bit.
 * On avx512bf16, BF16 queries over BF16 or LATENT8 rows take BF16 dot products: the weights p are rounded to BF16, and subnormal
 * numbers count as zeros. The same holds for the expanded form below. */
int kvern_paged_latent_attention(void* out, const void* q, int dtype, int64_t queries, const void* rows, int rows_dtype,
                                 int64_t row_count, int64_t row_stride, const int32_t* tables, int64_t table_stride,
                                 const int32_t* contexts, const int32_t* starts, int64_t sequences,
                                 int64_t block_size, int64_t heads, int64_t dim, int64_t rank, float scale);

/* Cache rows in 8 bits (LATENT8). The record of a latent of rank + rope numbers is, without padding,
 *   rank codes in E4M3 | ceil(rank / 128) scales in FP32 | rope numbers in BF16
 * and its numbers are code[i] * scale[i / 128]. For 512 + 64 it is the row of 656 bytes that FlashMLA defines.
 * Encoding: scale = max(amax / 448, 2^-126) over the 128 numbers, code = number / scale, all rounded to nearest even. So
 * zeros get the scale 2^-126. E4M3 has no infinity: a block that holds one, or a NaN, has the scale NaN and decodes to NaNs.
 *   records  [count] of rank + 4 ceil(rank / 128) + 2 rope bytes, `stride` bytes apart    latents  [count, rank + rope] */
int kvern_encode_latents(uint8_t* records, int64_t stride, const float* latents, int64_t count, int64_t rank, int64_t rope);
int kvern_decode_latents(float* latents, const uint8_t* records, int64_t stride, int64_t count, int64_t rank, int64_t rope);

/* Parts of a training step that are not products, and their gradients; dtype F32 or BF16, computed in FP32. Optional: a
 * caller looks them up, for libraries of the same KVERN_ABI may lack them.
 *   rms_norm  y [rows, size] = x inverse weight, inverse [rows] = 1 / sqrt(mean(x^2) + eps); rows of x `stride` apart. Backward:
 *             dw [parts, size], zeros before, gets the sums of as many parts of the rows
 *   swiglu    y [rows, size] = gate sigmoid(gate) up; rows of gate and up `stride` apart, of dgate and dup `dstride`
 *   rotate    y [tokens, heads, pairs, 2] = x times rotation [tokens, pairs, 2] as complex numbers, or times its conjugate (back)
 *   combine   out [tokens, size] = sum over k of weights [tokens, k] (NULL: ones) rows[places [tokens, k]], 0 <= places < tokens k,
 *             each once
 *   cross_entropy  losses [rows] of logits [rows, columns], which become softmax - onehot(target) where `gradient`; a negative
 *             target has neither
 *   adamw     m += (g - m) first;  v = v second + g^2 (1 - second);  p = p decay - rate m / (sqrt(v correction) + eps); m, v in dtype
 *   quantize_tiles  codes [rows, columns] E4M3 of x [rows, columns], rows stride apart, and scale [ceil(rows / tile_rows),
 *             ceil(columns / tile_columns)] = max(largest of the tile, smallest) / 448, rounded up to a power of two where wanted
 *   dequantize_tiles  out [rows, columns] F32 = codes, rows stride apart, times scale
 * 1 <= tile_columns <= 512; smallest >= 1e-30. A tile with NaN has NaN as its scale. */
int kvern_rms_norm(void* y, float* inverse, const void* x, int64_t stride, const float* weight, int dtype, int64_t rows, int64_t size,
                   float eps);
int kvern_rms_norm_backward(void* dx, float* dw, int64_t parts, const void* dy, const void* x, int64_t stride, const float* weight,
                            const float* inverse, int dtype, int64_t rows, int64_t size);
int kvern_swiglu(void* y, const void* gate, const void* up, int64_t stride, int dtype, int64_t rows, int64_t size);
int kvern_swiglu_backward(void* dgate, void* dup, int64_t dstride, const void* dy, const void* gate, const void* up, int64_t stride,
                          int dtype, int64_t rows, int64_t size);
int kvern_rotate(void* y, const void* x, int64_t token_stride, int64_t head_stride, const float* rotation, int back, int dtype,
                 int64_t tokens, int64_t heads, int64_t pairs);
int kvern_combine(void* out, const void* rows, const float* weights, const int64_t* places, int dtype, int64_t tokens, int64_t k,
                  int64_t size);
int kvern_combine_backward(void* drows, float* dweights, const void* dy, const void* rows, const float* weights, const int64_t* places,
                           int dtype, int64_t tokens, int64_t k, int64_t size);
int kvern_cross_entropy(float* losses, void* logits, const int64_t* targets, int gradient, int dtype, int64_t rows, int64_t columns);
int kvern_adamw(float* parameter, const float* gradient, void* mean, void* square, int dtype, int64_t count, float first, float second,
                float decay, float rate, float correction, float eps);
int kvern_quantize_tiles(uint8_t* codes, float* scale, const void* x, int64_t stride, int dtype, int64_t rows, int64_t columns,
                         int64_t tile_rows, int64_t tile_columns, int power_of_two, float smallest);
int kvern_dequantize_tiles(float* out, const uint8_t* codes, int64_t stride, const float* scale, int64_t rows, int64_t columns,
                           int64_t tile_rows, int64_t tile_columns);

/* Causal attention within documents and its gradients, for training; BF16 where nothing else is said. Optional as the
 * parts above; KVERN_UNSUPPORTED_ISA but on avx512bf16 and amx.
 *   out[t, h] = sum_c p[c] kv[c, h, nope:],   p = softmax over c <= t of t's document of q[t, h] . (kv[c, h, :nope], rope[c]) scale
 *   out, dout  [tokens, heads, value]      lse  [tokens, heads] FP32: log2 of the sum of what p is divided by
 *   q, dq      [tokens, heads, nope + rope_size]      kv, dkv  [tokens, heads, nope + value]
 *   rope       [tokens, rope_size], rows rope_stride apart      drope  [tokens, heads, rope_size] FP32, to be summed over heads
 *   starts     [documents + 1] from 0 to tokens, never falling: where documents begin
 * What comes of a document depends on it alone, bit for bit. Subnormal numbers count as zeros. */
int kvern_document_attention(uint16_t* out, float* lse, const uint16_t* q, const uint16_t* kv, const uint16_t* rope,
                             int64_t rope_stride, const int64_t* starts, int64_t documents, int64_t tokens, int64_t heads,
                             int64_t nope, int64_t rope_size, int64_t value, float scale);
int kvern_document_attention_backward(uint16_t* dq, uint16_t* dkv, float* drope, const uint16_t* dout, const uint16_t* out,
                                      const float* lse, const uint16_t* q, const uint16_t* kv, const uint16_t* rope,
                                      int64_t rope_stride, const int64_t* starts, int64_t documents, int64_t tokens, int64_t heads,
                                      int64_t nope, int64_t rope_size, int64_t value, float scale);

/* Causal attention over keys and values rebuilt from the latents (MLA, expanded), softmax in FP32:
 *   out[t, h] = sum_c p[c] * kv[c, h, nope:],   p = softmax over c <= context - tokens + t of q[t, h] . k[c, h] * scale,
 *   k[c, h] = (kv[c, h, :nope], rope[c])
 *   out   [tokens, heads, value] dense      q  [tokens, heads, nope + rope_size] dense
 *   kv    [context, heads, nope + value] dense    rope  [context, rope_size], rows rope_stride apart
 * All of dtype (F32 or BF16). 0 <= tokens <= context; nope, rope_size >= 0; value >= 1. */
int kvern_expanded_attention(void* out, const void* q, const void* kv, const void* rope, int64_t rope_stride, int dtype,
                             int64_t tokens, int64_t context, int64_t heads, int64_t nope, int64_t rope_size,
                             int64_t value, float scale);

/* One draw from a row of logits [size], of which `edits` count as `scores` instead:
 *   x = the scores; p = e^((x - max x) / temperature), cut to p >= min_p, then to the top_k largest, then to the fewest
 *   largest whose share of what was left reaches top_p; the lower id first where scores tie. The id is where the cumulative
 *   sum of p, in order of id, passes `uniform` times its total. Temperature 0: the largest, the lower id first.
 * Weights and sums are FP64 with relative errors under 1e-12 together: exactly this id comes out unless `uniform`, top_p or
 * min_p lie closer than that to where the outcome changes. A row's outcome depends on that row alone. */
typedef struct {
  const float* logits;
  const int64_t* edited; /* [edits] ids; of equal ones the last counts */
  const double* scores;  /* [edits] */
  int64_t size, edits;   /* 1 <= size < 2^31 */
  int64_t top_k;         /* 0: all */
  double temperature;    /* 0, or such that it and 1 / temperature are finite */
  double top_p, min_p;   /* 0 .. 1; top_p 1 and min_p 0 keep all */
  double uniform;        /* 0 <= uniform < 1 */
} kvern_draw;

enum { KVERN_NOT_FINITE = -1,    /* instead of an id: a logit is a NaN, or the largest is infinite */
       KVERN_NOTHING_LEFT = -2 }; /* the same of the edited scores */

/* ids[i]: the id drawn from rows[i], or one of the codes above. */
int kvern_sample(const kvern_draw* rows, int64_t n, int64_t* ids);

/* Log-probabilities under a row of logits [size]: of `token` (-inf for one outside) and of the `best` largest, falling, the
 * lower id first where they tie. FP64, to 1e-12. */
typedef struct {
  const float* logits;
  int64_t size, token, best; /* 0 <= best <= size */
  int64_t* ids;              /* out, [best] */
  double* logprobs;          /* out, [1 + best]: token's, then those of ids; the first is a NaN, and nothing else is
                                written, where a logit is a NaN or the largest is infinite */
} kvern_scored;

int kvern_logprobs(const kvern_scored* rows, int64_t n);

/* Reads `bytes` bytes once with all threads and returns the sum of their 64-bit words (a rest under 8 is left out):
 * the read bandwidth that a kernel can hope for. */
uint64_t kvern_read(const void* data, int64_t bytes);

#ifdef __cplusplus
}
#endif

#if defined(__GNUC__)
#pragma GCC visibility pop
#endif
#endif
