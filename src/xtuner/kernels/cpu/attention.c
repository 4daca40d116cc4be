/* Causal attention of packed samples for CPUs that multiply bfloat16 (AVX512-BF16, AMX).
 *
 * Included by kernels.c. One thread processes the heads of a sample that share keys, or a single
 * head; scores stay in its L1 cache, and only the log-sum-exp of each row is saved for the backward
 * pass (arXiv:2205.14135, algorithms 1 and 4; arXiv:2307.08691, section 3.1). Only unmasked pairs of
 * query and key are multiplied, to within STEP of the diagonal.
 *
 *     forward    S = s Q K^T,  P = softmax(S),  O = P V,  L = log sum exp S
 *     backward   P = exp(S - L),  dV = P^T dO,  dP = dO V^T,  dS = s P * (dP - rowsum(dO * O)),
 *                dQ = dS K,  dK = dS^T Q
 *
 * Matrix products are in products.c, the backward pass in attention_backward.c.
 */

/* Keys per block: a multiple of ROWS_M and of STEP, to which lanes are rounded up. Samples are rounded
 * up to PADDING. */
#ifdef TILES
enum { KEYS = 256, STEP = 32, PADDING = LANES_B };
#else
enum { KEYS = 480, STEP = 16, PADDING = 3 * LANES_B };
#endif

/* Pack x [rows, width] by pairs of columns, in blocks of 64 rows. */
static void columns_of(const bf16 *x, int64_t rows, int64_t width, bf16 *out) {
    Matrix all = {.values = x, .row = width};
    for (int64_t i = 0; i < rows; i += LANES_B)
        pair_columns(&all, i, rows, width, LANES_B, out + i * width);
}

/* Pack x [rows, width] by pairs of rows. */
static void rows_of(const bf16 *x, int64_t rows, int64_t width, bf16 *out) {
    Matrix all = {.values = x, .row = width};
    pair_rows(&all, 0, rows, width, width, width, 0, out);
}

/* The output of `columns_of` for x [rows, width], as x^T [width, rows]. */
static void transpose_paired(const bf16 *x, int64_t rows, int64_t width, bf16 *out) {
    bf16 order[32];
    for (int i = 0; i < 32; i++) order[i] = (bf16)(i < 16 ? 2 * i : 2 * i - 31);
    const __m512i apart = _mm512_loadu_si512(order);
    for (int64_t i = 0; i < rows; i += 16)
        for (int64_t p = 0; p < width / 2; p++) {
            const bf16 *from = x + (i / LANES_B * (width / 2) + p) * 2 * LANES_B + i % LANES_B * 2;
            __m512i both = _mm512_permutexvar_epi16(apart, _mm512_loadu_si512(from));
            bf16 *to = out + 2 * p * rows + i;
            _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i *)(to + rows), _mm512_extracti64x4_epi64(both, 1));
        }
}

/* Inverse rotation, for a float32 gradient. */
static void turn_back(const float *x, const float *c, const float *s, bf16 *out, int64_t width) {
    if (!c) {
        LANES for (int64_t d = 0; d < width; d++) out[d] = to_bfloat16(x[d]);
        return;
    }
    int64_t half = width / 2;
    LANES for (int64_t d = 0; d < half; d++) {
        float a = x[d], b = x[d + half];
        out[d] = to_bfloat16(a * c[d] + b * s[d + half]);
        out[d + half] = to_bfloat16(b * c[d + half] - a * s[d]);
    }
}

/* Prefetch the head of a token that is read some rows later: the rows are too far apart for the
 * hardware prefetcher. */
INLINE void ask_ahead(const bf16 *x, int64_t stride, int64_t width) {
    for (int64_t d = 0; d < width; d += 32) _mm_prefetch(x + 16 * stride + d, _MM_HINT_T0);
}

/* Rows of one head, rotated, then zero rows up to `padded`. */
static void gather(const bf16 *x, int64_t stride, const float *cosine, const float *sine,
                   int64_t rows, int64_t padded, int64_t width, bf16 *out) {
    for (int64_t i = 0; i < rows; i++) {
        ask_ahead(x + i * stride, stride, width);
        turn_bfloat16(x + i * stride, cosine ? cosine + i * width : 0,
                      cosine ? sine + i * width : 0, out + i * width, width);
    }
    memset(out + rows * width, 0, (padded - rows) * width * sizeof(bf16));
}

/* Inputs of the forward and backward pass. q [tokens, heads, width] with row stride q_row; k and v with
 * kv_heads; cosine and sine [tokens, width] or NULL; sample i has length[i] tokens starting at
 * start[i]; a query attends to `window` tokens, including itself. */
typedef struct {
    const bf16 *q, *k, *v;
    const float *cosine, *sine;
    const int32_t *start, *length;
    int64_t samples, tokens, heads, kv_heads, width, q_row, k_row, v_row, window;
    float scale;
} Packed;

static const float *at(const float *angles, int64_t token, int64_t width) {
    return angles ? angles + token * width : 0;
}

/* Scratch memory of a thread for one head of a sample. */
typedef struct {
    bf16 *q, *keys, *values, *rows, *weights;
    float *scores, *sums;
} Forward;

static Forward forward_memory(char **scratch, int64_t padded, int64_t width) {
    const int64_t size = padded * width * 2;
    Forward m;
    m.q = take(scratch, size), m.keys = take(scratch, size);
    m.values = take(scratch, size), m.rows = take(scratch, size);
    m.scores = take(scratch, ROWS_M * KEYS * 4), m.sums = take(scratch, ROWS_M * width * 4);
    m.weights = take(scratch, ROWS_M * KEYS * 2);
    return m;
}

/* Pack the keys and values of one head of a sample. */
static void forward_keys(const Packed *x, int64_t sample, int64_t kv, char *scratch) {
    const int64_t width = x->width, start = x->start[sample], length = x->length[sample];
    const int64_t padded = round_up(length, PADDING);
    const Forward m = forward_memory(&scratch, padded, width);
    const float *c = at(x->cosine, start, width), *s = at(x->sine, start, width);
    gather(x->k + start * x->k_row + kv * width, x->k_row, c, s, length, padded, width, m.rows);
    columns_of(m.rows, padded, width, m.keys);
    gather(x->v + start * x->v_row + kv * width, x->v_row, 0, 0, length, padded, width, m.rows);
    rows_of(m.rows, padded, width, m.values);
}

/* One query head, after `forward_keys`. */
static void forward_head(const Packed *x, int64_t sample, int64_t h, bf16 *out, float *lse,
                         char *scratch) {
    const int64_t width = x->width, start = x->start[sample], length = x->length[sample];
    const int64_t padded = round_up(length, PADDING);
    const Forward m = forward_memory(&scratch, padded, width);
    bf16 *q = m.q, *keys = m.keys, *values = m.values, *weights = m.weights;
    float *scores = m.scores, *sums = m.sums;
    gather(x->q + start * x->q_row + h * width, x->q_row, at(x->cosine, start, width),
           at(x->sine, start, width), length, padded, width, q);
    const __m512 scale = _mm512_set1_ps(x->scale);
    for (int64_t i = 0; i < length; i += ROWS_M) {
        int64_t last = i + ROWS_M < length ? i + ROWS_M : length;
        int64_t first = i - x->window + 1 > 0 ? (i - x->window + 1) / LANES_B * LANES_B : 0;
        float top[ROWS_M], total[ROWS_M];
        for (int r = 0; r < ROWS_M; r++) top[r] = -INFINITY, total[r] = 0.0f;
        for (int64_t from = first; from < last;) {
            /* key blocks start and end at multiples of 64 */
            int64_t end = from + KEYS / LANES_B * LANES_B;
            end = end < last ? end : last;
            int64_t count = round_up(end - from, STEP);
            for (int64_t k = 0; k < count; k += LANES_B)
                product(count - k < LANES_B ? count - k : LANES_B, q + i * width, width,
                        keys + (from + k) / LANES_B * LANES_B * width, 2 * LANES_B, width / 2,
                        scores + k, KEYS, 0);
            for (int r = 0; r < ROWS_M; r++) {
                int64_t until = i + r + 1, since = until - x->window;
                float *row = scores + r * KEYS;
                __m512 highest = _mm512_set1_ps(-INFINITY);
                for (int64_t k = 0; k < count; k += 16) {
                    __m512i key = _mm512_add_epi32(LANE, _mm512_set1_epi32((int)(from + k)));
                    __mmask16 seen =
                        _mm512_cmplt_epi32_mask(key, _mm512_set1_epi32((int)until)) &
                        _mm512_cmpge_epi32_mask(key, _mm512_set1_epi32((int)(since > 0 ? since : 0)));
                    __m512 score = _mm512_mask_mul_ps(_mm512_set1_ps(-INFINITY), seen, scale,
                                                      _mm512_loadu_ps(row + k));
                    _mm512_storeu_ps(row + k, score);
                    highest = _mm512_max_ps(highest, score);
                }
                float high = _mm512_reduce_max_ps(highest);
                high = high > top[r] ? high : top[r];
                float before = top[r] == high ? 1.0f : exponential(top[r] - high);
                __m512 shift = _mm512_set1_ps(high), sum = _mm512_setzero_ps();
                for (int64_t k = 0; k < count; k += 16) {
                    __m512 e = exponentials(_mm512_sub_ps(_mm512_loadu_ps(row + k), shift));
                    sum = _mm512_add_ps(sum, e);
                    _mm256_storeu_si256((__m256i *)(weights + r * KEYS + k),
                                        (__m256i)_mm512_cvtneps_pbh(e));
                }
                total[r] = total[r] * before + _mm512_reduce_add_ps(sum);
                top[r] = high;
                if (from > first && before != 1.0f)
                    LANES for (int64_t d = 0; d < width; d++) sums[r * width + d] *= before;
            }
            product(width, weights, KEYS, values + from * width, 2 * width, count / 2, sums, width,
                    from > first);
            from = end;
        }
        for (int64_t r = 0; i + r < last; r++) {
            bf16 *to = out + (start + i + r) * x->heads * width + h * width;
            float share = 1.0f / total[r];
            LANES for (int64_t d = 0; d < width; d++) to[d] = to_bfloat16(sums[r * width + d] * share);
            lse[h * x->tokens + start + i + r] = top[r] + logf(total[r]);
        }
    }
}

/* Bytes per thread for samples of up to `longest` tokens. */
static int64_t forward_scratch_bytes(int64_t longest, int64_t width) {
    char *scratch = 0;
    forward_memory(&scratch, round_up(longest, PADDING), width);
    return scratch - (char *)0;
}

/* Query heads per task: all heads that share keys, so that these are packed once, unless the longest
 * sample would then leave threads idle. */
static int64_t heads_at_once(const Packed *x, int threads) {
    double longest = (double)x->length[0] * x->length[0], all = 0.0;
    for (int64_t i = 0; i < x->samples; i++) all += (double)x->length[i] * x->length[i];
    return x->kv_heads * all < 2 * threads * longest ? 1 : x->heads / x->kv_heads;
}

/* out [tokens, heads, width] and lse [heads, tokens]; the first sample is the longest. */
void attention_bfloat16(const Packed *x, bf16 *out, float *lse, char *scratch, int threads) {
    const int64_t bytes = forward_scratch_bytes(x->length[0], x->width);
    const int64_t some = heads_at_once(x, threads), group = x->heads / x->kv_heads;
    _Pragma("omp parallel for collapse(2) schedule(dynamic) num_threads(threads)")
    for (int64_t i = 0; i < x->samples; i++)
        for (int64_t first = 0; first < x->heads; first += some) {
            char *own = scratch + bytes * omp_get_thread_num();
            begin_blocks();
            forward_keys(x, i, first / group, own);
            for (int64_t h = first; h < first + some; h++) forward_head(x, i, h, out, lse, own);
            end_blocks();
        }
}
