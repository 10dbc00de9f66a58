/* Vectors of floats for AVX2 or AVX-512: load and store, exp and tanh, bfloat16, and a matrix product in registers. */
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
enum { LANES = 16, STRIP = 12, DEEP = 4 };
#else
enum { LANES = 8, STRIP = 6, DEEP = 2 };
#endif
/* What fits the registers: STRIP x 2 vectors of scores, or GROUP x DEEP vectors along the head dimension. */
enum { GROUP = 6, MAX_HEAD_DIM = 256 };

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef float vf_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#define UNROLL _Pragma("GCC unroll 24")
#define INLINE static inline __attribute__((always_inline))

INLINE vf load(const float *x) { return *(const vf_any *)x; }
INLINE void store(float *x, vf v) { *(vf_any *)x = v; }
#ifdef __AVX512F__
INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); } /* the second argument if either is NaN */
INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
#else
INLINE vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
INLINE vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
#endif
INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf clamp(vf x, float a, float b) { return vf_max(splat(a), vf_min(splat(b), x)); } /* keeps NaN */
INLINE int64_t int_min(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t int_max(int64_t a, int64_t b) { return a > b ? a : b; }

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

/* Rounds to nearest, ties to even. Keeps NaN. */
INLINE uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}

/* Copy one row of D float32 or bfloat16 numbers to float32. */
INLINE void read_row(const void *x, int64_t offset, int64_t is_bf16, int64_t D, float *row) {
    if (is_bf16)
        for (int64_t d = 0; d < D; d++) row[d] = from_bf16(((const uint16_t *)x)[offset + d]);
    else
        memcpy(row, (const float *)x + offset, D * sizeof(float));
}

/* exp(x) = (1 + rest) * power for x in [-80, 80]. Range reduction by ln 2 in one fused multiply-add (error 2e-9 per
 * factor of 2), then the polynomial of Cephes' expf. */
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
    return (rest + 1.0f) * power; /* a product keeps NaN */
}

/* tanh(x) = m / (m + 2) with m = exp(2 x) - 1: accurate to a few units in the last place, also near 0. */
INLINE vf hyperbolic_tangent(vf x) {
    vf power, rest = exponential_parts(clamp(2.0f * x, -80.0f, 80.0f), &power);
    const vf m = rest * power + (power - 1.0f);
    return m / (m + 2.0f);
}

/* target[i][d] += sum over t < count of a[i * a_row + t * a_next] * b[t][d], for rows i < `rows` (at most GROUP) and d
 * < D. GROUP rows and up to DEEP vectors are summed in registers. */
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
