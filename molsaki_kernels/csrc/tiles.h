/* What the sources of this folder share: vectors of floats, exp, bfloat16, a product in registers, and a plan. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, STRIP = 12, DEEP = 4 };
#else
enum { LANES = 8, STRIP = 6, DEEP = 2 };
#endif
/* Registers: STRIP x 2 vectors of scores, or GROUP x DEEP vectors of a head's numbers. */
enum { GROUP = 6, MAX_D = 256 };

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define UNROLL _Pragma("GCC unroll 24")
#define INLINE static inline __attribute__((always_inline))
#define NEVER INT32_MAX /* the position of a padding token */

/* Sequences and their plan, as `native/sequences.py` makes them: where each is, its key tokens (padded to `columns`), its
 * rows' steps. */
typedef struct {
    int64_t sequences, columns, longest, tasks;
    const int64_t *batch, *begin, *length, *tokens_used;
    const int32_t *tokens, *word_of_token, *step_of_row;
    /* A task: rows [row, row + TASK_ROWS) of a sequence, which touch `count` steps from `first` on; `slot` counts the
     * steps of the tasks before. */
    const int64_t *task_sequence, *task_row, *task_first, *task_count, *task_slot;
} Plan;

enum { TASK_ROWS = 192 };

INLINE vf load(const float *x) { return *(const vf_any *)x; }
INLINE void store(float *x, vf v) { *(vf_any *)x = v; }
#ifdef __AVX512F__
INLINE vf least(vf a, vf b) { return _mm512_min_ps(a, b); } /* the second where one is NaN */
INLINE vf most(vf a, vf b) { return _mm512_max_ps(a, b); }
#else
INLINE vf least(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf most(vf a, vf b) { return _mm256_max_ps(a, b); }
#endif
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf clamp(vf x, float a, float b) { return most(splat(a), least(splat(b), x)); } /* NaN stays NaN */
INLINE int64_t lowest(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t highest(int64_t a, int64_t b) { return a > b ? a : b; }

INLINE float sum_of(vf x) {
    float lanes[LANES];
    store(lanes, x);
    for (int half = LANES / 2; half > 0; half /= 2)
        for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
    return lanes[0];
}

INLINE float from_bf16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To the nearest, ties to even; NaN stays NaN. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}

/* A row of float32 or bfloat16 numbers, as float32. */
INLINE void read_row(const void *x, int64_t offset, int64_t is_bf16, int64_t D, float *row) {
    if (is_bf16)
        for (int64_t d = 0; d < D; d++) row[d] = from_bf16(((const uint16_t *)x)[offset + d]);
    else
        memcpy(row, (const float *)x + offset, D * sizeof(float));
}

/* exp of numbers in [-80, 80] as (1 + rest) power: reduction by ln 2 (one fused product; off by 2e-9 for each factor of
 * 2), then a polynomial (Cephes' expf). */
INLINE vf exponential_parts(vf x, vf *power) {
    const float shift = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    vf n = x * 1.44269504088896341f + shift;
    *power = (vf)(((vi)n << 23) + 0x3f800000);
    n -= shift;
    x -= n * 0.693147180559945f;
    vf y = 1.9875691500e-4f * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    return y * (x * x) + x;
}

INLINE vf exponential(vf x) {
    vf power, rest = exponential_parts(x, &power);
    return (rest + 1.0f) * power; /* a product: NaN stays NaN */
}

/* tanh, to a few units in the last place near 0 too: of m = exp(2 x) - 1, m / (m + 2). */
INLINE vf hyperbolic_tangent(vf x) {
    vf power, rest = exponential_parts(clamp(2.0f * x, -80.0f, 80.0f), &power);
    const vf m = rest * power + (power - 1.0f);
    return m / (m + 2.0f);
}

/* How many of n ascending tokens are below `bound`. */
static inline int64_t below(const int32_t *tokens, int64_t n, int64_t bound) {
    int64_t low = 0, high = n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (tokens[middle] < bound) low = middle + 1; else high = middle;
    }
    return low;
}

/* target[i][d] += sum over t below `count` of a[i * a_row + t * a_next] b[t][d], for `rows` rows i (at most GROUP) and D
 * numbers d: in registers GROUP rows and up to DEEP vectors. */
INLINE void accumulate_part(
    const float *a, int64_t a_row, int64_t a_next, const float *b, int64_t b_row, int64_t count, int vectors,
    float *target, int64_t target_row, int64_t rows
) {
    vf sum[GROUP][DEEP];
    UNROLL for (int i = 0; i < GROUP; i++) UNROLL for (int v = 0; v < vectors; v++) sum[i][v] = (vf){0};
    for (int64_t t = 0; t < count; t++) {
        vf x[DEEP];
        UNROLL for (int v = 0; v < vectors; v++) x[v] = load(b + t * b_row + v * LANES);
        UNROLL for (int i = 0; i < GROUP; i++)
            UNROLL for (int v = 0; v < vectors; v++) sum[i][v] += a[i * a_row + t * a_next] * x[v];
    }
    UNROLL for (int i = 0; i < GROUP; i++)
        if (i < rows)
            UNROLL for (int v = 0; v < vectors; v++) {
                float *to = target + i * target_row + v * LANES;
                store(to, load(to) + sum[i][v]);
            }
}

INLINE void accumulate(
    const float *a, int64_t a_row, int64_t a_next, const float *b, int64_t b_row, int64_t count, int64_t D,
    float *target, int64_t target_row, int64_t rows
) {
    int64_t d = 0;
    for (; d + DEEP * LANES <= D; d += DEEP * LANES)
        accumulate_part(a, a_row, a_next, b + d, b_row, count, DEEP, target + d, target_row, rows);
    for (; d < D; d += LANES) accumulate_part(a, a_row, a_next, b + d, b_row, count, 1, target + d, target_row, rows);
}
