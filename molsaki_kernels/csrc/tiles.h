/* Products of bfloat16 tiles with float32 sums, by AMX or by AVX-512 BF16, and the packing of rows into such tiles.
 *
 * A tile has 16 rows of 64 bytes, what a register of AMX holds. A product needs three kinds:
 *   left   16 rows x 32 inner numbers, as in memory;
 *   right  32 inner numbers x 16 columns: row i has the inner numbers 2 i and 2 i + 1 of each column, side by side;
 *   sums   16 rows x 16 columns of float32.
 * A square of 32 x 32 sums is four tiles: rows 0 to 15 with both halves of the columns, then rows 16 to 31.
 */
#pragma once
#include "simd.h"

#ifdef __AVX512BF16__

enum {
    SIDE = 32,  /* of a square */
    TILE = 512, /* bfloat16 numbers of a left or right tile */
    SUMS = 256, /* float32 numbers of a tile of sums */
    SQUARE = 4 * SUMS
};

/* Where the tiles of one side of a product are. The square's two halves are `half` numbers apart, consecutive inner
 * tiles `inner`. */
typedef struct { const uint16_t *first; int64_t half, inner; } Operand;

/* sums (+)= left x right over `count` tiles of inner numbers, by vdpbf16ps: 8 rows of sums in registers at a time. */
static void product_by_vectors(Operand left, Operand right, int64_t count, float *sums, int add) {
    for (int rows = 0; rows < SIDE; rows += 8) {
        const int tile = rows / 16 * 2;
        float *to = sums + tile * SUMS + rows % 16 * 16;
        __m512 sum[8][2];
        UNROLL for (int i = 0; i < 8; i++) UNROLL for (int x = 0; x < 2; x++)
            sum[i][x] = add ? _mm512_loadu_ps(to + x * SUMS + i * 16) : _mm512_setzero_ps();
        for (int64_t t = 0; t < count; t++) {
            const uint16_t *a = left.first + rows / 16 * left.half + t * left.inner + rows % 16 * 32;
            const uint16_t *b = right.first + t * right.inner;
            for (int pair = 0; pair < 16; pair++) {
                const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b + pair * 32);
                const __m512bh b1 = (__m512bh)_mm512_loadu_si512(b + right.half + pair * 32);
                UNROLL for (int i = 0; i < 8; i++) {
                    int32_t both;
                    memcpy(&both, a + i * 32 + pair * 2, 4);
                    const __m512bh x = (__m512bh)_mm512_set1_epi32(both);
                    sum[i][0] = _mm512_dpbf16_ps(sum[i][0], x, b0);
                    sum[i][1] = _mm512_dpbf16_ps(sum[i][1], x, b1);
                }
            }
        }
        UNROLL for (int i = 0; i < 8; i++) UNROLL for (int x = 0; x < 2; x++)
            _mm512_storeu_ps(to + x * SUMS + i * 16, sum[i][x]);
    }
}

#ifdef __AMX_BF16__
/* The compiler does not see what the instructions read and write. */
#define MEMORY_BARRIER __asm__ volatile("" ::: "memory")

/* Shape the eight tile registers of this thread: 16 rows of 64 bytes. */
static inline void begin_tiles(void) {
    struct { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shapes = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        shapes.bytes[i] = 64;
        shapes.rows[i] = 16;
    }
    MEMORY_BARRIER;
    _tile_loadconfig(&shapes);
}

static inline void end_tiles(void) { _tile_release(); }

INLINE void product_by_tiles(Operand left, Operand right, int64_t count, float *sums, int add) {
    MEMORY_BARRIER;
    if (add) {
        _tile_loadd(0, sums, 64);
        _tile_loadd(1, sums + SUMS, 64);
        _tile_loadd(2, sums + 2 * SUMS, 64);
        _tile_loadd(3, sums + 3 * SUMS, 64);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int64_t t = 0; t < count; t++) {
        const uint16_t *a = left.first + t * left.inner, *b = right.first + t * right.inner;
        _tile_loadd(4, a, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + right.half, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + left.half, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 64);
    _tile_stored(1, sums + SUMS, 64);
    _tile_stored(2, sums + 2 * SUMS, 64);
    _tile_stored(3, sums + 3 * SUMS, 64);
    MEMORY_BARRIER;
}
#else
static inline void begin_tiles(void) {}
static inline void end_tiles(void) {}
#define product_by_tiles product_by_vectors
#endif

/* Up to 32 rows of `columns` numbers each; missing rows and columns are packed as zeros. */
typedef struct { const uint16_t *first; int64_t stride, rows, columns; } Rows;

/* Read 32 rows and the columns [d, d + 32). */
INLINE void read_square(Rows from, int64_t d, __m512i x[SIDE]) {
    const int64_t exist = from.columns - d;
    const __mmask32 columns = exist >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << exist) - 1;
    for (int r = 0; r < SIDE; r++) {
        const uint16_t *row = from.first + r * from.stride + d;
        x[r] = r < from.rows ? _mm512_maskz_loadu_epi16(columns, row) : _mm512_setzero_si512();
    }
}

/* Transpose 16 x 16 numbers of 32 bits. */
INLINE void transpose16(__m512i x[16]) {
    __m512i y[16];
    UNROLL for (int i = 0; i < 16; i += 2) {
        y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
    UNROLL for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
    }
    UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; j++) {
        y[i + j] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0x88);
        y[i + j + 4] = _mm512_shuffle_i32x4(x[i + j], x[i + j + 4], 0xdd);
    }
    UNROLL for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0x88);
        x[j + 8] = _mm512_shuffle_i32x4(y[j], y[j + 8], 0xdd);
    }
}

/* The numbers of two rows side by side: columns 0 to 15 in `low`, 16 to 31 in `high`. */
INLINE void side_by_side(__m512i a, __m512i b, __m512i *low, __m512i *high) {
    const __m512i from = _mm512_set_epi16(
        47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1,
        32, 0
    );
    *low = _mm512_permutex2var_epi16(a, from, b);
    *high = _mm512_permutex2var_epi16(a, _mm512_or_si512(from, _mm512_set1_epi16(16)), b);
}

/* Two rows of float32 as one row of a right tile: the numbers of `even` and `odd` side by side. */
INLINE __m512i right_row(__m512 even, __m512 odd) {
    const __m512i from = _mm512_set_epi16(
        31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1,
        16, 0
    );
    return _mm512_permutexvar_epi16(from, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
}

/* Store 16 vectors as a tile. */
INLINE void store_tile(uint16_t *tile, const __m512i x[16]) {
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(tile + i * 32, x[i]);
}

/* The four packings of 32 rows. The tiles of a packing cover the columns [0, 32 * width), `width` times two tiles.
 *
 * For products whose inner numbers are the columns: left tiles, (2 halves of the rows, width), and right tiles of the
 * same order, whose columns are the rows. */
INLINE void pack_left(Rows from, int64_t width, uint16_t *to) {
    for (int64_t t = 0; t < width; t++) {
        __m512i x[SIDE];
        read_square(from, 32 * t, x);
        store_tile(to + t * TILE, x);
        store_tile(to + (width + t) * TILE, x + 16);
    }
}

INLINE void pack_right(Rows from, int64_t width, uint16_t *to) {
    for (int64_t t = 0; t < width; t++) {
        __m512i x[SIDE];
        read_square(from, 32 * t, x);
        transpose16(x);
        transpose16(x + 16);
        store_tile(to + t * TILE, x);
        store_tile(to + (width + t) * TILE, x + 16);
    }
}

/* For products whose inner numbers are the rows: right tiles, (2 width), each for 16 columns; and left tiles of the
 * same order, whose rows are the columns. */
INLINE void pack_right_by_row(Rows from, int64_t width, uint16_t *to) {
    for (int64_t t = 0; t < width; t++) {
        __m512i x[SIDE], y[SIDE];
        read_square(from, 32 * t, x);
        for (int i = 0; i < 16; i++) side_by_side(x[2 * i], x[2 * i + 1], &y[i], &y[i + 16]);
        store_tile(to + 2 * t * TILE, y);
        store_tile(to + (2 * t + 1) * TILE, y + 16);
    }
}

INLINE void pack_left_by_row(Rows from, int64_t width, uint16_t *to) {
    for (int64_t t = 0; t < width; t++) {
        __m512i x[SIDE], y[SIDE];
        read_square(from, 32 * t, x);
        for (int i = 0; i < 16; i++) side_by_side(x[2 * i], x[2 * i + 1], &y[i], &y[i + 16]);
        transpose16(y);
        transpose16(y + 16);
        store_tile(to + 2 * t * TILE, y);
        store_tile(to + (2 * t + 1) * TILE, y + 16);
    }
}

/* Write the transpose of `width` squares of sums, (32 columns of the result each) x (32 rows), as rows of bfloat16.
 * `from` has the sums of rows 32 t to 32 t + 31 in square t; column r is multiplied by `by[r]`. */
INLINE void write_transposed(
    const float *from, int64_t width, const float by[SIDE], uint16_t *to, int64_t stride, int64_t rows, int64_t columns
) {
    for (int64_t t = 0; t < width; t++) {
        const int64_t exist = columns - 32 * t;
        const __mmask32 mask = exist >= 32 ? ~(__mmask32)0 : ((__mmask32)1 << exist) - 1;
        for (int half = 0; half < 2; half++) {
            const __m512 factor = _mm512_loadu_ps(by + 16 * half);
            const float *x = from + t * SQUARE + half * SUMS;
            __m512i y[16];
            for (int i = 0; i < 16; i++) {
                const float *row = x + (i < 8 ? 2 * i * 16 : 2 * SUMS + (2 * i - 16) * 16);
                y[i] = right_row(_mm512_loadu_ps(row) * factor, _mm512_loadu_ps(row + 16) * factor);
            }
            transpose16(y);
            for (int r = 0; r < 16 && 16 * half + r < rows; r++)
                _mm512_mask_storeu_epi16(to + (16 * half + r) * stride + 32 * t, mask, y[r]);
        }
    }
}

#endif
