/* Matrix products with AVX512-BF16 vectors: output blocks of 6 rows by 64 columns.
 *
 * Included by products.c for CPUs without AMX (tiles.c).
 */

#define UNROLL _Pragma("GCC unroll 6") /* keeps sums in registers: 24 sums, 4 vectors, 1 broadcast */

INLINE void begin_blocks(void) {}

INLINE void end_blocks(void) {}

/* sum[6, 16 nv] += a[6, 2 pairs] b, where b[p] holds inner elements 2p and 2p + 1 of each column. */
INLINE void accumulate(const int nv, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_pair,
                       int64_t pairs, __m512 sum[ROWS_M][4]) {
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh column[4];
        UNROLL for (int j = 0; j < nv; j++)
            column[j] = (__m512bh)_mm512_loadu_si512(b + p * b_pair + 32 * j);
        UNROLL for (int r = 0; r < ROWS_M; r++) {
            int32_t pair;
            memcpy(&pair, a + r * a_row + 2 * p, 4);
            __m512bh row = (__m512bh)_mm512_set1_epi32(pair);
            UNROLL for (int j = 0; j < nv; j++)
                sum[r][j] = _mm512_dpbf16_ps(sum[r][j], row, column[j]);
        }
    }
}

/* c[6, 16 nv] (+)= a b; see `accumulate`. */
INLINE void product_nv(const int nv, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_pair,
                       int64_t pairs, float *c, int64_t c_row, int add) {
    __m512 sum[ROWS_M][4];
    UNROLL for (int r = 0; r < ROWS_M; r++)
        UNROLL for (int j = 0; j < nv; j++)
            sum[r][j] = add ? _mm512_loadu_ps(c + r * c_row + 16 * j) : _mm512_setzero_ps();
    accumulate(nv, a, a_row, b, b_pair, pairs, sum);
    UNROLL for (int r = 0; r < ROWS_M; r++)
        UNROLL for (int j = 0; j < nv; j++) _mm512_storeu_ps(c + r * c_row + 16 * j, sum[r][j]);
}

/* `product_nv` for any number of columns, rounded up to a multiple of 16. */
static void product(int64_t columns, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_pair,
                    int64_t pairs, float *c, int64_t c_row, int add) {
    for (; columns > 48; columns -= 64, b += 128, c += 64)
        product_nv(4, a, a_row, b, b_pair, pairs, c, c_row, add);
    if (columns > 32) product_nv(3, a, a_row, b, b_pair, pairs, c, c_row, add);
    else if (columns > 16) product_nv(2, a, a_row, b, b_pair, pairs, c, c_row, add);
    else if (columns > 0) product_nv(1, a, a_row, b, b_pair, pairs, c, c_row, add);
}

/* Multiply six rows of the first matrices, starting at `row`, with 16 nv columns; only `rows` are valid. */
INLINE void block_of_terms(const int nv, const Term *terms, int count, int64_t row, int64_t rows,
                           const bf16 *b, const Target *to) {
    __m512 sum[ROWS_M][4];
    UNROLL for (int r = 0; r < ROWS_M; r++)
        UNROLL for (int j = 0; j < nv; j++)
            sum[r][j] = to->add && r < rows ? _mm512_loadu_ps(to->c + r * to->c_row + 16 * j)
                                            : _mm512_setzero_ps();
    for (int i = 0; i < count; b += terms[i++].inner * LANES_B)
        accumulate(nv, terms[i].a + row * terms[i].a_row, terms[i].a_row, b, 2 * LANES_B,
                   terms[i].inner / 2, sum);
    UNROLL for (int r = 0; r < ROWS_M; r++)
        UNROLL for (int j = 0; j < nv; j++) {
            if (!to->out) {
                if (r < rows) _mm512_storeu_ps(to->c + r * to->c_row + 16 * j, sum[r][j]);
                continue;
            }
            __mmask16 mask = (__mmask16)first_lanes(r < rows ? to->columns - 16 * j : 0);
            const bf16 *more[] = {to->bias, to->plus ? to->plus + r * to->out_row : 0};
            for (int i = 0; i < 2; i++)
                if (more[i])
                    sum[r][j] = _mm512_add_ps(
                        sum[r][j], wide(_mm256_maskz_loadu_epi16(mask, more[i] + 16 * j)));
            _mm256_mask_storeu_epi16(to->out + r * to->out_row + 16 * j, mask,
                                     (__m256i)_mm512_cvtneps_pbh(sum[r][j]));
        }
}

/* Multiply `rows` rows (a multiple of 6, or fewer) of the first matrices, starting at `row`, with the
 * packed `lanes` columns of `inner` elements each. */
static void blocks(const Term *terms, int count, int64_t row, int64_t rows, const bf16 *b,
                   int64_t inner, int64_t lanes, Target to) {
    for (int64_t j = 0; j < lanes; j += LANES_M)
        for (int64_t x = 0; x < rows; x += ROWS_M) {
            Target next = moved(&to, x, j);
            const bf16 *column = b + j * inner;
            if (next.columns > 32)
                block_of_terms(4, terms, count, row + x, rows - x, column, &next);
            else if (next.columns > 16)
                block_of_terms(2, terms, count, row + x, rows - x, column, &next);
            else block_of_terms(1, terms, count, row + x, rows - x, column, &next);
        }
}
