/* Products of bfloat16 matrices on CPUs that multiply vectors (AVX512-BF16) or tiles (AMX) of them.
 *
 * A part of cpu_kernels.c, for attention, linear layers and the loss. The units take two neighbours
 * of the inner dimension at once, so that the second matrix must have its pairs side by side
 * ("paired"); the functions that lay it out so also round float32 numbers and fill up with zeros.
 * cpu_vectors.c and cpu_tiles.c multiply blocks of rows with what is laid out; `multiply` shares
 * whole matrices out among threads.
 */

#include <immintrin.h>
#include <omp.h>

#ifndef __AMX_BF16__
#undef TILES /* asked for by cpu_library.py where the system gives them */
#endif

#define LANES_B 64 /* columns: four vectors of 16 */
#define INLINE static inline __attribute__((always_inline))

#define LANE _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)

typedef uint16_t bf16;

/* Rows and columns of a block of sums; to what inner numbers are filled up with zeros; rows that are
 * multiplied with one block after the other; inner numbers at once; bytes of second matrices that are
 * laid out at once, for all threads together if they are `SHARED`, else for each. */
#ifdef TILES
enum { ROWS_M = 32, LANES_M = 32, INNER_STEP = 32, MOST_ROWS = 128 };
enum { INNER = 1664, SLAB = 3 << 19, SHARED = 0 };
#else
enum { ROWS_M = 6, LANES_M = LANES_B, INNER_STEP = 2, MOST_ROWS = 36 };
enum { INNER = 3200, SLAB = 1 << 22, SHARED = 1 };
#endif

static int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

static int64_t filled_up(int64_t inner) { return round_up(inner, INNER_STEP); }

/* A 16 x 16 matrix of 32-bit numbers, on its side. */
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

/* How numbers of four bits, two in a byte and the first one above, are to be read (arXiv:2305.14314,
 * section 3, as bitsandbytes keeps them): each is a place in `code`, of 16 numbers, and `block` of
 * them, a multiple of 32, have one scale. That is in `scales`, or in eight bits: `group` of these
 * places in `scale_code` have one scale in `scales`, and `offset` is added. */
typedef struct {
    const float *code, *scales, *scale_code;
    const uint8_t *scale_places;
    int64_t block, group;
    float offset;
} FourBits;

/* Numbers in memory: rows `row` numbers apart, bfloat16 or, if `wide`, float32 to be multiplied by
 * `scale` and rounded. If there is a `four` they are of four bits, from number `start` on; it, `row`
 * and the columns that are asked for are then multiples of 32. */
typedef struct {
    const void *values;
    int64_t row;
    int wide;
    float scale;
    const FourBits *four;
    int64_t start;
} Matrix;

/* 16 numbers in float32. */
INLINE __m512 wide(__m256i x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

/* A mask of `count` lanes, 32 at most. */
INLINE __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~0u : count > 0 ? (1u << count) - 1 : 0;
}

/* 32 numbers of four bits from `place` on. */
static __m512i of_four_bits(const FourBits *x, const uint8_t *values, int64_t place) {
    const __m128i low = _mm_set1_epi8(15);
    const __m512 code = _mm512_loadu_ps(x->code);
    __m128i pairs = _mm_loadu_si128((const __m128i *)(values + place / 2));
    __m128i first = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
    __m128i second = _mm_and_si128(pairs, low);
    const int64_t block = place / x->block;
    float size = x->scales[block / x->group];
    if (x->scale_places) size = x->scale_code[x->scale_places[block]] * size + x->offset;
    __m512i left = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(first, second));
    __m512i right = _mm512_cvtepu8_epi32(_mm_unpackhi_epi8(first, second));
    const __m512 scale = _mm512_set1_ps(size);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(scale, _mm512_permutexvar_ps(right, code)),
                                        _mm512_mul_ps(scale, _mm512_permutexvar_ps(left, code)));
}

/* 32 numbers of row i from column j on; those from row `rows` and column `columns` on are zeros. */
INLINE __m512i numbers(const Matrix *x, int64_t i, int64_t j, int64_t rows, int64_t columns) {
    __mmask32 there = first_lanes(i < rows ? columns - j : 0);
    if (x->four)
        return there ? _mm512_maskz_mov_epi16(
                           there, of_four_bits(x->four, x->values, x->start + i * x->row + j))
                     : _mm512_setzero_si512();
    if (!x->wide) return _mm512_maskz_loadu_epi16(there, (const bf16 *)x->values + i * x->row + j);
    const float *from = (const float *)x->values + i * x->row + j;
    const __m512 scale = _mm512_set1_ps(x->scale);
    __m512 low = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps((__mmask16)there, from));
    __m512 high = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps((__mmask16)(there >> 16), from + 16));
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

/* `lanes` rows of x [rows, columns] from `first` on, to out [filled_up(columns) / 2, lanes, 2]: pairs of
 * columns, a row in each lane; `lanes` is a multiple of 16. */
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

/* The first 16 numbers of two rows in turn. */
INLINE __m512i woven(__m512i even, __m512i odd) {
    /* 32 added to an index takes from `odd` */
    const __m512i order = _mm512_or_si512(
        LANE, _mm512_slli_epi32(_mm512_add_epi32(LANE, _mm512_set1_epi32(32)), 16));
    return _mm512_permutex2var_epi16(even, order, odd);
}

/* Columns of x [rows, columns] from `first` on, to blocks [rows / 2, each, 2], `apart` numbers apart:
 * pairs of rows; `lanes` is a multiple of `each`, and that of 32. */
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

/* 16 columns of x [rows, columns] from `first` on as rows of out, up to a multiple of 32. */
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

static void *take(char **free_space, int64_t bytes) {
    char *taken = *free_space;
    *free_space += round_up(bytes, 64);
    return taken;
}

#define MOST_TERMS 16
_Static_assert(SLAB >= (INNER + MOST_TERMS * INNER_STEP) * LANES_M * 2, "a slab holds a block");

/* One term a b of a sum: a [rows, inner]; b [columns, inner] if `across`, else [inner, columns]. */
typedef struct {
    const bf16 *a;
    int64_t a_row, inner;
    Matrix b;
    int across;
} Term;

/* Working memory. Shared second matrices go to two slabs in turn: one is filled while threads that
 * are behind may still read the other. `sums` are for products with more inner numbers than INNER;
 * `own` is this thread's, and begins with its slab if those are not shared. */
typedef struct {
    bf16 *slab[2], *own;
    float *sums;
    int turn;
} Workspace;

static int64_t sums_bytes(int64_t rows, int64_t columns, int64_t inner) {
    return inner > INNER ? round_up(rows, ROWS_M) * round_up(columns, LANES_B) * 4 : 0;
}

/* Where sums go: they begin with what is in c if `add`, and stay there, or, if there is an `out`, are
 * rounded there, `columns` of them, with a bias and the rows of `plus` added, if there are such. */
typedef struct {
    float *c;
    int64_t c_row;
    int add;
    const bf16 *bias, *plus;
    bf16 *out;
    int64_t out_row, columns; /* of `plus`, too */
} Target;

/* The same from a row and a column on. */
INLINE Target moved(const Target *to, int64_t row, int64_t column) {
    Target next = *to;
    next.c += row * to->c_row + column;
    next.columns -= column;
    if (to->bias) next.bias += column;
    if (to->plus) next.plus += row * to->out_row + column;
    if (to->out) next.out += row * to->out_row + column;
    return next;
}

#ifdef TILES
#include "cpu_tiles.c"
#else
#include "cpu_vectors.c"
#endif

/* The terms with fewer rows left than a block has, from `row` on, filled up with zeros in `own`. */
static void fill_up(const Term *terms, int count, int64_t row, int64_t rows, bf16 *own,
                    Term *filled) {
    for (int i = 0; i < count; i++) {
        int64_t inner = terms[i].inner;
        filled[i] = terms[i];
        filled[i].a = own;
        filled[i].a_row = inner;
        memset(own, 0, ROWS_M * inner * 2);
        for (int64_t r = 0; r < rows; r++, own += inner)
            memcpy(own, terms[i].a + (row + r) * terms[i].a_row, inner * 2);
        own += (ROWS_M - rows) * inner;
    }
}

/* Lay out columns `start` to `stop` of the second matrices, `inner` numbers of all terms each. */
static void lay_out_columns(const Term *terms, int count, int64_t inner, int64_t columns,
                            int64_t start, int64_t stop, bf16 *slab) {
    int64_t apart = LANES_M * inner, lanes = round_up(stop - start, LANES_M);
    for (int i = 0; i < count; slab += filled_up(terms[i++].inner) * LANES_M) {
        const Matrix *b = &terms[i].b;
        if (!terms[i].across)
            pair_rows(b, start, terms[i].inner, columns, lanes, LANES_M, apart, slab);
        else
            for (int64_t j = 0; j < lanes; j += LANES_M)
                pair_columns(b, start + j, columns, terms[i].inner, LANES_M, slab + j * inner);
    }
}

/* `some` rows of the first matrices from `row` on times what was laid out, to `to` and what is right
 * of it. */
static void rows_times(const Term *terms, int count, int64_t inner, int64_t row, int64_t some,
                       const bf16 *slab, int64_t lanes, Target to, bf16 *own) {
    int64_t whole = some / ROWS_M * ROWS_M;
    Term filled[MOST_TERMS];
    blocks(terms, count, row, whole, slab, inner, lanes, to);
    if (whole == some) return;
    fill_up(terms, count, row + whole, some - whole, own, filled);
    blocks(filled, count, 0, some - whole, slab, inner, lanes, moved(&to, whole, 0));
}

#ifdef TILES
/* As `multiply`, for an inner dimension that is taken at once. Every thread lays out columns of its
 * own, as many as stay in its second-level cache, and takes all rows of them, or some where there
 * are too few columns for all threads. */
static void multiply_at_once(const Term *terms, int count, int64_t rows, const Target *to,
                             Workspace *space) {
    int64_t inner = 0, columns = to->columns, threads = omp_get_num_threads();
    for (int i = 0; i < count; i++) inner += filled_up(terms[i].inner);
    int64_t parts = (columns * inner * 2 + SLAB - 1) / SLAB;
    int64_t each = round_up((columns - 1) / round_up(parts, threads) + 1, LANES_M);
    if (each * inner * 2 > SLAB) each -= LANES_M; /* a slab holds a block */
    parts = (columns + each - 1) / each;
    int64_t shares = parts < threads ? (threads + parts - 1) / parts : 1;
    int64_t share = round_up((rows - 1) / shares + 1, ROWS_M);
    bf16 *slab = space->own, *rest = slab + SLAB / 2;
    _Pragma("omp for collapse(2) schedule(dynamic) nowait")
    for (int64_t start = 0; start < columns; start += each)
        for (int64_t row = 0; row < rows; row += share) {
            int64_t stop = start + each < columns ? start + each : columns;
            int64_t end = row + share < rows ? row + share : rows;
            lay_out_columns(terms, count, inner, columns, start, stop, slab);
            for (int64_t i = row; i < end; i += MOST_ROWS)
                rows_times(terms, count, inner, i, end - i < MOST_ROWS ? end - i : MOST_ROWS, slab,
                           stop - start, moved(to, i, start), rest);
        }
}
#else
/* As `multiply`, for an inner dimension that is taken at once. Threads lay out some columns together
 * and share tasks of few rows, so that none waits long for another. */
static void multiply_at_once(const Term *terms, int count, int64_t rows, const Target *to,
                             Workspace *space) {
    int64_t inner = 0, columns = to->columns;
    for (int i = 0; i < count; i++) inner += filled_up(terms[i].inner);
    int64_t at_once = SLAB / (2 * LANES_M * inner) * LANES_M;
    for (int64_t start = 0; start < columns; start += at_once) {
        int64_t stop = start + at_once < columns ? start + at_once : columns;
        bf16 *slab = space->slab[space->turn ^= 1];
        _Pragma("omp for schedule(dynamic)")
        for (int64_t j = start; j < stop; j += LANES_M) {
            int64_t end = j + LANES_M < stop ? j + LANES_M : stop;
            lay_out_columns(terms, count, inner, columns, j, end, slab + (j - start) * inner);
        }
        _Pragma("omp for schedule(dynamic) nowait")
        for (int64_t i = 0; i < rows; i += MOST_ROWS)
            rows_times(terms, count, inner, i, rows - i < MOST_ROWS ? rows - i : MOST_ROWS, slab,
                       stop - start, moved(to, i, start), space->own);
    }
}
#endif

/* Move a term's inner dimension on. */
static void skip_inner(Term *term, int64_t count) {
    int64_t numbers = term->across ? count : count * term->b.row;
    term->a += count;
    term->inner -= count;
    if (term->b.four) term->b.start += numbers;
    else term->b.values = (const char *)term->b.values + numbers * (term->b.wide ? 4 : 2);
}

/* to->out[rows, columns] = sum of terms and what `to` adds, by all threads of a parallel region
 * together; inner dimensions are even. No thread waits at the end: `out` is whole after the next
 * barrier. */
static void multiply(const Term *terms, int count, int64_t rows, const Target *to,
                     Workspace *space) {
    Target part = *to;
    part.c = space->sums;
    part.c_row = round_up(to->columns, LANES_B);
    Term left[MOST_TERMS], now[MOST_TERMS];
    int64_t inner = 0;
    for (int i = 0; i < count; i++) inner += (left[i] = terms[i]).inner;
    int64_t each = round_up(inner / ((inner + INNER - 1) / INNER) + 1, 32), done = 0;
    if (inner > INNER) { /* a thread may still be at the sums of the call before */
        _Pragma("omp barrier")
    }
    for (int first = 0; done < inner;) {
        int64_t room = each < INNER ? each : INNER;
        int used = 0;
        part.add = done > 0;
        if (part.add) { /* other threads go on with these sums */
            _Pragma("omp barrier")
        }
        while (room && first < count) {
            int64_t some = left[first].inner < room ? left[first].inner : room;
            now[used] = left[first];
            now[used++].inner = some;
            skip_inner(left + first, some);
            if (!left[first].inner) first++;
            room -= some;
            done += some;
        }
        part.out = done < inner ? 0 : to->out;
        multiply_at_once(now, used, rows, &part, space);
    }
}

static Workspace take_workspace(char **space, int64_t sums, int64_t own) {
    Workspace all = {.sums = take(space, sums)};
    for (int i = 0; i < 2 * SHARED; i++) all.slab[i] = take(space, SLAB);
    all.own = take(space, own);
    return all;
}

static int64_t own_bytes(int64_t inner) {
    return round_up(ROWS_M * (inner < INNER ? inner : INNER) * 2, 64) + !SHARED * SLAB;
}

/* Rows of a block: tells which units multiply. */
int64_t rows_of_block(void) { return ROWS_M; }

/* Bytes of working memory for `product_bfloat16`. */
int64_t product_room_bfloat16(int64_t rows, int64_t columns, int64_t inner, int threads) {
    char *space = 0;
    take_workspace(&space, sums_bytes(rows, columns, inner), threads * own_bytes(inner));
    return space - (char *)0;
}

/* out[rows, columns] = a b, a [rows, inner], b [columns, inner] if `across`, else [inner, columns]. */
void product_bfloat16(const bf16 *a, const bf16 *b, bf16 *out, int64_t rows, int64_t columns,
                      int64_t inner, int across, char *memory, int threads) {
    int64_t own = own_bytes(inner);
    Workspace all = take_workspace(&memory, sums_bytes(rows, columns, inner), threads * own);
    Term term = {a, inner, inner, {b, across ? inner : columns, 0, 1.0f}, across};
    Target to = {.out = out, .out_row = columns, .columns = columns};
    _Pragma("omp parallel num_threads(threads)")
    {
        Workspace space = all;
        space.own = (bf16 *)((char *)all.own + omp_get_thread_num() * own);
        begin_blocks();
        multiply(&term, 1, rows, &to, &space);
        end_blocks();
    }
}
