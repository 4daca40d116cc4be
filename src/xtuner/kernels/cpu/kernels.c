/* The element-wise operations of a training step on a CPU, each in one pass over memory.
 *
 * torch takes five to ten passes for a norm, a rotation or a masked softmax, and a pass costs more
 * than the arithmetic. Compiled once by build.py; without a compiler torch does the work. The file
 * includes itself, once for bfloat16 and once for float32; all arithmetic is float32.
 */
#ifndef NAME

#include <math.h>
#include <stdint.h>
#include <string.h>

#define ROWS _Pragma("omp parallel for num_threads(threads) schedule(static)")
#define ROWS2 _Pragma("omp parallel for collapse(2) num_threads(threads) schedule(static)")
#define LANES _Pragma("omp simd")
#define SUM _Pragma("omp simd reduction(+ : sum)")

static inline float from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    return bits;
}

/* Round to nearest even; NaN stays NaN. */
static inline uint16_t to_bfloat16(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
    return (uint16_t)(x != x ? 0x7fc0u : rounded);
}

/* e^x to 2 units in the last place, by 2^n e^r with |r| <= ln(2)/2; 0 below -87, inf above 88. */
static inline float exponential(float x) {
    float n = floorf(x * 1.44269504f + 0.5f);
    n = n < -127.0f ? -127.0f : n;
    n = n > 128.0f ? 128.0f : n;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    float power = from_bits((uint32_t)((int32_t)n + 127) << 23);
    return x < -87.0f ? 0.0f : p * power;
}

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

#ifdef __AVX512BF16__
#define IN_VECTORS /* elements.c defines some of the functions */
#endif
#define NAME(function) function##_bfloat16
#define NUM uint16_t
#define LOAD(x) from_bits((uint32_t)(x) << 16)
#define STORE(x) to_bfloat16(x)
#include "kernels.c"
#undef NAME
#undef NUM
#undef LOAD
#undef STORE
#undef IN_VECTORS

#ifdef __AVX512BF16__
#include "products.c"
#include "elements.c"
#include "attention.c"
#include "attention_backward.c"
#include "lora_linear.c"
#include "decoder.c"
#endif

#define NAME(function) function##_float32
#define NUM float
#define LOAD(x) (x)
#define STORE(x) (x)
#include "kernels.c"

#else

/* y = w x r, r = 1 / sqrt(mean(x^2) + eps); x and y [rows, width], r saved in scale [rows]. */
void NAME(rms_norm)(const NUM *x, const NUM *w, NUM *y, float *scale, int64_t rows, int64_t width,
                    float eps, int threads) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        const NUM *from = x + i * width;
        NUM *to = y + i * width;
        float sum = 0.0f;
        SUM for (int64_t j = 0; j < width; j++) sum += LOAD(from[j]) * LOAD(from[j]);
        float r = scale[i] = 1.0f / sqrtf(sum / (float)width + eps);
        LANES for (int64_t j = 0; j < width; j++) to[j] = STORE(LOAD(from[j]) * r * LOAD(w[j]));
    }
}

/* dx = r g - x r^3 mean(g x) + plus, g = w dy; plus [rows, width] or NULL; dw [rows / 64, width] gets
 * partial sums of dy x r over 64 rows each, or is NULL. */
void NAME(rms_norm_backward)(const NUM *dy, const NUM *x, const NUM *w, const float *scale,
                             const NUM *plus, NUM *dx, float *dw, int64_t rows, int64_t width,
                             int threads) {
    ROWS for (int64_t first = 0; first < rows; first += 64) {
        float *grad_weight = dw ? dw + first / 64 * width : 0;
        if (dw) memset(grad_weight, 0, width * sizeof(float));
        for (int64_t i = first; i < rows && i < first + 64; i++) {
            const NUM *from = x + i * width, *grad_y = dy + i * width;
            NUM *to = dx + i * width;
            float sum = 0.0f, r = scale[i];
            SUM for (int64_t j = 0; j < width; j++)
                sum += LOAD(grad_y[j]) * LOAD(w[j]) * LOAD(from[j]);
            float mean = sum / (float)width * r * r * r;
            const NUM *more = plus ? plus + i * width : 0;
            if (more)
                LANES for (int64_t j = 0; j < width; j++)
                    to[j] = STORE(LOAD(grad_y[j]) * LOAD(w[j]) * r - LOAD(from[j]) * mean +
                                  LOAD(more[j]));
            else
                LANES for (int64_t j = 0; j < width; j++)
                    to[j] = STORE(LOAD(grad_y[j]) * LOAD(w[j]) * r - LOAD(from[j]) * mean);
            if (dw)
                LANES for (int64_t j = 0; j < width; j++)
                    grad_weight[j] += LOAD(grad_y[j]) * LOAD(from[j]) * r;
        }
    }
}

/* softmax(scale * scores) over keys first..last-1 of each query, in place, 0 elsewhere;
 * scores [blocks, heads, queries, keys], first and last [blocks, queries]. */
void NAME(softmax_within)(NUM *scores, const int32_t *first, const int32_t *last, int64_t blocks,
                          int64_t heads, int64_t queries, int64_t keys, float scale, int threads) {
    ROWS2 for (int64_t i = 0; i < blocks; i++)
    for (int64_t h = 0; h < heads; h++)
    for (int64_t q = 0; q < queries; q++) {
        NUM *row = scores + ((i * heads + h) * queries + q) * keys;
        int64_t from = first[i * queries + q], to = last[i * queries + q];
        float e[keys], top = -INFINITY, sum = 0.0f;
        _Pragma("omp simd reduction(max : top)")
        for (int64_t k = from; k < to; k++) {
            e[k] = LOAD(row[k]);
            top = e[k] > top ? e[k] : top;
        }
        SUM for (int64_t k = from; k < to; k++) sum += e[k] = exponential((e[k] - top) * scale);
        float share = 1.0f / sum;
        for (int64_t k = 0; k < from; k++) row[k] = 0;
        LANES for (int64_t k = from; k < to; k++) row[k] = STORE(e[k] * share);
        for (int64_t k = to; k < keys; k++) row[k] = 0;
    }
}

/* dS = scale P (dP - rowsum(P dP)), overwriting dP. */
void NAME(softmax_within_backward)(NUM *grad, const NUM *weights, const int32_t *first,
                                   const int32_t *last, int64_t blocks, int64_t heads,
                                   int64_t queries, int64_t keys, float scale, int threads) {
    ROWS2 for (int64_t i = 0; i < blocks; i++)
    for (int64_t h = 0; h < heads; h++)
    for (int64_t q = 0; q < queries; q++) {
        int64_t start = ((i * heads + h) * queries + q) * keys;
        NUM *row = grad + start;
        const NUM *p = weights + start;
        int64_t from = first[i * queries + q], to = last[i * queries + q];
        float sum = 0.0f;
        SUM for (int64_t k = from; k < to; k++) sum += LOAD(row[k]) * LOAD(p[k]);
        for (int64_t k = 0; k < from; k++) row[k] = 0;
        LANES for (int64_t k = from; k < to; k++)
            row[k] = STORE(scale * LOAD(p[k]) * (LOAD(row[k]) - sum));
        for (int64_t k = to; k < keys; k++) row[k] = 0;
    }
}

/* Rotate a head by its rotary position (arXiv:2104.09864, equation 34), or copy it if c is NULL. */
static inline void NAME(turn)(const NUM *x, const float *c, const float *s, NUM *out,
                              int64_t width) {
    int64_t half = width / 2;
    if (!c) {
        memcpy(out, x, width * sizeof(NUM));
        return;
    }
    LANES for (int64_t d = 0; d < half; d++) {
        float a = LOAD(x[d]), b = LOAD(x[d + half]);
        out[d] = STORE(a * c[d] - b * s[d]);
        out[d + half] = STORE(b * c[d + half] + a * s[d + half]);
    }
}

/* Write head h of token t, rotated if cosine is not NULL, to out + offsets[t] + h * head_stride.
 * x [tokens, heads, width] with row stride row_stride; cosine and sine [tokens, width] or NULL. */
void NAME(rotate_out)(const NUM *x, const float *cosine, const float *sine, NUM *out,
                      const int64_t *offsets, int64_t tokens, int64_t heads, int64_t width,
                      int64_t row_stride, int64_t head_stride, int threads) {
    ROWS for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++)
        NAME(turn)(x + t * row_stride + h * width, cosine ? cosine + t * width : 0,
                   cosine ? sine + t * width : 0, out + offsets[t] + h * head_stride, width);
}

/* Backward pass of rotate_out. */
void NAME(rotate_back)(const NUM *x, const float *cosine, const float *sine, NUM *out,
                       const int64_t *offsets, int64_t tokens, int64_t heads, int64_t width,
                       int64_t row_stride, int64_t head_stride, int threads) {
    int64_t half = width / 2;
    ROWS for (int64_t t = 0; t < tokens; t++)
    for (int64_t h = 0; h < heads; h++) {
        const NUM *from = x + offsets[t] + h * head_stride;
        NUM *to = out + t * row_stride + h * width;
        if (!cosine) {
            memcpy(to, from, width * sizeof(NUM));
            continue;
        }
        const float *c = cosine + t * width, *s = sine + t * width;
        LANES for (int64_t d = 0; d < half; d++) {
            float a = LOAD(from[d]), b = LOAD(from[d + half]);
            to[d] = STORE(a * c[d] + b * s[d + half]);
            to[d + half] = STORE(b * c[d + half] - a * s[d]);
        }
    }
}

/* Add part [blocks, heads, keys, width] to total [heads, tokens, width]; the keys of block i start at
 * token start[i]; starts and keys are multiples of tile. */
void NAME(add_windows)(const NUM *part, float *total, const int64_t *start, int64_t blocks,
                       int64_t heads, int64_t keys, int64_t tokens, int64_t width, int64_t tile,
                       int threads) {
    ROWS2 for (int64_t h = 0; h < heads; h++)
    for (int64_t first = 0; first < tokens; first += tile)
    for (int64_t i = 0; i < blocks; i++) {
        if (first < start[i] || first >= start[i] + keys) continue;
        const NUM *from = part + ((i * heads + h) * keys + first - start[i]) * width;
        float *to = total + (h * tokens + first) * width;
        LANES for (int64_t j = 0; j < tile * width; j++) to[j] += LOAD(from[j]);
    }
}

#ifndef IN_VECTORS

/* y = silu(gate) * up. */
void NAME(silu_product)(const NUM *gate, const NUM *up, NUM *y, int64_t count, int threads) {
    _Pragma("omp parallel for simd num_threads(threads) schedule(static)")
    for (int64_t i = 0; i < count; i++) {
        float g = LOAD(gate[i]);
        y[i] = STORE(g * sigmoid(g) * LOAD(up[i]));
    }
}

void NAME(silu_product_backward)(const NUM *dy, const NUM *gate, const NUM *up, NUM *dgate,
                                 NUM *dup, int64_t count, int threads) {
    _Pragma("omp parallel for simd num_threads(threads) schedule(static)")
    for (int64_t i = 0; i < count; i++) {
        float g = LOAD(gate[i]), grad_y = LOAD(dy[i]), s = sigmoid(g);
        dup[i] = STORE(grad_y * g * s);
        dgate[i] = STORE(grad_y * LOAD(up[i]) * s * (1.0f + g * (1.0f - s)));
    }
}

/* loss[i] = -log softmax(logits[i])[target[i]]; if gradient, logits are overwritten by softmax - onehot. */
void NAME(cross_entropy)(NUM *logits, const int64_t *target, float *loss, int64_t rows,
                         int64_t words, int gradient, int threads) {
    ROWS for (int64_t i = 0; i < rows; i++) {
        NUM *row = logits + i * words;
        float top = -INFINITY, sum = 0.0f;
        _Pragma("omp simd reduction(max : top)")
        for (int64_t j = 0; j < words; j++) top = LOAD(row[j]) > top ? LOAD(row[j]) : top;
        SUM for (int64_t j = 0; j < words; j++) sum += exponential(LOAD(row[j]) - top);
        float wanted = LOAD(row[target[i]]) - top, log_sum = logf(sum), share = 1.0f / sum;
        loss[i] = log_sum - wanted;
        if (!gradient) continue;
        LANES for (int64_t j = 0; j < words; j++)
            row[j] = STORE(exponential(LOAD(row[j]) - top) * share);
        row[target[i]] = STORE(exponential(wanted) * share - 1.0f);
    }
}

#endif

/* Block-wise 4-bit quantization (arXiv:2305.14314, section 3) as bitsandbytes stores it: the largest
 * magnitude of each of `blocks` blocks of `width` values (even, at most 4,096), and the number of
 * `bounds` (15, rising) below each value divided by it, two values a byte, the first in the upper half.
 * The bits of a NaN exceed those of numbers, so a NaN is never lost. */
void NAME(quantize_4bit)(const NUM *x, const float *bounds, float *largest, uint8_t *packed,
                         int64_t blocks, int64_t width, int threads) {
    ROWS for (int64_t b = 0; b < blocks; b++) {
        const NUM *from = x + b * width;
        uint8_t *to = packed + b * width / 2, codes[4096];
        uint32_t top = 0;
        _Pragma("omp simd reduction(max : top)")
        for (int64_t i = 0; i < width; i++) {
            uint32_t size = to_bits(LOAD(from[i])) & 0x7fffffffu;
            top = size > top ? size : top;
        }
        float size = largest[b] = from_bits(top);
        float factor = 1.0f / (size < 1e-38f ? 1e-38f : size);
        LANES for (int64_t i = 0; i < width; i++) {
            float value = LOAD(from[i]) * factor;
            int32_t code = 0;
            for (int k = 0; k < 15; k++) code += value > bounds[k];
            codes[i] = (uint8_t)code;
        }
        LANES for (int64_t i = 0; i < width / 2; i++)
            to[i] = (uint8_t)(codes[2 * i] << 4 | codes[2 * i + 1]);
    }
}

#endif
