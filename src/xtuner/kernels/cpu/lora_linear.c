/* Linear layers that share one input, with their LoRA adapters, for CPUs that multiply bfloat16.
 *
 * Included by kernels.c; formulas in kernels/lora/linear.py, products in products.c. The frozen weight
 * and the adapter are two terms of one product; the gradient of the input is one product over all
 * layers. Sums stay in float32 and are rounded once.
 */

/* Tokens per pass where tokens are the inner dimension. */
enum { TOKENS = SHARED ? 256 : 1024 };
#define MAX_LAYERS 8 /* as in lora_linear.py */
_Static_assert(2 * MAX_LAYERS <= MOST_TERMS, "each layer has two terms");

/* A frozen layer W [out, in], bfloat16, or 4-bit if `four` is not NULL, with bias or NULL; its adapter
 * A [rank, in] and B [out, rank], float32, with gradients dA and dB; y [tokens, out], the output, to
 * which `plus` is added unless NULL, or in the backward pass its gradient. */
typedef struct {
    const void *weight;
    const FourBits *four;
    const bf16 *bias, *plus;
    const float *down, *up;
    bf16 *y;
    float *down_grad, *up_grad;
    int64_t out, rank;
    float scale;
} Part;

/* x [tokens, in]; dx [tokens, in] or NULL; h [tokens, sum of ranks], the adapters' x (s A)^T. */
typedef struct {
    const bf16 *x;
    bf16 *dx, *h;
    int64_t tokens, in, parts;
    Part part[MAX_LAYERS];
} Linears;

static Term by_weight(const Linears *l, int i, const bf16 *a, int64_t inner, int across) {
    const Part *p = l->part + i;
    Matrix weight = {.values = p->weight, .row = l->in, .four = p->four};
    return (Term){a, inner, inner, weight, across};
}

static Term by_down(const Linears *l, int i, const bf16 *a, int64_t a_row, int64_t inner,
                    int across) {
    Matrix down = {.values = l->part[i].down, .row = l->in, .wide = 1, .scale = l->part[i].scale};
    return (Term){a, a_row, inner, down, across};
}

static Term by_up(const Linears *l, int i, const bf16 *a, int64_t a_row, int64_t inner,
                  int across) {
    Matrix up = {.values = l->part[i].up, .row = l->part[i].rank, .wide = 1, .scale = 1.0f};
    return (Term){a, a_row, inner, up, across};
}

/* Scratch memory of a call. In the backward pass: dh = dy B, dh^T and h^T [sum of ranks, tokens]. */
typedef struct {
    Scratch shared;
    bf16 *dh, *dh_turned, *h_turned;
    int64_t own, bytes, ranks, turned_row;
} Layout;

static Layout lay_out(const Linears *l, int backward, int threads, char *scratch) {
    Layout all = {.turned_row = round_up(l->tokens, 32) + 32};
    const char *begin = scratch;
    int64_t inner = 0, sums = 0;
    for (int i = 0; i < l->parts; i++) {
        int64_t rank = l->part[i].rank, out = l->part[i].out;
        int64_t one = backward ? sums_bytes(l->tokens, rank, out)
                               : sums_bytes(l->tokens, out > rank ? out : rank, l->in + rank);
        all.ranks += rank;
        inner = backward ? inner + out + rank : l->in + rank > inner ? l->in + rank : inner;
        sums = one > sums ? one : sums;
    }
    int64_t backward_sums = backward ? sums_bytes(l->tokens, l->in, inner) : 0;
    int64_t rows = round_up(all.ranks, 16) + ROWS_M, tokens = (rows + TOKENS / 2) * LANES_B * 4;
    all.own = backward && tokens > own_bytes(inner) ? tokens : own_bytes(inner);
    all.shared = take_scratch(&scratch, backward_sums > sums ? backward_sums : sums, threads * all.own);
    if (backward) {
        all.dh = take(&scratch, l->tokens * all.ranks * 2);
        all.dh_turned = take(&scratch, rows * all.turned_row * 2);
        all.h_turned = take(&scratch, rows * all.turned_row * 2);
    }
    all.bytes = scratch - begin;
    return all;
}

static Scratch scratch_of(const Layout *all) {
    Scratch scratch = all->shared;
    scratch.own = (bf16 *)((char *)scratch.own + omp_get_thread_num() * all->own);
    return scratch;
}

/* Bytes of scratch memory for either of the two functions below. */
int64_t lora_linear_scratch_bytes_bfloat16(const Linears *l, int backward, int threads) {
    return lay_out(l, backward, threads, 0).bytes;
}

void lora_linear_bfloat16(const Linears *l, char *memory, int threads) {
    const Layout all = lay_out(l, 0, threads, memory);
    _Pragma("omp parallel num_threads(threads)")
    {
        Scratch scratch = scratch_of(&all);
        bf16 *h = l->h;
        begin_blocks();
        for (int i = 0; i < l->parts; h += l->part[i++].rank) {
            Term down = by_down(l, i, l->x, l->in, l->in, 1);
            Target to = {.out = h, .out_row = all.ranks, .columns = l->part[i].rank};
            multiply(&down, 1, l->tokens, &to, &scratch);
        }
        _Pragma("omp barrier")
        h = l->h;
        for (int i = 0; i < l->parts; h += l->part[i++].rank) {
            const Part *p = l->part + i;
            Term both[] = {by_weight(l, i, l->x, l->in, 1), by_up(l, i, h, all.ranks, p->rank, 1)};
            Target to = {.bias = p->bias, .plus = p->plus, .out = p->y, .out_row = p->out,
                         .columns = p->out};
            multiply(both, 2, l->tokens, &to, &scratch);
        }
        end_blocks();
    }
}

/* sums[rows, 64] = a x, for a [rows, tokens] and 64 columns of x [tokens, columns] starting at `column`.
 * The memory holds the sums, followed by x packed by pairs of rows. Returns the sums. */
static float *over_tokens(const bf16 *a, int64_t a_row, int64_t rows, const bf16 *x, int64_t tokens,
                          int64_t columns, int64_t column, bf16 *memory) {
    float *sums = (float *)memory;
    bf16 *paired = (bf16 *)(sums + round_up(rows, ROWS_M) * LANES_B);
    for (int64_t t = 0; t < tokens; t += TOKENS) {
        int64_t some = tokens - t < TOKENS ? tokens - t : TOKENS;
        Matrix from = {.values = x + t * columns, .row = columns};
        pair_rows(&from, column, some, columns, LANES_B, LANES_B, 0, paired);
        const bf16 *next = x + (t + TOKENS) * columns + column;
        const int64_t rows_each = (TOKENS * ROWS_M + rows - 1) / rows;
        for (int64_t r = 0, k = 0; r < rows; r += ROWS_M) {
            for (int64_t end = k + rows_each; k < end && t + TOKENS + k < tokens; k++) {
                _mm_prefetch(next + k * columns, _MM_HINT_T1);
                _mm_prefetch(next + k * columns + LANES_B / 2, _MM_HINT_T1);
            }
            product(LANES_B, a + r * a_row + t, a_row, paired, 2 * LANES_B, filled_up(some) / 2,
                    sums + r * LANES_B, LANES_B, t > 0);
        }
    }
    return sums;
}

/* dA of all layers, for 64 columns starting at `column`. */
static void grad_of_downs(const Linears *l, const Layout *all, int64_t column, bf16 *memory) {
    const float *sums = over_tokens(all->dh_turned, all->turned_row, all->ranks, l->x, l->tokens,
                                    l->in, column, memory);
    for (int i = 0; i < l->parts; sums += l->part[i++].rank * LANES_B)
        for (int64_t r = 0; r < l->part[i].rank; r++) {
            float *to = l->part[i].down_grad + r * l->in + column;
            for (int64_t j = 0; j < LANES_B && column + j < l->in; j++)
                to[j] = l->part[i].scale * sums[r * LANES_B + j];
        }
}

/* 64 rows of dB of layer i, starting at `row`; `before` is the sum of the ranks of earlier layers. */
static void grad_of_up(const Linears *l, const Layout *all, int i, int64_t before, int64_t row,
                       bf16 *memory) {
    const Part *p = l->part + i;
    const float *sums = over_tokens(all->h_turned + before * all->turned_row, all->turned_row,
                                    p->rank, p->y, l->tokens, p->out, row, memory);
    for (int64_t r = 0; r < p->rank; r += 16)
        for (int64_t j = 0; j < LANES_B; j += 16) {
            __m512i block[16];
            for (int k = 0; k < 16; k++)
                block[k] = r + k < p->rank ? _mm512_loadu_si512(sums + (r + k) * LANES_B + j)
                                           : _mm512_setzero_si512();
            transpose(block);
            __mmask16 mask = (__mmask16)first_lanes(p->rank - r < 16 ? p->rank - r : 16);
            for (int k = 0; k < 16 && row + j + k < p->out; k++)
                _mm512_mask_storeu_epi32(p->up_grad + (row + j + k) * p->rank + r, mask, block[k]);
        }
}

/* dx, unless NULL, and dh, which the gradients of the adapters need; both are complete after the next
 * barrier. Call from a parallel region. */
static void grad_of_input(const Linears *l, const Layout *all) {
    Scratch scratch = scratch_of(all);
    Term terms[2 * MAX_LAYERS];
    bf16 *dh = all->dh;
    int parts = (int)l->parts;
    for (int i = 0; i < parts; dh += l->part[i++].rank) {
        const Part *p = l->part + i;
        Term up = by_up(l, i, p->y, p->out, p->out, 0);
        Target inside = {.out = dh, .out_row = all->ranks, .columns = p->rank};
        multiply(&up, 1, l->tokens, &inside, &scratch);
        terms[i] = by_weight(l, i, p->y, p->out, 0);
        terms[parts + i] = by_down(l, i, dh, all->ranks, p->rank, 0);
    }
    _Pragma("omp barrier")
    Target to = {.out = l->dx, .out_row = l->in, .columns = l->in};
    if (l->dx) multiply(terms, 2 * parts, l->tokens, &to, &scratch);
}

/* dA and dB of all layers. Call from a parallel region. */
static void grad_of_adapters(const Linears *l, const Layout *all) {
    bf16 *own = scratch_of(all).own;
    Matrix dhs = {.values = all->dh, .row = all->ranks}, hs = {.values = l->h, .row = all->ranks};
    _Pragma("omp for schedule(dynamic)")
    for (int64_t r = 0; r < all->ranks; r += 16) {
        int64_t offset = r * all->turned_row;
        turn_columns(&dhs, r, l->tokens, all->ranks, all->dh_turned + offset, all->turned_row);
        turn_columns(&hs, r, l->tokens, all->ranks, all->h_turned + offset, all->turned_row);
    }
    _Pragma("omp for schedule(dynamic) nowait")
    for (int64_t j = 0; j < l->in; j += LANES_B) grad_of_downs(l, all, j, own);
    int64_t before = 0;
    for (int i = 0; i < l->parts; before += l->part[i++].rank) {
        _Pragma("omp for schedule(dynamic) nowait")
        for (int64_t j = 0; j < l->part[i].out; j += LANES_B)
            grad_of_up(l, all, i, before, j, own);
    }
}

void lora_linear_backward_bfloat16(const Linears *l, char *memory, int threads) {
    const Layout all = lay_out(l, 1, threads, memory);
    _Pragma("omp parallel num_threads(threads)")
    {
        begin_blocks();
        grad_of_input(l, &all);
        _Pragma("omp barrier")
        grad_of_adapters(l, &all);
        end_blocks();
    }
}
