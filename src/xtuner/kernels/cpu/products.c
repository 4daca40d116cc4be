/* Products of bfloat16 matrices with AVX512-BF16 vectors or AMX tiles.
 *
 * Included by kernels.c, for attention, linear layers and the loss. The instructions consume two
 * adjacent elements of the inner dimension, so the second matrix is packed with such pairs side by side
 * (layout.c). vectors.c and tiles.c multiply blocks of rows with the packed matrix; `multiply`
 * distributes a product over threads.
 */

#include <immintrin.h>
#include <omp.h>

#ifndef __AMX_BF16__
#undef TILES /* build.py defines it where the operating system permits AMX */
#endif

#define LANES_B 64 /* columns: four vectors of 16 */
#define INLINE static inline __attribute__((always_inline))

#define LANE _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)

typedef uint16_t bf16;

/* Rows and columns of an output block; the multiple to which the inner dimension is padded; rows per
 * task; inner elements per pass; bytes of packed second matrices, for all threads together if `SHARED`,
 * else per thread. */
#ifdef TILES
enum { ROWS_M = 32, LANES_M = 32, INNER_STEP = 32, MOST_ROWS = 128 };
enum { INNER = 1664, SLAB = 3 << 19, SHARED = 0 };
#else
enum { ROWS_M = 6, LANES_M = LANES_B, INNER_STEP = 2, MOST_ROWS = 36 };
enum { INNER = 3200, SLAB = 1 << 22, SHARED = 1 };
#endif

static int64_t round_up(int64_t x, int64_t step) { return (x + step - 1) / step * step; }

static int64_t filled_up(int64_t inner) { return round_up(inner, INNER_STEP); }

#include "layout.c"

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

/* Scratch memory. Shared second matrices alternate between two slabs: one is filled while slower
 * threads may still read the other. `sums` is for products with an inner dimension above INNER; `own`
 * belongs to this thread and begins with its slab if slabs are not shared. */
typedef struct {
    bf16 *slab[2], *own;
    float *sums;
    int turn;
} Scratch;

static int64_t sums_bytes(int64_t rows, int64_t columns, int64_t inner) {
    return inner > INNER ? round_up(rows, ROWS_M) * round_up(columns, LANES_B) * 4 : 0;
}

/* Destination of sums: accumulated into c if `add`; rounded to `columns` columns of out unless NULL, with
 * the bias and the rows of `plus` added unless NULL. */
typedef struct {
    float *c;
    int64_t c_row;
    int add;
    const bf16 *bias, *plus;
    bf16 *out;
    int64_t out_row, columns; /* also of `plus` */
} Target;

/* The same destination, moved to a row and a column. */
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
#include "tiles.c"
#else
#include "vectors.c"
#endif

/* Copy the last rows of the terms, fewer than a block, into `own` and pad them with zeros. */
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

/* Pack columns `start` to `stop` of the second matrices, `inner` elements over all terms. */
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

/* Multiply `some` rows of the first matrices, starting at `row`, with the packed columns, into `to`. */
static void rows_times(const Term *terms, int count, int64_t inner, int64_t row, int64_t some,
                       const bf16 *slab, int64_t lanes, Target to, bf16 *own) {
    int64_t full = some / ROWS_M * ROWS_M;
    Term filled[MOST_TERMS];
    blocks(terms, count, row, full, slab, inner, lanes, to);
    if (full == some) return;
    fill_up(terms, count, row + full, some - full, own, filled);
    blocks(filled, count, 0, some - full, slab, inner, lanes, moved(&to, full, 0));
}

#ifdef TILES
/* `multiply` in a single pass over the inner dimension. Every thread packs its own columns, as many as
 * fit into its L2 cache, and multiplies all rows with them, or a share of the rows where there are too
 * few columns for all threads. */
static void multiply_at_once(const Term *terms, int count, int64_t rows, const Target *to,
                             Scratch *scratch) {
    int64_t inner = 0, columns = to->columns, threads = omp_get_num_threads();
    for (int i = 0; i < count; i++) inner += filled_up(terms[i].inner);
    int64_t parts = (columns * inner * 2 + SLAB - 1) / SLAB;
    int64_t each = round_up((columns - 1) / round_up(parts, threads) + 1, LANES_M);
    if (each * inner * 2 > SLAB) each -= LANES_M; /* a slab holds a block */
    parts = (columns + each - 1) / each;
    int64_t shares = parts < threads ? (threads + parts - 1) / parts : 1;
    int64_t share = round_up((rows - 1) / shares + 1, ROWS_M);
    bf16 *slab = scratch->own, *rest = slab + SLAB / 2;
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
/* `multiply` in a single pass over the inner dimension. Threads pack columns together and share tasks of
 * a few rows each, so that none waits long for another. */
static void multiply_at_once(const Term *terms, int count, int64_t rows, const Target *to,
                             Scratch *scratch) {
    int64_t inner = 0, columns = to->columns;
    for (int i = 0; i < count; i++) inner += filled_up(terms[i].inner);
    int64_t at_once = SLAB / (2 * LANES_M * inner) * LANES_M;
    for (int64_t start = 0; start < columns; start += at_once) {
        int64_t stop = start + at_once < columns ? start + at_once : columns;
        bf16 *slab = scratch->slab[scratch->turn ^= 1];
        _Pragma("omp for schedule(dynamic)")
        for (int64_t j = start; j < stop; j += LANES_M) {
            int64_t end = j + LANES_M < stop ? j + LANES_M : stop;
            lay_out_columns(terms, count, inner, columns, j, end, slab + (j - start) * inner);
        }
        _Pragma("omp for schedule(dynamic) nowait")
        for (int64_t i = 0; i < rows; i += MOST_ROWS)
            rows_times(terms, count, inner, i, rows - i < MOST_ROWS ? rows - i : MOST_ROWS, slab,
                       stop - start, moved(to, i, start), scratch->own);
    }
}
#endif

/* Advance a term along its inner dimension. */
static void skip_inner(Term *term, int64_t count) {
    int64_t numbers = term->across ? count : count * term->b.row;
    term->a += count;
    term->inner -= count;
    if (term->b.four) term->b.start += numbers;
    else term->b.values = (const char *)term->b.values + numbers * (term->b.wide ? 4 : 2);
}

/* to->out[rows, columns] = sum of the terms, plus what `to` adds. Called by all threads of a parallel
 * region; inner dimensions are even. There is no barrier at the end: `out` is complete after the next
 * one. */
static void multiply(const Term *terms, int count, int64_t rows, const Target *to,
                     Scratch *scratch) {
    Target part = *to;
    part.c = scratch->sums;
    part.c_row = round_up(to->columns, LANES_B);
    Term left[MOST_TERMS], now[MOST_TERMS];
    int64_t inner = 0;
    for (int i = 0; i < count; i++) inner += (left[i] = terms[i]).inner;
    int64_t each = round_up(inner / ((inner + INNER - 1) / INNER) + 1, 32), done = 0;
    if (inner > INNER) { /* a thread may still use the sums of the previous call */
        _Pragma("omp barrier")
    }
    for (int first = 0; done < inner;) {
        int64_t budget = each < INNER ? each : INNER;
        int used = 0;
        part.add = done > 0;
        if (part.add) { /* other threads continue with these sums */
            _Pragma("omp barrier")
        }
        while (budget && first < count) {
            int64_t some = left[first].inner < budget ? left[first].inner : budget;
            now[used] = left[first];
            now[used++].inner = some;
            skip_inner(left + first, some);
            if (!left[first].inner) first++;
            budget -= some;
            done += some;
        }
        part.out = done < inner ? 0 : to->out;
        multiply_at_once(now, used, rows, &part, scratch);
    }
}

static Scratch take_scratch(char **scratch, int64_t sums, int64_t own) {
    Scratch all = {.sums = take(scratch, sums)};
    for (int i = 0; i < 2 * SHARED; i++) all.slab[i] = take(scratch, SLAB);
    all.own = take(scratch, own);
    return all;
}

static int64_t own_bytes(int64_t inner) {
    return round_up(ROWS_M * (inner < INNER ? inner : INNER) * 2, 64) + !SHARED * SLAB;
}

/* Rows of a block, which identify the instruction set in use. */
int64_t rows_of_block(void) { return ROWS_M; }

/* Bytes of scratch memory for `product_bfloat16`. */
int64_t product_scratch_bytes_bfloat16(int64_t rows, int64_t columns, int64_t inner, int threads) {
    char *scratch = 0;
    take_scratch(&scratch, sums_bytes(rows, columns, inner), threads * own_bytes(inner));
    return scratch - (char *)0;
}

/* out[rows, columns] = a b, a [rows, inner], b [columns, inner] if `across`, else [inner, columns]. */
void product_bfloat16(const bf16 *a, const bf16 *b, bf16 *out, int64_t rows, int64_t columns,
                      int64_t inner, int across, char *memory, int threads) {
    int64_t own = own_bytes(inner);
    Scratch all = take_scratch(&memory, sums_bytes(rows, columns, inner), threads * own);
    Matrix second = {.values = b, .row = across ? inner : columns};
    Term term = {a, inner, inner, second, across};
    Target to = {.out = out, .out_row = columns, .columns = columns};
    _Pragma("omp parallel num_threads(threads)")
    {
        Scratch scratch = all;
        scratch.own = (bf16 *)((char *)all.own + omp_get_thread_num() * own);
        begin_blocks();
        multiply(&term, 1, rows, &to, &scratch);
        end_blocks();
    }
}
