/* Backward pass of causal attention of packed samples: gradients of queries, keys and values.
 *
 * Included by kernels.c; formulas in attention.c. Works on transposed scores: each lane holds a query,
 * and its log-sum-exp is an element of a vector.
 */

/* P and dS for `ROWS_M` keys starting at `key` and the queries starting at `query`, of which the first
 * `skipped` do not attend to them. Scores Q K^T, grad_weights dO V^T, P and dS are [ROWS_M, 64];
 * `paired` holds dS with two keys side by side. */
static void weigh(const Packed *x, const float *scores, const float *grad_weights, const float *logs,
                  const float *row_sums, int64_t query, int64_t key, int64_t skipped, int64_t lanes,
                  bf16 *weights, bf16 *errors, bf16 *paired) {
    const __m512 scale = _mm512_set1_ps(x->scale);
    const __m512i in_turn = _mm512_or_si512(
        LANE, _mm512_slli_epi32(_mm512_add_epi32(LANE, _mm512_set1_epi32(16)), 16));
    for (int64_t r = 0; r < ROWS_M; r++)
        for (int64_t l = skipped; l < lanes; l += 16) {
            int64_t index = r * LANES_B + l, reach = key + r + x->window;
            __m512i token = _mm512_add_epi32(LANE, _mm512_set1_epi32((int)(query + l)));
            __m512i beyond = _mm512_set1_epi32((int)(reach < INT32_MAX ? reach : INT32_MAX));
            __mmask16 seen = _mm512_cmpge_epi32_mask(token, _mm512_set1_epi32((int)(key + r))) &
                             _mm512_cmplt_epi32_mask(token, beyond);
            __m512 p = exponentials(_mm512_fmsub_ps(scale, _mm512_loadu_ps(scores + index),
                                                    _mm512_loadu_ps(logs + l)));
            p = _mm512_maskz_mov_ps(seen, p);
            __m512 e = _mm512_sub_ps(_mm512_loadu_ps(grad_weights + index), _mm512_loadu_ps(row_sums + l));
            e = _mm512_mul_ps(_mm512_mul_ps(p, e), scale);
            _mm256_storeu_si256((__m256i *)(weights + index), (__m256i)_mm512_cvtneps_pbh(p));
            _mm256_storeu_si256((__m256i *)(errors + index), (__m256i)_mm512_cvtneps_pbh(e));
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

/* Scratch memory of a thread for one head of a sample in the backward pass. */
typedef struct {
    bf16 *q, *q_columns, *q_rows, *g, *g_columns, *g_rows, *k, *k_turned, *v;
    bf16 *weights, *errors, *paired;
    float *keys_sum, *values_sum, *logs, *row_sums, *scores, *grad_weights, *dq_turned, *dq_rows;
} Backward;

static Backward backward_memory(char **scratch, int64_t padded, int64_t width) {
    const int64_t size = padded * width * 2, block = KEYS * LANES_B * 2;
    const int64_t turned = round_up(width, ROWS_M); /* rows per product */
    Backward m;
    m.q = take(scratch, size), m.q_columns = take(scratch, size), m.q_rows = take(scratch, size);
    m.g = take(scratch, size), m.g_columns = take(scratch, size), m.g_rows = take(scratch, size);
    m.k = take(scratch, size), m.k_turned = take(scratch, turned * padded * 2);
    m.v = take(scratch, size);
    m.keys_sum = take(scratch, 2 * size), m.values_sum = take(scratch, 2 * size);
    m.logs = take(scratch, padded * 4), m.row_sums = take(scratch, padded * 4);
    m.scores = take(scratch, ROWS_M * LANES_B * 4), m.grad_weights = take(scratch, ROWS_M * LANES_B * 4);
    m.weights = take(scratch, block), m.errors = take(scratch, block), m.paired = take(scratch, block);
    m.dq_turned = take(scratch, turned * LANES_B * 4);
    m.dq_rows = take(scratch, LANES_B * width * 4);
    return m;
}

/* Pack the keys and values of one head of a sample. */
static void backward_keys(const Packed *x, int64_t sample, int64_t kv, char *scratch) {
    const int64_t width = x->width, start = x->start[sample], length = x->length[sample];
    const int64_t padded = round_up(length, PADDING), turned = round_up(width, ROWS_M);
    const Backward m = backward_memory(&scratch, padded, width);
    gather(x->k + start * x->k_row + kv * width, x->k_row, at(x->cosine, start, width),
           at(x->sine, start, width), length, padded, width, m.k);
    gather(x->v + start * x->v_row + kv * width, x->v_row, 0, 0, length, padded, width, m.v);
    columns_of(m.k, padded, width, m.q_columns); /* q_columns as a temporary */
    memset(m.k_turned + width * padded, 0, (turned - width) * padded * 2);
    transpose_paired(m.q_columns, padded, width, m.k_turned);
}

static void add_rows(const float *x, float *to, int64_t count, int add) {
    if (!add) memcpy(to, x, count * sizeof(float));
    else LANES for (int64_t i = 0; i < count; i++) to[i] += x[i];
}

/* One query head, after `backward_keys`: dq [tokens, heads, width]; dk and dv [tokens, width] are sums
 * over the queries of this head, accumulated if `add`. */
static void backward_head(const Packed *x, int64_t sample, int64_t h, const bf16 *out,
                          const float *lse, const bf16 *grad, bf16 *dq, float *dk, float *dv, int add,
                          char *scratch) {
    const int64_t width = x->width, start = x->start[sample], length = x->length[sample];
    const int64_t padded = round_up(length, PADDING);
    const int64_t size = padded * width * 2, row = x->heads * width;
    const float *c = at(x->cosine, start, width), *s = at(x->sine, start, width);
    const int64_t turned = round_up(width, ROWS_M);
    const Backward m = backward_memory(&scratch, padded, width);
    bf16 *q = m.q, *q_columns = m.q_columns, *q_rows = m.q_rows, *k = m.k, *k_turned = m.k_turned;
    bf16 *g = m.g, *g_columns = m.g_columns, *g_rows = m.g_rows, *v = m.v;
    bf16 *weights = m.weights, *errors = m.errors, *paired = m.paired;
    float *keys_sum = m.keys_sum, *values_sum = m.values_sum, *logs = m.logs, *row_sums = m.row_sums;
    float *scores = m.scores, *grad_weights = m.grad_weights, *dq_turned = m.dq_turned, *dq_rows = m.dq_rows;

    gather(x->q + start * x->q_row + h * width, x->q_row, c, s, length, padded, width, q);
    gather(grad + start * row + h * width, row, 0, 0, length, padded, width, g);
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
            ask_ahead(o, row, width);
            SUM for (int64_t d = 0; d < width; d++)
                sum += from_bits((uint32_t)o[d] << 16) * from_bits((uint32_t)g[i * width + d] << 16);
        }
        row_sums[i] = sum;
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
                /* skip queries that precede all of these keys, a few at a time */
                int64_t skipped = from + j > i ? (from + j - i) / STEP * STEP : 0;
                bf16 *p_rows = weights + j * LANES_B, *e_rows = errors + j * LANES_B;
                product(lanes - skipped, k + (from + j) * width, width,
                        q_columns + i * width + 2 * skipped, 2 * LANES_B, width / 2,
                        scores + skipped, LANES_B, 0);
                product(lanes - skipped, v + (from + j) * width, width,
                        g_columns + i * width + 2 * skipped, 2 * LANES_B, width / 2,
                        grad_weights + skipped, LANES_B, 0);
                weigh(x, scores, grad_weights, logs + i, row_sums + i, i, from + j, skipped, lanes, p_rows,
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
    add_rows(keys_sum, dk + start * width, length * width, add);
    add_rows(values_sum, dv + start * width, length * width, add);
}

/* Bytes per thread for samples of up to `longest` tokens. */
static int64_t backward_scratch_bytes(int64_t longest, int64_t width) {
    char *scratch = 0;
    backward_memory(&scratch, round_up(longest, PADDING), width);
    return scratch - (char *)0;
}

/* Bytes of scratch memory for `attention_bfloat16` or, if `backward`, for the function below. */
int64_t attention_scratch_bytes_bfloat16(int64_t longest, int64_t width, int backward, int threads) {
    return threads * (backward ? backward_scratch_bytes(longest, width)
                               : forward_scratch_bytes(longest, width));
}

/* dq [tokens, heads, width], dk and dv [tokens, kv_heads, width]; parts [2, heads, tokens, width]
 * hold gradients of keys and values per query head, summed in a fixed order. */
void attention_backward_bfloat16(const Packed *x, const bf16 *out, const float *lse,
                                 const bf16 *grad, bf16 *dq, bf16 *dk, bf16 *dv, float *parts,
                                 char *scratch, int threads) {
    const int64_t bytes = backward_scratch_bytes(x->length[0], x->width);
    const int64_t some = heads_at_once(x, threads), group = x->heads / x->kv_heads;
    const int64_t width = x->width, each = x->tokens * width;
    float *k_parts = parts, *v_parts = parts + x->heads * each;
    _Pragma("omp parallel for collapse(2) schedule(dynamic) num_threads(threads)")
    for (int64_t i = 0; i < x->samples; i++)
        for (int64_t first = 0; first < x->heads; first += some) {
            char *own = scratch + bytes * omp_get_thread_num();
            begin_blocks();
            backward_keys(x, i, first / group, own);
            for (int64_t h = first; h < first + some; h++)
                backward_head(x, i, h, out, lse, grad, dq, k_parts + first * each,
                              v_parts + first * each, h > first, own);
            end_blocks();
        }
    ROWS for (int64_t t = 0; t < x->tokens; t++)
    for (int64_t h = 0; h < x->kv_heads; h++) {
        float *k_sum = k_parts + h * group * each + t * width;
        float *v_sum = v_parts + h * group * each + t * width;
        for (int64_t i = some; i < group; i++) {
            LANES for (int64_t d = 0; d < width; d++) k_sum[d] += k_sum[i * each + d];
            LANES for (int64_t d = 0; d < width; d++) v_sum[d] += v_sum[i * each + d];
        }
        bf16 *to = dk + (t * x->kv_heads + h) * width;
        turn_back(k_sum, at(x->cosine, t, width), at(x->sine, t, width), to, width);
        turn_back(v_sum, 0, 0, dv + (t * x->kv_heads + h) * width, width);
    }
}
