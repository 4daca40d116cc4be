/* Pack matrices for bfloat16 products, which consume two adjacent elements of the inner dimension.
 *
 * Included by products.c. Packing also rounds float32, dequantizes 4-bit weights and pads with zeros.
 */

/* Transpose a 16 x 16 matrix of 32-bit values. */
INLINE void transpose(__m512i row[16]) {
    __m512i x[16];
    for (int i = 0; i < 16; i += 2) {
        x[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        x[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            row[i + 2 * j] = _mm512_unpacklo_epi64(x[i + j], x[i + 2 + j]);
            row[i + 2 * j + 1] = _mm512_unpackhi_epi64(x[i + j], x[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < 2; j++) {
            x[8 * j + i] = _mm512_shuffle_i32x4(row[8 * j + i], row[8 * j + 4 + i], 0x88);
            x[8 * j + 4 + i] = _mm512_shuffle_i32x4(row[8 * j + i], row[8 * j + 4 + i], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        row[i] = _mm512_shuffle_i32x4(x[i], x[8 + i], 0x88);
        row[8 + i] = _mm512_shuffle_i32x4(x[i], x[8 + i], 0xdd);
    }
}

/* Block-wise 4-bit quantization as stored by bitsandbytes (arXiv:2305.14314, section 3): two values per
 * byte, the first in the upper half; each is an index into `code` (16 values), and `block` of them, a
 * multiple of 32, share a scale. Scales are in `scales`, or are 8-bit indices into `scale_code`, of
 * which `group` share a scale in `scales`, plus `offset`. */
typedef struct {
    const float *code, *scales, *scale_code;
    const uint8_t *scale_indices;
    int64_t block, group;
    float offset;
} FourBits;

/* A matrix in memory with row stride `row`: bfloat16; if `wide`, float32 to be multiplied by `scale` and
 * rounded; if `four` is not NULL, 4-bit values beginning at index `start`. Then `start`, `row` and the
 * requested columns are multiples of 32. */
typedef struct {
    const void *values;
    int64_t row;
    int wide;
    float scale;
    const FourBits *four;
    int64_t start;
} Matrix;

/* 16 values in float32. */
INLINE __m512 wide(__m256i x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

/* A mask of the first `count` lanes, at most 32. */
INLINE __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0;
}

/* 32 4-bit values starting at `index`. */
static __m512i of_four_bits(const FourBits *x, const uint8_t *values, int64_t index) {
    const __m128i low = _mm_set1_epi8(15);
    const __m512 code = _mm512_loadu_ps(x->code);
    __m128i pairs = _mm_loadu_si128((const __m128i *)(values + index / 2));
    __m128i first = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
    __m128i second = _mm_and_si128(pairs, low);
    const int64_t block = index / x->block;
    float size = x->scales[block / x->group];
    if (x->scale_indices) {
        size *= x->scale_code[x->scale_indices[block]];
        __asm__("" : "+x"(size)); /* rounded before the sum, as bitsandbytes does */
        size += x->offset;
    }
    __m512i left = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
    __m512i right = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(first, second));
    const __m512 scale = _mm512_set1_ps(size);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(scale, _mm512_permutexvar_ps(right, code)),
                                        _mm512_mul_ps(scale, _mm512_permutexvar_ps(left, code)));
}

/* 32 values of row i starting at column j; zeros beyond `rows` and `columns`. */
INLINE __m512i numbers(const Matrix *x, int64_t i, int64_t j, int64_t rows, int64_t columns) {
    __mmask32 mask = first_lanes(i < rows ? columns - j : 0);
    if (x->four)
        return mask ? _mm512_maskz_mov_epi16(
                           mask, of_four_bits(x->four, x->values, x->start + i * x->row + j))
                     : _mm512_setzero_si512();
    if (!x->wide) return _mm512_maskz_loadu_epi16(mask, (const bf16 *)x->values + i * x->row + j);
    const float *from = (const float *)x->values + i * x->row + j;
    const __m512 scale = _mm512_set1_ps(x->scale);
    __m512 low = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps((__mmask16)mask, from));
    __m512 high = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps((__mmask16)(mask >> 16), from + 16));
    return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

INLINE void pair_block(const Matrix *x, int64_t i, int64_t j, int64_t rows, int64_t columns,
                       __m512i block[16]) {
    if (!x->wide && !x->four && i + 16 <= rows && j + 32 <= columns)
        for (int r = 0; r < 16; r++)
            block[r] = _mm512_loadu_si512((const bf16 *)x->values + (i + r) * x->row + j);
    else
        for (int r = 0; r < 16; r++) block[r] = numbers(x, i + r, j, rows, columns);
    transpose(block);
}

/* Pack `lanes` rows of x [rows, columns], starting at `first`, into out [filled_up(columns) / 2, lanes,
 * 2]: pairs of columns, one row per lane; `lanes` is a multiple of 16. */
static void pair_columns(const Matrix *x, int64_t first, int64_t rows, int64_t columns,
                         int64_t lanes, bf16 *out) {
    int64_t pairs = filled_up(columns) / 2;
    for (int64_t i = 0; i < lanes; i += 16)
        for (int64_t p = 0; p < pairs; p += 16) {
            __m512i block[16];
            bf16 *to = out + p * 2 * lanes + i * 2;
            pair_block(x, first + i, 2 * p, rows, columns, block);
            if (p + 16 <= pairs)
                for (int j = 0; j < 16; j++) _mm512_storeu_si512(to + j * 2 * lanes, block[j]);
            else
                for (int j = 0; p + j < pairs; j++)
                    _mm512_storeu_si512(to + j * 2 * lanes, block[j]);
        }
}

/* Interleave the first 16 values of two rows. */
INLINE __m512i woven(__m512i even, __m512i odd) {
    /* indices from 32 select from `odd` */
    const __m512i order = _mm512_or_si512(
        LANE, _mm512_slli_epi32(_mm512_add_epi32(LANE, _mm512_set1_epi32(32)), 16));
    return _mm512_permutex2var_epi16(even, order, odd);
}

/* Pack columns of x [rows, columns], starting at `first`, into blocks [rows / 2, each, 2] with stride
 * `apart`: pairs of rows; `lanes` is a multiple of `each`, which is a multiple of 32. */
static void pair_rows(const Matrix *x, int64_t first, int64_t rows, int64_t columns, int64_t lanes,
                      int64_t each, int64_t apart, bf16 *out) {
    for (int64_t i = 0; i < filled_up(rows); i += 2, out += 2 * each)
        for (int64_t block = 0; block < lanes; block += each)
            for (int64_t j = 0; j < each; j += 32) {
                __m512i even = numbers(x, i, first + block + j, rows, columns);
                __m512i odd = numbers(x, i + 1, first + block + j, rows, columns);
                bf16 *to = out + block / each * apart + 2 * j;
                _mm512_storeu_si512(to, woven(even, odd));
                even = _mm512_shuffle_i64x2(even, even, 0x4e); /* the upper half */
                odd = _mm512_shuffle_i64x2(odd, odd, 0x4e);
                _mm512_storeu_si512(to + 32, woven(even, odd));
            }
}

/* 16 columns of x [rows, columns], starting at `first`, as rows of out, padded to a multiple of 32. */
static void turn_columns(const Matrix *x, int64_t first, int64_t rows, int64_t columns, bf16 *out,
                         int64_t out_row) {
    for (int64_t i = 0; i < rows; i += 32) {
        __m512i block[16];
        for (int p = 0; p < 16; p++)
            block[p] = woven(numbers(x, i + 2 * p, first, rows, columns),
                             numbers(x, i + 2 * p + 1, first, rows, columns));
        transpose(block);
        for (int r = 0; r < 16; r++) _mm512_storeu_si512(out + r * out_row + i, block[r]);
    }
}
