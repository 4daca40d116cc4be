/* Causal attention of packed samples for CPUs that multiply bfloat16 (AVX512-BF16, AMX).
 *
 * A part of cpu_kernels.c, which includes it. Each sample and head is a task of one thread; scores
 * stay in its first-level cache, and only the logarithm of each softmax's sum is kept for the way
 * back (arXiv:2205.14135, algorithms 1 and 4; arXiv:2307.08691, section 3.1). Only pairs of a query
 * and a key that see each other are multiplied, to within STEP of the diagonal.
 *
 *     forward    S = s Q K^T,  P = softmax(S),  O = P V,  L = log sum exp S
 *     backward   P = exp(S - L),  dV = P^T dO,  dP = dO V^T,  dS = s P * (dP - rowsum(dO * O)),
 *                dQ = dS K,  dK = dS^T Q
 *
 * Products are those of cpu_products.c. The way back works on transposed scores, where a query is a
 * lane and L a vector.
 */

/* Keys at once, a multiple of ROWS_M and of STEP, to which lanes are rounded up; samples are to
 * PADDING. */
#ifdef TILES
enum { KEYS = 256, STEP = 32, PADDING = LANES_B };
#else
enum { KEYS = 480, STEP = 16, PADDING = 3 * LANES_B };
#endif

/* e^x for x <= 88, 0 below -87; as `exponential`, for 16 at once. The CPU is not asked for what is too
 * small for a normal number: on some that takes a hundred times as long. */
INLINE __m512 exponentials(__m512 x) {
    const __mmask16 there = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(_mm512_mul_ps(p, r), r, _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_maskz_scalef_ps(there, p, n); /* NaN stays NaN */
}

/* x [rows, width] with pairs of columns, in blocks of 64 rows. */
static void columns_of(const bf16 *x, int64_t rows, int64_t width, bf16 *out) {
    Matrix all = {x, width, 0, 1.0f};
    for (int64_t i = 0; i < rows; i += LANES_B)
        pair_columns(&all, i, rows, width, LANES_B, out + i * width);
}

/* x [rows, width] with pairs of rows. */
static void rows_of(const bf16 *x, int64_t rows, int64_t width, bf16 *out) {
    Matrix all = {x, width, 0, 1.0f};
    pair_rows(&all, 0, rows, width, width, width, 0, out);
}

/* What `columns_of` made of x [rows, width], as x^T [width, rows]. */
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

/* The way back of a gradient in float32. */
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

/* Rows of one head, turned, and rows of zeros up to `padded`. */
static void gather(const bf16 *x, int64_t stride, const float *cosine, const float *sine,
                   int64_t rows, int64_t padded, int64_t width, bf16 *out) {
    for (int64_t i = 0; i < rows; i++)
        turn_bfloat16(x + i * stride, cosine ? cosine + i * width : 0,
                      cosine ? sine + i * width : 0, out + i * width, width);
    memset(out + rows * width, 0, (padded - rows) * width * sizeof(bf16));
}

/* Packed samples and what both directions know of them. q [tokens, heads, width] with rows of
 * q_row, k and v with kv_heads alike; cosine and sine [tokens, width] or NULL; sample i has
 * length[i] tokens from start[i] on; a query sees `window` tokens, itself included. */
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

/* Working memory of a thread for one head of a sample. */
typedef struct {
    bf16 *q, *keys, *values, *rows, *weights;
    float *scores, *sums;
} Forward;

static Forward forward_memory(char **space, int64_t padded, int64_t width) {
    const int64_t size = padded * width * 2;
    Forward m;
    m.q = take(space, size), m.keys = take(space, size);
    m.values = take(space, size), m.rows = take(space, size);
    m.scores = take(space, ROWS_M * KEYS * 4), m.sums = take(space, ROWS_M * width * 4);
    m.weights = take(space, ROWS_M * KEYS * 2);
    return m;
}

static void forward_head(const Packed *x, int64_t sample, int64_t h, bf16 *out, float *lse,
                         char *space) {
    const int64_t width = x->width, start = x->start[sample], length = x->length[sample];
    const int64_t padded = round_up(length, PADDING), kv = h / (x->heads / x->kv_heads);
    const Forward m = forward_memory(&space, padded, width);
    bf16 *q = m.q, *keys = m.keys, *values = m.values, *rows = m.rows, *weights = m.weights;
    float *scores = m.scores, *sums = m.sums;
    const float *c = at(x->cosine, start, width), *s = at(x->sine, start, width);
    gather(x->k + start * x->k_row + kv * width, x->k_row, c, s, length, padded, width, rows);
    columns_of(rows, padded, width, keys);
    gather(x->v + start * x->v_row + kv * width, x->v_row, 0, 0, length, padded, width, rows);
    rows_of(rows, padded, width, values);
    gather(x->q + start * x->q_row + h * width, x->q_row, c, s, length, padded, width, q);
    const __m512 scale = _mm512_set1_ps(x->scale);
    for (int64_t i = 0; i < length; i += ROWS_M) {
        int64_t last = i + ROWS_M < length ? i + ROWS_M : length;
        int64_t first = i - x->window + 1 > 0 ? (i - x->window + 1) / LANES_B * LANES_B : 0;
        float top[ROWS_M], total[ROWS_M];
        for (int r = 0; r < ROWS_M; r++) top[r] = -INFINITY, total[r] = 0.0f;
        for (int64_t from = first; from < last;) {
            /* a block of keys ends at a multiple of 64, so that the next one begins there */
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

/* P and dS of `ROWS_M` keys, from `key` on, and of the queries from `query` on, of which the first
 * `skipped` do not see them; scores Q K^T and pulls dO V^T [ROWS_M, 64], as P and dS; `paired`
 * holds dS with two keys side by side. */
static void weigh(const Packed *x, const float *scores, const float *pulls, const float *logs,
                  const float *means, int64_t query, int64_t key, int64_t skipped, int64_t lanes,
                  bf16 *weights, bf16 *errors, bf16 *paired) {
    const __m512 scale = _mm512_set1_ps(x->scale);
    const __m512i in_turn = _mm512_or_si512(
        LANE, _mm512_slli_epi32(_mm512_add_epi32(LANE, _mm512_set1_epi32(16)), 16));
    for (int64_t r = 0; r < ROWS_M; r++)
        for (int64_t l = skipped; l < lanes; l += 16) {
            int64_t place = r * LANES_B + l, reach = key + r + x->window;
            __m512i token = _mm512_add_epi32(LANE, _mm512_set1_epi32((int)(query + l)));
            __m512i beyond = _mm512_set1_epi32((int)(reach < INT32_MAX ? reach : INT32_MAX));
            __mmask16 seen = _mm512_cmpge_epi32_mask(token, _mm512_set1_epi32((int)(key + r))) &
                             _mm512_cmplt_epi32_mask(token, beyond);
            __m512 p = exponentials(_mm512_fmsub_ps(scale, _mm512_loadu_ps(scores + place),
                                                    _mm512_loadu_ps(logs + l)));
            p = _mm512_maskz_mov_ps(seen, p);
            __m512 e = _mm512_sub_ps(_mm512_loadu_ps(pulls + place), _mm512_loadu_ps(means + l));
            e = _mm512_mul_ps(_mm512_mul_ps(p, e), scale);
            _mm256_storeu_si256((__m256i *)(weights + place), (__m256i)_mm512_cvtneps_pbh(p));
            _mm256_storeu_si256((__m256i *)(errors + place), (__m256i)_mm512_cvtneps_pbh(e));
        }
    for (int64_t r = 0; r < ROWS_M; r += 2)
        for (int64_t l = 0; l < lanes; l += 16) {
            const bf16 *from = errors + r * LANES_B + l;
            __m512i two = _mm512_setzero_si512();
            if (l >= skipped)
                two = _mm512_inserti64x4(
                    _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)from)),
                    _mm256_loadu_si256((const __m256i *)(from + LANES_B)), 1);
            _mm512_storeu_si512(paired + r * LANES_B + 2 * l, _mm512_permutexvar_epi16(in_turn, two));
        }
}

/* Working memory of a thread for one head of a sample, on the way back. */
typedef struct {
    bf16 *q, *q_columns, *q_rows, *g, *g_columns, *g_rows, *k, *k_turned, *v;
    bf16 *weights, *errors, *paired;
    float *keys_sum, *values_sum, *logs, *means, *scores, *pulls, *dq_turned, *dq_rows;
} Backward;

static Backward backward_memory(char **space, int64_t padded, int64_t width) {
    const int64_t size = padded * width * 2, block = KEYS * LANES_B * 2;
    const int64_t turned = round_up(width, ROWS_M); /* rows that products take */
    Backward m;
    m.q = take(space, size), m.q_columns = take(space, size), m.q_rows = take(space, size);
    m.g = take(space, size), m.g_columns = take(space, size), m.g_rows = take(space, size);
    m.k = take(space, size), m.k_turned = take(space, turned * padded * 2);
    m.v = take(space, size);
    m.keys_sum = take(space, 2 * size), m.values_sum = take(space, 2 * size);
    m.logs = take(space, padded * 4), m.means = take(space, padded * 4);
    m.scores = take(space, ROWS_M * LANES_B * 4), m.pulls = take(space, ROWS_M * LANES_B * 4);
    m.weights = take(space, block), m.errors = take(space, block), m.paired = take(space, block);
    m.dq_turned = take(space, turned * LANES_B * 4);
    m.dq_rows = take(space, LANES_B * width * 4);
    return m;
}

/* dq [tokens, heads, width]; dk and dv are sums of this query head, [tokens, width] each. */
static void backward_head(const Packed *x, int64_t sample, int64_t h, const bf16 *out,
                          const float *lse, const bf16 *grad, bf16 *dq, float *dk, float *dv,
                          char *space) {
    const int64_t width = x->width, start = x->start[sample], length = x->length[sample];
    const int64_t padded = round_up(length, PADDING), kv = h / (x->heads / x->kv_heads);
    const int64_t size = padded * width * 2, row = x->heads * width;
    const float *c = at(x->cosine, start, width), *s = at(x->sine, start, width);
    const int64_t turned = round_up(width, ROWS_M);
    const Backward m = backward_memory(&space, padded, width);
    bf16 *q = m.q, *q_columns = m.q_columns, *q_rows = m.q_rows, *k = m.k, *k_turned = m.k_turned;
    bf16 *g = m.g, *g_columns = m.g_columns, *g_rows = m.g_rows, *v = m.v;
    bf16 *weights = m.weights, *errors = m.errors, *paired = m.paired;
    float *keys_sum = m.keys_sum, *values_sum = m.values_sum, *logs = m.logs, *means = m.means;
    float *scores = m.scores, *pulls = m.pulls, *dq_turned = m.dq_turned, *dq_rows = m.dq_rows;

    gather(x->q + start * x->q_row + h * width, x->q_row, c, s, length, padded, width, q);
    gather(grad + start * row + h * width, row, 0, 0, length, padded, width, g);
    gather(x->k + start * x->k_row + kv * width, x->k_row, c, s, length, padded, width, k);
    gather(x->v + start * x->v_row + kv * width, x->v_row, 0, 0, length, padded, width, v);
    columns_of(k, padded, width, q_columns); /* a place to pass through */
    memset(k_turned + width * padded, 0, (turned - width) * padded * 2);
    transpose_paired(q_columns, padded, width, k_turned);
    columns_of(q, padded, width, q_columns);
    rows_of(q, padded, width, q_rows);
    columns_of(g, padded, width, g_columns);
    rows_of(g, padded, width, g_rows);
    memset(keys_sum, 0, 2 * size);
    memset(values_sum, 0, 2 * size);
    for (int64_t i = 0; i < padded; i++) {
        const bf16 *o = out + (start + i) * row + h * width;
        float sum = 0.0f;
        if (i < length) {
            SUM for (int64_t d = 0; d < width; d++)
                sum += from_bits((uint32_t)o[d] << 16) * from_bits((uint32_t)g[i * width + d] << 16);
        }
        means[i] = sum;
        logs[i] = i < length ? lse[h * x->tokens + start + i] : INFINITY; /* weights of 0 */
    }

    for (int64_t i = 0; i < length; i += LANES_B) {
        int64_t lanes = round_up(length - i < LANES_B ? length - i : LANES_B, STEP);
        int64_t end = i + LANES_B < length ? i + LANES_B : length;
        int64_t first = i - x->window + 1 > 0 ? (i - x->window + 1) / ROWS_M * ROWS_M : 0;
        memset(dq_turned, 0, turned * LANES_B * 4);
        for (int64_t from = first; from < end; from += KEYS) {
            int64_t count = round_up((end < from + KEYS ? end : from + KEYS) - from, ROWS_M);
            for (int64_t j = 0; j < count; j += ROWS_M) {
                /* queries before all of these keys do not see them; some at once */
                int64_t skipped = from + j > i ? (from + j - i) / STEP * STEP : 0;
                bf16 *p_rows = weights + j * LANES_B, *e_rows = errors + j * LANES_B;
                product(lanes - skipped, k + (from + j) * width, width,
                        q_columns + i * width + 2 * skipped, 2 * LANES_B, width / 2,
                        scores + skipped, LANES_B, 0);
                product(lanes - skipped, v + (from + j) * width, width,
                        g_columns + i * width + 2 * skipped, 2 * LANES_B, width / 2,
                        pulls + skipped, LANES_B, 0);
                weigh(x, scores, pulls, logs + i, means + i, i, from + j, skipped, lanes, p_rows,
                      e_rows, paired + j * LANES_B);
                int64_t pairs = (lanes - skipped) / 2, where = (i + skipped) * width;
                product(width, p_rows + skipped, LANES_B, g_rows + where, 2 * width, pairs,
                        values_sum + (from + j) * width, width, 1);
                product(width, e_rows + skipped, LANES_B, q_rows + where, 2 * width, pairs,
                        keys_sum + (from + j) * width, width, 1);
            }
            for (int64_t d = 0; d < width; d += ROWS_M)
                product(lanes, k_turned + d * padded + from, padded, paired, 2 * LANES_B, count / 2,
                        dq_turned + d * LANES_B, LANES_B, 1);
        }
        for (int64_t l = 0; l < lanes; l += 16)
            for (int64_t d = 0; d < width; d += 16) {
                __m512i block[16];
                for (int r = 0; r < 16; r++)
                    block[r] = _mm512_loadu_si512(dq_turned + (d + r) * LANES_B + l);
                transpose(block);
                for (int r = 0; r < 16; r++)
                    _mm512_storeu_si512(dq_rows + (l + r) * width + d, block[r]);
            }
        for (int64_t t = i; t < end; t++)
            turn_back(dq_rows + (t - i) * width, c ? c + t * width : 0, c ? s + t * width : 0,
                      dq + (start + t) * row + h * width, width);
    }
    memcpy(dk + start * width, keys_sum, length * width * 4);
    memcpy(dv + start * width, values_sum, length * width * 4);
}

/* Bytes that one thread needs for samples of up to `longest` tokens. */
static int64_t room_of_thread(int64_t longest, int64_t width, int backward) {
    char *space = 0;
    if (backward) backward_memory(&space, round_up(longest, PADDING), width);
    else forward_memory(&space, round_up(longest, PADDING), width);
    return space - (char *)0;
}

/* Bytes of working memory for one of the two functions below. */
int64_t attention_room_bfloat16(int64_t longest, int64_t width, int backward, int threads) {
    return threads * room_of_thread(longest, width, backward);
}

/* out [tokens, heads, width] and lse [heads, tokens]; the first sample is the longest. */
void attention_bfloat16(const Packed *x, bf16 *out, float *lse, char *space, int threads) {
    const int64_t room = room_of_thread(x->length[0], x->width, 0);
    _Pragma("omp parallel for collapse(2) schedule(dynamic) num_threads(threads)")
    for (int64_t i = 0; i < x->samples; i++)
        for (int64_t h = 0; h < x->heads; h++) {
            begin_blocks();
            forward_head(x, i, h, out, lse, space + room * omp_get_thread_num());
            end_blocks();
        }
}

/* dq [tokens, heads, width], dk and dv [tokens, kv_heads, width]; parts [2, heads, tokens, width]
 * hold the gradients of keys and values of each query head, which are added in a fixed order. */
void attention_backward_bfloat16(const Packed *x, const bf16 *out, const float *lse,
                                 const bf16 *grad, bf16 *dq, bf16 *dk, bf16 *dv, float *parts,
                                 char *space, int threads) {
    const int64_t room = room_of_thread(x->length[0], x->width, 1);
    int64_t each = x->tokens * x->width;
    float *k_parts = parts, *v_parts = parts + x->heads * each;
    _Pragma("omp parallel for collapse(2) schedule(dynamic) num_threads(threads)")
    for (int64_t i = 0; i < x->samples; i++)
        for (int64_t h = 0; h < x->heads; h++) {
            begin_blocks();
            backward_head(x, i, h, out, lse, grad, dq, k_parts + h * each, v_parts + h * each,
                          space + room * omp_get_thread_num());
            end_blocks();
        }
    int64_t width = x->width, group = x->heads / x->kv_heads;
    ROWS for (int64_t t = 0; t < x->tokens; t++)
    for (int64_t h = 0; h < x->kv_heads; h++) {
        float *k_sum = k_parts + h * group * each + t * width;
        float *v_sum = v_parts + h * group * each + t * width;
        for (int64_t i = 1; i < group; i++) {
            LANES for (int64_t d = 0; d < width; d++) k_sum[d] += k_sum[i * each + d];
            LANES for (int64_t d = 0; d < width; d++) v_sum[d] += v_sum[i * each + d];
        }
        bf16 *to = dk + (t * x->kv_heads + h) * width;
        turn_back(k_sum, at(x->cosine, t, width), at(x->sine, t, width), to, width);
        turn_back(v_sum, 0, 0, dv + (t * x->kv_heads + h) * width, width);
    }
}
