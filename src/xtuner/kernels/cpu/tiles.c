/* Matrix products with AMX tiles: output blocks of 32 rows by 32 columns.
 *
 * Included by products.c where the compiler supports AMX. Four tiles hold the sums, two hold 32 rows by
 * 32 inner elements of the first matrix, two hold 32 inner elements by 32 columns of the second, which
 * is packed in pairs and padded to a multiple of 32 inner elements. The process must have requested
 * permission to use AMX (build.py does).
 */

/* Configure and release the tiles of this thread. */
INLINE void begin_blocks(void) {
    uint8_t config[64] __attribute__((aligned(64))) = {1};
    for (int i = 0; i < 8; i++) config[16 + 2 * i] = 64, config[48 + i] = 16; /* bytes per row, rows */
    __asm__ volatile("" : : "r"(config) : "memory"); /* force the configuration into memory */
    _tile_loadconfig(config);
}

INLINE void end_blocks(void) { _tile_release(); }

/* Compiler barrier: earlier stores are in memory before the tile instructions read them. */
#define STORED __asm__ volatile("" ::: "memory")

/* Tiles 0 to 3 += a [32, 32] b. Only b is loaded with a temporal hint, since the next rows reuse it. */
INLINE void add_products(const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_pair) {
    STORED;
    _tile_stream_loadd(4, a, 2 * a_row);
    _tile_loadd(6, b, 2 * b_pair);
    _tile_loadd(7, b + 32, 2 * b_pair);
    _tile_dpbf16ps(0, 4, 6);
    _tile_stream_loadd(5, a + 16 * a_row, 2 * a_row);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    STORED;
}

INLINE void begin_sums(const float *c, int64_t c_row, int add) {
    if (add) {
        STORED;
        _tile_loadd(0, c, 4 * c_row);
        _tile_loadd(1, c + 16, 4 * c_row);
        _tile_loadd(2, c + 16 * c_row, 4 * c_row);
        _tile_loadd(3, c + 16 * c_row + 16, 4 * c_row);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
}

INLINE void store_sums(float *c, int64_t c_row) {
    _tile_stored(0, c, 4 * c_row);
    _tile_stored(1, c + 16, 4 * c_row);
    _tile_stored(2, c + 16 * c_row, 4 * c_row);
    _tile_stored(3, c + 16 * c_row + 16, 4 * c_row);
}

/* c[32, columns] (+)= a[32, 2 pairs] b, for multiples of 32 columns and 16 pairs. */
static void product(int64_t columns, const bf16 *a, int64_t a_row, const bf16 *b, int64_t b_pair,
                    int64_t pairs, float *c, int64_t c_row, int add) {
    for (int64_t j = 0; j < columns; j += 32) {
        begin_sums(c + j, c_row, add);
        for (int64_t p = 0; p < pairs; p += 16)
            add_products(a + 2 * p, a_row, b + p * b_pair + 2 * j, b_pair);
        store_sums(c + j, c_row);
    }
}

/* The inner elements of 32 rows after the last multiple of 32, padded with zeros. */
static void take_tail(const Term *term, int64_t row, bf16 *tail) {
    const __mmask32 mask = first_lanes(term->inner % 32);
    const bf16 *from = term->a + row * term->a_row + term->inner / 32 * 32;
    for (int64_t r = 0; r < ROWS_M; r++)
        _mm512_store_si512(tail + 32 * r, _mm512_maskz_loadu_epi16(mask, from + r * term->a_row));
}

/* Sums to be rounded, a few rows at a time, interleaved with the products of the next block. */
typedef struct {
    float sums[ROWS_M * LANES_M];
    Target to;
    __m512 bias[2];
    int64_t row, rows;
} Waiting;

/* Full cache lines use streaming stores: reading a line only to overwrite it costs more than the product. */
INLINE void round_rows(Waiting *x, int64_t count) {
    if (x->row == x->rows) return;
    const __mmask32 mask = first_lanes(x->to.columns);
    int64_t end = x->row + count < x->rows ? x->row + count : x->rows;
    for (; x->row < end; x->row++) {
        const float *from = x->sums + 32 * x->row;
        __m512 left = _mm512_add_ps(_mm512_load_ps(from), x->bias[0]);
        __m512 right = _mm512_add_ps(_mm512_load_ps(from + 16), x->bias[1]);
        if (x->to.plus) {
            __m512i plus = _mm512_maskz_loadu_epi16(mask, x->to.plus + x->row * x->to.out_row);
            left = _mm512_add_ps(left, wide(_mm512_castsi512_si256(plus)));
            right = _mm512_add_ps(right, wide(_mm512_extracti64x4_epi64(plus, 1)));
        }
        __m512i both = (__m512i)_mm512_cvtne2ps_pbh(right, left);
        bf16 *to = x->to.out + x->row * x->to.out_row;
        if (mask == ~0u && (uintptr_t)to % 64 == 0) _mm512_stream_si512((void *)to, both);
        else _mm512_mask_storeu_epi16(to, mask, both);
    }
}

/* Multiply `rows` rows (a multiple of 32, or fewer) of the first matrices, starting at `row`, with the
 * packed `lanes` columns of `inner` elements each. */
static void blocks(const Term *terms, int count, int64_t row, int64_t rows, const bf16 *b,
                   int64_t inner, int64_t lanes, Target to) {
    Waiting two[2] __attribute__((aligned(64)));
    bf16 tail[ROWS_M * 32] __attribute__((aligned(64)));
    int turn = 0;
    two[1].row = two[1].rows = 0;
    for (int64_t j = 0; j < lanes; j += LANES_M)
        for (int64_t x = 0; x < rows; x += ROWS_M, turn ^= 1) {
            const bf16 *column = b + j * inner;
            Waiting *now = two + turn, *before = two + (turn ^ 1);
            now->to = moved(&to, x, j);
            int asked = 0;
            begin_sums(now->to.c, to.c_row, to.add);
            for (int i = 0; i < count; i++) {
                const bf16 *a = terms[i].a + (row + x) * terms[i].a_row;
                for (int64_t k = 0; k < terms[i].inner; k += 32, column += 32 * LANES_M) {
                    int part = terms[i].inner - k < 32;
                    if (part) take_tail(terms + i, row + x, tail);
                    add_products(part ? tail : a + k, part ? 32 : terms[i].a_row, column,
                                 2 * LANES_M);
                    round_rows(before, 2);
                    if (to.plus && asked < ROWS_M) { /* prefetch what is added when this block is rounded */
                        _mm_prefetch(now->to.plus + asked++ * to.out_row, _MM_HINT_T0);
                        _mm_prefetch(now->to.plus + asked++ * to.out_row, _MM_HINT_T0);
                    }
                }
            }
            round_rows(before, ROWS_M);
            if (!to.out) {
                store_sums(now->to.c, to.c_row);
                now->row = now->rows = 0;
                continue;
            }
            store_sums(now->sums, 32);
            now->row = 0;
            now->rows = rows - x < ROWS_M ? rows - x : ROWS_M;
            __m512i both = _mm512_setzero_si512();
            if (to.bias) both = _mm512_maskz_loadu_epi16(first_lanes(now->to.columns), now->to.bias);
            now->bias[0] = wide(_mm512_castsi512_si256(both));
            now->bias[1] = wide(_mm512_extracti64x4_epi64(both, 1));
        }
    round_rows(two + (turn ^ 1), ROWS_M);
    _mm_sfence(); /* streaming stores are visible before other threads continue */
}
