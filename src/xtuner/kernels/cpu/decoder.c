/* A decoder layer with LoRA on all its linear layers, for CPUs that multiply bfloat16.
 *
 *     y = x + W_o attention(norm(x) W_qkv),   out = y + W_d (silu(norm(y) W_g) * norm(y) W_u)
 *
 * Included by kernels.c. One call per direction replaces the calls for the parts of the layer. What
 * the backward pass needs is in one block, `saved`; the gated product is recomputed in the pass that
 * computes the gradients of gate and up.
 */

/* Norms; linear layers, whose x, dx, h and y the functions set; `rows`, whose q, k and v they set.
 * x, out, dx (or NULL) and grad, the gradient of out, are [tokens, hidden]. */
typedef struct {
    const bf16 *norm[2];
    float eps[2];
    Linears qkv, output, gates, down;
    Packed rows;
    const bf16 *x, *grad;
    bf16 *out, *dx;
    char *saved;
} Decoder;

/* Contents of `saved`: outputs and factors of the norms; q, k, v and the output of attention; the
 * residual sum after it; gate and up; the adapters' inner activations. */
typedef struct {
    bf16 *normed, *q, *k, *v, *attended, *y, *normed_y, *gate, *up;
    bf16 *h_qkv, *h_output, *h_gates, *h_down;
    float *factor, *factor_y, *logs;
} Saved;

static bf16 *take_rows(char **scratch, const Decoder *d, int64_t width) {
    return take(scratch, d->rows.tokens * width * 2);
}

static int64_t ranks_of(const Linears *l) {
    int64_t ranks = 0;
    for (int i = 0; i < l->parts; i++) ranks += l->part[i].rank;
    return ranks;
}

static Saved saved_of(const Decoder *d, char **scratch) {
    const Packed *r = &d->rows;
    const int64_t hidden = d->qkv.in, heads = r->heads * r->width, kv = r->kv_heads * r->width;
    Saved s;
    s.factor = take(scratch, r->tokens * 4), s.factor_y = take(scratch, r->tokens * 4);
    s.logs = take(scratch, r->heads * r->tokens * 4);
    s.normed = take_rows(scratch, d, hidden), s.normed_y = take_rows(scratch, d, hidden);
    s.y = take_rows(scratch, d, hidden);
    s.q = take_rows(scratch, d, heads), s.k = take_rows(scratch, d, kv), s.v = take_rows(scratch, d, kv);
    s.attended = take_rows(scratch, d, heads);
    s.gate = take_rows(scratch, d, d->down.in), s.up = take_rows(scratch, d, d->down.in);
    s.h_qkv = take_rows(scratch, d, ranks_of(&d->qkv));
    s.h_output = take_rows(scratch, d, ranks_of(&d->output));
    s.h_gates = take_rows(scratch, d, ranks_of(&d->gates));
    s.h_down = take_rows(scratch, d, ranks_of(&d->down));
    return s;
}

/* Linear layers with their input and the adapters' inner activations. */
static Linears of_input(const Linears *l, const bf16 *x, bf16 *h) {
    Linears all = *l;
    all.x = x, all.h = h;
    return all;
}

static Packed with_heads(const Decoder *d, const Saved *s) {
    Packed all = d->rows;
    all.q = s->q, all.k = s->k, all.v = s->v;
    all.q_row = all.heads * all.width, all.k_row = all.v_row = all.kv_heads * all.width;
    return all;
}

/* Size of `saved` in bytes. */
int64_t decoder_saved_bfloat16(const Decoder *d) {
    char *scratch = 0;
    saved_of(d, &scratch);
    return scratch - (char *)0;
}

/* Scratch memory: `inner` for the gated product; in the backward pass gradients of what the names say;
 * `rest` for the functions of the parts. */
typedef struct {
    bf16 *inner, *gate, *up, *normed, *y, *attended, *q, *k, *v;
    float *parts;
    char *rest;
} Passing;

static Passing passing_of(const Decoder *d, int backward, char *scratch) {
    const Packed *r = &d->rows;
    const int64_t heads = r->heads * r->width, kv = r->kv_heads * r->width;
    Passing p = {.inner = take_rows(&scratch, d, d->down.in)};
    if (backward) {
        p.gate = take_rows(&scratch, d, d->down.in), p.up = take_rows(&scratch, d, d->down.in);
        p.normed = take_rows(&scratch, d, d->qkv.in), p.y = take_rows(&scratch, d, d->qkv.in);
        p.attended = take_rows(&scratch, d, heads), p.q = take_rows(&scratch, d, heads);
        p.k = take_rows(&scratch, d, kv), p.v = take_rows(&scratch, d, kv);
        p.parts = take(&scratch, 2 * r->tokens * heads * 4);
    }
    p.rest = scratch;
    return p;
}

/* Bytes of scratch memory for either of the two functions below. */
int64_t decoder_scratch_bytes_bfloat16(const Decoder *d, int backward, int threads) {
    const Linears *all[] = {&d->qkv, &d->output, &d->gates, &d->down};
    int64_t most = attention_scratch_bytes_bfloat16(d->rows.length[0], d->rows.width, backward, threads);
    for (int i = 0; i < 4; i++) {
        int64_t bytes = lora_linear_scratch_bytes_bfloat16(all[i], backward, threads);
        most = bytes > most ? bytes : most;
    }
    return passing_of(d, backward, 0).rest - (char *)0 + most;
}

void decoder_bfloat16(const Decoder *d, char *memory, int threads) {
    char *cursor = d->saved;
    const Saved s = saved_of(d, &cursor);
    const Passing p = passing_of(d, 0, memory);
    const int64_t tokens = d->rows.tokens, hidden = d->qkv.in;

    rms_norm_bfloat16(d->x, d->norm[0], s.normed, s.factor, tokens, hidden, d->eps[0], threads);
    Linears qkv = of_input(&d->qkv, s.normed, s.h_qkv);
    qkv.part[0].y = s.q, qkv.part[1].y = s.k, qkv.part[2].y = s.v;
    lora_linear_bfloat16(&qkv, p.rest, threads);
    const Packed rows = with_heads(d, &s);
    attention_bfloat16(&rows, s.attended, s.logs, p.rest, threads);
    Linears output = of_input(&d->output, s.attended, s.h_output);
    output.part[0].y = s.y, output.part[0].plus = d->x;
    lora_linear_bfloat16(&output, p.rest, threads);

    rms_norm_bfloat16(s.y, d->norm[1], s.normed_y, s.factor_y, tokens, hidden, d->eps[1], threads);
    Linears gates = of_input(&d->gates, s.normed_y, s.h_gates);
    gates.part[0].y = s.gate, gates.part[1].y = s.up;
    lora_linear_bfloat16(&gates, p.rest, threads);
    _Pragma("omp parallel num_threads(threads)")
    gated_product(s.gate, s.up, p.inner, tokens * d->down.in);
    Linears down = of_input(&d->down, p.inner, s.h_down);
    down.part[0].y = d->out, down.part[0].plus = s.y;
    lora_linear_bfloat16(&down, p.rest, threads);
}

/* `lora_linear_backward` of the last linear layer; recomputes its input on the way. */
static void back_to_gates(const Decoder *d, const Saved *s, const Passing *p, int threads) {
    Linears down = of_input(&d->down, p->inner, s->h_down);
    down.dx = p->gate, down.part[0].y = (bf16 *)d->grad;
    const Layout all = lay_out(&down, 1, threads, p->rest);
    _Pragma("omp parallel num_threads(threads)")
    {
        begin_blocks();
        grad_of_input(&down, &all);
        _Pragma("omp barrier")
        gated_product_backward(p->gate, s->gate, s->up, p->inner, p->gate, p->up,
                               d->rows.tokens * d->down.in);
        grad_of_adapters(&down, &all);
        end_blocks();
    }
}

void decoder_backward_bfloat16(const Decoder *d, char *memory, int threads) {
    char *cursor = d->saved;
    const Saved s = saved_of(d, &cursor);
    const Passing p = passing_of(d, 1, memory);
    const int64_t tokens = d->rows.tokens, hidden = d->qkv.in;

    back_to_gates(d, &s, &p, threads);
    Linears gates = of_input(&d->gates, s.normed_y, s.h_gates);
    gates.dx = p.normed, gates.part[0].y = p.gate, gates.part[1].y = p.up;
    lora_linear_backward_bfloat16(&gates, p.rest, threads);
    rms_norm_backward_bfloat16(p.normed, s.y, d->norm[1], s.factor_y, d->grad, p.y, 0, tokens,
                               hidden, threads);

    Linears output = of_input(&d->output, s.attended, s.h_output);
    output.dx = p.attended, output.part[0].y = p.y;
    lora_linear_backward_bfloat16(&output, p.rest, threads);
    const Packed rows = with_heads(d, &s);
    attention_backward_bfloat16(&rows, s.attended, s.logs, p.attended, p.q, p.k, p.v, p.parts,
                                p.rest, threads);
    Linears qkv = of_input(&d->qkv, s.normed, s.h_qkv);
    qkv.dx = d->dx ? p.normed : 0;
    qkv.part[0].y = p.q, qkv.part[1].y = p.k, qkv.part[2].y = p.v;
    lora_linear_backward_bfloat16(&qkv, p.rest, threads);
    if (d->dx)
        rms_norm_backward_bfloat16(p.normed, d->x, d->norm[0], s.factor, p.y, d->dx, 0, tokens,
                                   hidden, threads);
}
