/* Attention and its map for bfloat16 on processors with a matrix unit (AMX), or with AVX-512 BF16 (tiles.h).
 *
 * As in attention.c the lanes of a vector are query positions (rows), and scores are computed transposed. The products
 * take bfloat16 and sum in float32:
 *   forward   S^T = K Q^T,  O^T += V^T P^T
 *   backward  S^T = K Q^T,  dP^T = V dO^T,  dV += P^T dO,  dK += dS^T Q,  dQ^T += K^T dS^T
 * Scores, softmax, the weights of key tokens and their sums per step are float32. P and dS are rounded to bfloat16 for
 * the products only, as in flash attention. Queries are not scaled, because that would round them: scores are.
 *
 * Everything is divided into squares of 32 keys x 32 rows (a panel). K and V are packed once per call: forward all of
 * them, because threads share them; backward those of a key head by the thread that computes it. Its queries and dO are
 * packed for each block.
 *
 * Forward: a panel's maximum is raised only when a score exceeds it by a factor of 2^8, since raising it scales all
 * earlier results. Weights of key tokens relative to that maximum are kept, and scaled in the same way.
 */
#include "attention.h"
#include "tiles.h"

#ifdef __AVX512BF16__

#ifdef __AMX_BF16__
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

int bf16_has_tiles(void) {
    enum { REQUEST_PERMISSION = 0x1023, TILE_DATA = 18, TILE_STATE = 3 << 17 }; /* of arch_prctl; bits of XCR0 */
    uint32_t a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & 1u << 22) || !(d & 1u << 24)) return 0;
    __get_cpuid(1, &a, &b, &c, &d);
    if (!(c & 1u << 27)) return 0; /* the operating system saves no extended registers */
    __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
}
#else
int bf16_has_tiles(void) { return 0; }
#endif

enum {
    PANELS = ROWS / SIDE, /* of a block, and squares of keys of a task */
    KEY_SQUARES = 3,      /* squares of keys whose scores are in the cache together */
    WIDTH = MAX_HEAD_DIM / 32,
    HALF = 16 /* rows of a vector */
};

/* Working memory of one thread. The arrays of tiles are filled from the start, as far as the head dimension needs. */
typedef struct {
    uint16_t q[PANELS * 2 * WIDTH * TILE], dout[PANELS * 2 * WIDTH * TILE];             /* right tiles, of each panel */
    uint16_t q_by_row[PANELS * 2 * WIDTH * TILE], dout_by_row[PANELS * 2 * WIDTH * TILE]; /* right tiles */
    float result[PANELS * WIDTH * SQUARE]; /* O^T of one panel, or dQ^T of all */
    float scores[KEY_SQUARES * SQUARE], dweights[SQUARE]; /* S^T, then P^T in the forward; dP^T */
    uint16_t weights[KEY_SQUARES * 2 * TILE];             /* forward: P^T as right tiles */
    uint16_t weights_left[PANELS * 2 * TILE], dscores_left[PANELS * 2 * TILE]; /* P^T and dS^T of 32 keys */
    uint16_t dscores[PANELS * KEY_SQUARES * 2 * TILE];                         /* dS^T as right tiles */
    float aside[][SIDE]; /* forward: the weights of key tokens and a panel */
} Work;

INLINE int64_t width_of(int64_t D) { return (D + 31) / 32; }

int64_t bf16_work(const AttentionCall *c) { return sizeof(Work) + c->plan.columns * SIDE * sizeof(float); }

/* The packed tiles of a square of keys. Forward: K as left tiles, V as left tiles by row. Backward: K and V as left
 * tiles, K as left tiles by row. */
INLINE int64_t square_size(const AttentionCall *c, int64_t backward) {
    return (backward ? 4 * width_of(c->head_dim) + 2 * width_of(c->value_dim)
                     : 2 * width_of(c->head_dim) + 2 * width_of(c->value_dim)) * TILE;
}

INLINE int64_t token_squares(const AttentionCall *c) { return (c->plan.columns + SIDE - 1) / SIDE; }

/* Tasks of the longest sequence. */
INLINE int64_t longest_tasks(const AttentionCall *c) { return (c->plan.longest + ROWS - 1) / ROWS; }

/* The packed keys and values of a key head: in the backward of one sequence, followed by its key tokens. */
INLINE int64_t packed_head(const AttentionCall *c, int64_t backward) {
    if (!backward) return c->plan.tasks * PANELS * square_size(c, 0);
    return longest_tasks(c) * PANELS * square_size(c, 1) + token_squares(c) * 2 * width_of(c->head_dim) * TILE;
}

/* Forward: of all key heads. Backward: of a key head for each thread. */
int64_t bf16_packed(const AttentionCall *c, int64_t backward) {
    return (backward ? c->threads : c->kv_heads) * packed_head(c, backward) * sizeof(uint16_t);
}

/* A square of sums of dV and dK: dV (width of v), then dK. */
INLINE int64_t sums_size(const AttentionCall *c) {
    return (width_of(c->head_dim) + width_of(c->value_dim)) * SQUARE;
}

int64_t bf16_key_sums(const AttentionCall *c, int64_t tasks) { return tasks * PANELS * sums_size(c); }

void bf16_begin(const AttentionCall *c) {
    if (c->unit == TILES_BF16) begin_tiles();
}

void bf16_end(const AttentionCall *c) {
    if (c->unit == TILES_BF16) end_tiles();
}

INLINE void product(const AttentionCall *c, Operand left, Operand right, int64_t count, float *sums, int add) {
    if (c->unit == TILES_BF16) product_by_tiles(left, right, count, sums, add);
    else product_by_vectors(left, right, count, sums, add);
}

/* Up to 32 rows of a tensor, from a row of a sequence on; none beyond the sequence. */
INLINE Rows rows_of(
    const AttentionCall *c, const void *x, const int64_t *strides, int64_t n, int64_t h, int64_t row, int64_t columns
) {
    const int64_t rows = int_max(int_min(c->plan.length[n] - row, SIDE), 0);
    const int64_t offset = at(strides, c->plan.batch[n], h, c->plan.begin[n] + row);
    return (Rows){(const uint16_t *)x + offset, strides[2], rows, columns};
}

/* Pack the keys and values of a task. */
INLINE void pack_task(const AttentionCall *c, int64_t g, int64_t task, int64_t backward, uint16_t *to) {
    const int64_t n = c->plan.task_sequence[task], k_width = width_of(c->head_dim), v_width = width_of(c->value_dim);
    for (int64_t s = 0; s < PANELS; s++) {
        const int64_t key = c->plan.task_row[task] + s * SIDE;
        const Rows k = rows_of(c, c->k, c->k_strides, n, g, key, c->head_dim);
        const Rows v = rows_of(c, c->v, c->v_strides, n, g, key, c->value_dim);
        if (k.rows == 0) break;
        pack_left(k, k_width, to);
        to += 2 * k_width * TILE;
        if (backward) {
            pack_left(v, v_width, to);
            pack_left_by_row(k, k_width, to + 2 * v_width * TILE);
            to += 2 * k_width * TILE;
        } else {
            pack_left_by_row(v, v_width, to);
        }
        to += 2 * v_width * TILE;
    }
}

/* The packed keys and values of a task in the forward. */
INLINE uint16_t *packed_keys(const AttentionCall *c, int64_t g, int64_t task) {
    return (uint16_t *)c->packed + g * packed_head(c, 0) + task * PANELS * square_size(c, 0);
}

void bf16_pack(const AttentionCall *c, int64_t g, int64_t task) { pack_task(c, g, task, 0, packed_keys(c, g, task)); }

/* The packed key tokens of a head in the backward: left tiles of each square. */
INLINE uint16_t *packed_tokens(const AttentionCall *c, const uint16_t *packed) {
    return (uint16_t *)packed + longest_tasks(c) * PANELS * square_size(c, 1);
}

const uint16_t *bf16_pack_head(const AttentionCall *c, int64_t n, int64_t g, int64_t first_task, int64_t thread) {
    const Plan *p = &c->plan;
    const int64_t width = width_of(c->head_dim), used = p->tokens_used[n];
    const int32_t *tokens = p->tokens + n * p->columns;
    uint16_t *packed = (uint16_t *)c->packed + thread * packed_head(c, 1), *to = packed_tokens(c, packed);
    for (int64_t row = 0; row < p->length[n]; row += ROWS)
        pack_task(c, g, first_task + row / ROWS, 1, packed + row / SIDE * square_size(c, 1));
    for (int64_t j = 0; j < used && c->dmaps; j += SIDE, to += 2 * width * TILE) {
        uint16_t rows[SIDE * MAX_HEAD_DIM];
        const int64_t count = int_min(SIDE, used - j);
        for (int64_t i = 0; i < count; i++)
            memcpy(rows + i * MAX_HEAD_DIM, rows_of(c, c->k, c->k_strides, n, g, tokens[j + i], c->head_dim).first,
                   c->head_dim * sizeof(uint16_t));
        pack_left((Rows){rows, MAX_HEAD_DIM, count, c->head_dim}, width, to);
    }
    return packed;
}

/* 2^(x * factor), or 0 where that is below 2^-115. Keeps NaN. The polynomial is 2^f for f in [-0.5, 0.5] (relative
 * error 1.1e-7). */
INLINE __m512 power_of_two(__m512 x, __m512 factor) {
    const __m512 shift = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    const __m512 shifted = _mm512_fmadd_ps(x, factor, shift), n = shifted - shift;
    const __mmask16 lives = _mm512_cmp_ps_mask(n, splat(-115.0f), _CMP_NLE_UQ);
    const __m512 f = _mm512_fmsub_ps(x, factor, n);
    __m512 y = splat(1.3264726e-3f);
    y = _mm512_fmadd_ps(y, f, splat(9.671513e-3f));
    y = _mm512_fmadd_ps(y, f, splat(5.5507336e-2f));
    y = _mm512_fmadd_ps(y, f, splat(2.4022242e-1f));
    y = _mm512_fmadd_ps(y, f, splat(6.93147e-1f));
    y = _mm512_fmadd_ps(y, f, splat(1.0f));
    const __m512i power = _mm512_slli_epi32((__m512i)shifted, 23);
    return (__m512)_mm512_maskz_add_epi32(lives, (__m512i)y, power);
}

/* The weight of a score, from lse. The product is rounded before lse is subtracted, because it was rounded in the same
 * way before lse was computed; otherwise the two would differ by up to half a unit in the last place of lse. No weight
 * is above 1. Keeps NaN. */
INLINE __m512 weight(__m512 score, __m512 scale, __m512 lse) {
    const __m512 scaled = _mm512_mul_round_ps(score, scale, _MM_FROUND_CUR_DIRECTION); /* never contracted */
    const __m512 x = _mm512_sub_round_ps(scaled, lse, _MM_FROUND_CUR_DIRECTION);
    return power_of_two(_mm512_min_ps(_mm512_setzero_ps(), x), splat(1.44269504088896341f));
}

/* The lanes, rows from `row` on, that exist and see the key. */
INLINE __mmask16 visible(const AttentionCall *c, int64_t row, int64_t key, int64_t length) {
    if (key >= length) return 0;
    const int64_t from = c->causal ? int_max(key - row, 0) : 0, rows = int_min(length - row, HALF);
    const int64_t to = c->window > 0 ? int_min(key + c->window - row, rows) : rows;
    return from < to ? (__mmask16)((1u << to) - (1u << from)) : 0;
}

/* The squares of keys [from, to) with a key that one of the rows sees. */
typedef struct { int64_t from, to; } Range;
INLINE Range squares_of(const AttentionCall *c, const Block *b, int64_t panel) {
    const int64_t row = b->first + panel * SIDE, last = int_min(row + SIDE, b->first + b->count) - 1;
    const int64_t low = c->window > 0 ? int_max(row - c->window + 1, 0) / SIDE : 0;
    return (Range){low, (c->causal ? last : b->length - 1) / SIDE + 1};
}

/* Whether all 32 rows of a panel, from `row` on, exist and see every key of the square. */
INLINE int all_visible(const AttentionCall *c, int64_t row, int64_t square, int64_t length) {
    const int64_t key = square * SIDE, last = key + SIDE - 1;
    return last < length && row + SIDE <= length && (!c->causal || last <= row) &&
        (c->window <= 0 || key > row + SIDE - 1 - c->window);
}

/* Where a square has row i of its sums, columns 16 x to 16 x + 15: of scores, those of a key and 16 rows of q. */
INLINE int64_t in_square(int64_t i, int64_t x) { return (i / 16 * 2 + x) * SUMS + i % 16 * 16; }

/* The rows of a panel by step: each step is a run of rows. */
typedef struct { int64_t count; struct { int64_t step; __mmask16 rows[2]; } run[SIDE]; } Steps;
INLINE void find_steps(const Block *b, int64_t panel, Steps *steps) {
    const int32_t *step = b->step + panel * SIDE;
    steps->count = 0;
    for (int i = 0; i < SIDE; i++) {
        if (step[i] < 0) continue;
        if (steps->count == 0 || steps->run[steps->count - 1].step != step[i]) {
            steps->run[steps->count].step = step[i];
            steps->run[steps->count].rows[0] = steps->run[steps->count].rows[1] = 0;
            steps->count++;
        }
        steps->run[steps->count - 1].rows[i / 16] |= (__mmask16)(1u << i % 16);
    }
}

/* Replace the scores of a square by softcap * tanh(score * scale / softcap). */
static void cap_scores(const AttentionCall *c, float *square) {
    const float by = (float)(c->scale / c->softcap), cap = (float)c->softcap;
    for (int i = 0; i < SQUARE; i += 16) store(square + i, hyperbolic_tangent(load(square + i) * by) * cap);
}

INLINE void hide(const AttentionCall *c, int64_t row, int64_t square, int64_t length, float *scores) {
    for (int i = 0; i < SIDE; i++)
        for (int x = 0; x < 2; x++) {
            float *s = scores + in_square(i, x);
            const __mmask16 rows = visible(c, row + x * HALF, square * SIDE + i, length);
            _mm512_storeu_ps(s, _mm512_mask_mov_ps(splat(HIDDEN), rows, _mm512_loadu_ps(s)));
        }
}

static int64_t pack_queries(const AttentionCall *c, const Block *b, Work *work, int by_row) {
    const int64_t panels = (b->count + SIDE - 1) / SIDE, width = width_of(c->head_dim);
    for (int64_t p = 0; p < panels; p++) {
        const Rows rows = rows_of(c, c->q, c->q_strides, b->n, b->h, b->first + p * SIDE, c->head_dim);
        pack_right(rows, width, work->q + p * 2 * width * TILE);
        if (by_row) pack_right_by_row(rows, width, work->q_by_row + p * 2 * width * TILE);
    }
    return panels;
}

/* Softmax of `count` squares of scores: replace them by weights relative to `max`, pack those as right tiles, and add
 * them to `sum`. `factor` scales scores to powers of two. Returns whether the maximum was raised; then `shrink` is the
 * factor for earlier results. */
INLINE int softmax(
    float *scores, int64_t count, __m512 factor, uint16_t *weights, __m512 *max, __m512 *sum, __m512 *shrink
) {
    __m512 highest[2] = {max[0], max[1]}, total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    for (int64_t s = 0; s < count; s++)
        for (int tile = 0; tile < 2; tile++) UNROLL for (int x = 0; x < 2; x++) {
            const float *row = scores + s * SQUARE + in_square(16 * tile, x);
            __m512 other = highest[x];
            UNROLL for (int i = 0; i < 16; i += 2) {
                highest[x] = _mm512_max_ps(_mm512_loadu_ps(row + i * 16), highest[x]); /* ignores NaN */
                other = _mm512_max_ps(_mm512_loadu_ps(row + i * 16 + 16), other);
            }
            highest[x] = _mm512_max_ps(highest[x], other);
        }
    int raised = 0;
    for (int x = 0; x < 2; x++)
        raised |= _mm512_cmp_ps_mask((highest[x] - max[x]) * factor, splat(8.0f), _CMP_GT_OQ);
    if (raised)
        for (int x = 0; x < 2; x++) {
            const __mmask16 same = _mm512_cmp_ps_mask(highest[x], max[x], _CMP_EQ_OQ); /* also infinities */
            shrink[x] = _mm512_mask_mov_ps(power_of_two(max[x] - highest[x], factor), same, splat(1.0f));
            max[x] = highest[x];
            sum[x] *= shrink[x];
        }
    for (int64_t s = 0; s < count; s++)
        for (int i = 0; i < SIDE; i += 2) UNROLL for (int x = 0; x < 2; x++) {
            float *row = scores + s * SQUARE + in_square(i, x);
            const __m512 even = power_of_two(_mm512_loadu_ps(row) - max[x], factor);
            const __m512 odd = power_of_two(_mm512_loadu_ps(row + 16) - max[x], factor);
            _mm512_storeu_ps(row, even);
            _mm512_storeu_ps(row + 16, odd);
            total[x] += even + odd;
            _mm512_storeu_si512(weights + (2 * s + x) * TILE + i / 2 * 32, right_row(even, odd));
        }
    for (int x = 0; x < 2; x++) sum[x] += total[x];
    return raised;
}

/* Add the weights of key tokens, relative to the maximum, to the sums of their steps. */
INLINE void add_map(
    const AttentionCall *c, const Block *b, const Steps *steps, float (*aside)[SIDE], int64_t from, int64_t to,
    const float *share, double *sums
) {
    const int64_t first = c->plan.task_first[b->task], C = c->plan.columns;
    for (int64_t j = from; j < to; j++) {
        const __m512 w0 = _mm512_loadu_ps(aside[j]) * _mm512_loadu_ps(share);
        const __m512 w1 = _mm512_loadu_ps(aside[j] + 16) * _mm512_loadu_ps(share + 16);
        for (int64_t i = 0; i < steps->count; i++) {
            const __mmask16 *rows = steps->run[i].rows;
            const __m512 w = _mm512_maskz_mov_ps(rows[0], w0) + _mm512_maskz_mov_ps(rows[1], w1);
            sums[(steps->run[i].step - first) * C + b->first_column + j] += _mm512_reduce_add_ps(w);
        }
    }
}

static void forward_panel(const AttentionCall *c, const Block *b, int64_t panel, Work *work, double *sums) {
    const int64_t width = width_of(c->head_dim), v_width = width_of(c->value_dim), size = square_size(c, 0);
    const int64_t row = b->first + panel * SIDE;
    const uint16_t *keys = packed_keys(c, b->g, b->task - b->first / ROWS), *values = keys + 2 * width * TILE;
    const Range range = squares_of(c, b, panel);
    const double unit = c->softcap > 0 ? 1 : (float)c->scale; /* of the scores that are in memory */
    const __m512 factor = splat((float)(unit * 1.4426950408889634));
    const Operand q = {work->q + panel * 2 * width * TILE, width * TILE, TILE};
    const Operand weights = {work->weights, TILE, 2 * TILE};
    const int32_t *tokens = c->plan.tokens + b->n * c->plan.columns + b->first_column;
    const int64_t first_token = below(tokens, b->columns, range.from * SIDE);
    int64_t token = first_token;

    __m512 max[2], sum[2], shrink[2];
    float start = FIRST_MAX, start_sum = 0;
    if (c->sinks && !(c->sinks[b->h] < FIRST_MAX)) { /* keeps NaN */
        start = (float)(c->sinks[b->h] / unit);
        start_sum = isinf(start) ? 1 : (float)exp(c->sinks[b->h] - unit * start);
    }
    for (int x = 0; x < 2; x++) {
        max[x] = splat(start);
        sum[x] = splat(start_sum);
    }
    for (int64_t s = range.from; s < range.to; s += KEY_SQUARES) {
        const int64_t count = int_min(KEY_SQUARES, range.to - s);
        for (int64_t i = 0; i < count; i++) {
            float *scores = work->scores + i * SQUARE;
            product(c, (Operand){keys + (s + i) * size, width * TILE, TILE}, q, width, scores, 0);
            if (c->softcap > 0) cap_scores(c, scores);
            if (!all_visible(c, row, s + i, b->length)) hide(c, row, s + i, b->length, scores);
        }
        if (softmax(work->scores, count, factor, work->weights, max, sum, shrink) && s > range.from) {
            for (int64_t i = 0; i < v_width * SQUARE; i += 2 * SUMS)
                UNROLL for (int x = 0; x < 2; x++)
                    for (int64_t j = i + x * SUMS; j < i + (x + 1) * SUMS; j += 16)
                        store(work->result + j, load(work->result + j) * shrink[x]);
            for (int64_t j = first_token; j < token; j++)
                UNROLL for (int x = 0; x < 2; x++)
                    store(work->aside[j] + 16 * x, load(work->aside[j] + 16 * x) * shrink[x]);
        }
        for (; token < b->columns && tokens[token] < (s + count) * SIDE; token++) {
            const int64_t i = tokens[token] - s * SIDE;
            UNROLL for (int x = 0; x < 2; x++)
                store(work->aside[token] + 16 * x, load(work->scores + i / SIDE * SQUARE + in_square(i % SIDE, x)));
        }
        for (int64_t d = 0; d < v_width; d++) {
            const Operand v = {values + s * size + 2 * d * TILE, TILE, size};
            product(c, v, weights, count, work->result + d * SQUARE, s > range.from);
        }
    }
    float share[SIDE], top[SIDE], total[SIDE];
    for (int x = 0; x < 2; x++) {
        store(top + 16 * x, max[x]);
        store(total + 16 * x, sum[x]);
        store(share + 16 * x, 1.0f / sum[x]);
    }
    const int64_t count = int_min(b->count - panel * SIDE, SIDE), batch = c->plan.batch[b->n];
    const int64_t first = c->plan.begin[b->n] + row;
    float *lse = c->lse + (batch * c->q_heads + b->h) * c->rows + first;
    for (int64_t r = 0; r < count; r++) lse[r] = (float)(unit * top[r] + log(total[r])); /* one rounding */
    write_transposed(work->result, v_width, share, (uint16_t *)c->out + at(c->out_strides, batch, b->h, first),
                     c->out_strides[2], count, c->value_dim);
    if (token == first_token) return;
    Steps steps;
    find_steps(b, panel, &steps);
    add_map(c, b, &steps, work->aside, first_token, token, share, sums);
}

void bf16_forward_block(const AttentionCall *c, int64_t h, int64_t task, void *memory, double *sums) {
    Work *work = memory;
    Block b;
    find_block(c, h, task, &b);
    const int64_t panels = pack_queries(c, &b, work, 0);
    for (int64_t p = 0; p < panels; p++) forward_panel(c, &b, p, work, sums);
}

/* dA of a key token for the 16 x-th rows of a panel. */
INLINE __m512 upstream(const AttentionCall *c, const float *dmaps, const Steps *steps, int x) {
    __m512 da = _mm512_setzero_ps();
    for (int64_t i = 0; i < steps->count; i++) {
        const float gradient = dmaps[steps->run[i].step * c->words] * (float)c->word_weight;
        da = _mm512_mask_mov_ps(da, steps->run[i].rows[x], splat(gradient));
    }
    return da;
}

/* The gradient of the map with respect to a word, for the block's head: a column of (steps, words). */
INLINE const float *dmaps_of(const AttentionCall *c, const Block *b, int64_t column) {
    const int64_t map = c->per_head ? b->n * c->q_heads + b->h : b->n;
    return c->dmaps + map * c->steps * c->words + c->plan.word_of_token[b->n * c->plan.columns + column];
}

/* Add the map's part of delta: each row's sum of weight * dA. */
static void add_delta_of_map(
    const AttentionCall *c, Block *b, int64_t panel, const Steps *steps, const uint16_t *packed, Work *work
) {
    const int64_t width = width_of(c->head_dim), row = b->first + panel * SIDE;
    const int32_t *tokens = c->plan.tokens + b->n * c->plan.columns;
    const Range range = squares_of(c, b, panel);
    const int64_t from = int_max(below(tokens, c->plan.tokens_used[b->n], range.from * SIDE), b->first_column);
    const int64_t to = int_min(below(tokens, c->plan.tokens_used[b->n], range.to * SIDE), b->first_column + b->columns);
    const Operand q = {work->q + panel * 2 * width * TILE, width * TILE, TILE};
    const __m512 scale = splat(c->softcap > 0 ? 1.0f : (float)c->scale);
    __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const __m512 lse[2] = {load(b->lse + panel * SIDE), load(b->lse + panel * SIDE + 16)};
    for (int64_t s = from / SIDE; s * SIDE < to; s++) {
        const uint16_t *keys = packed_tokens(c, packed) + s * 2 * width * TILE;
        product(c, (Operand){keys, width * TILE, TILE}, q, width, work->scores, 0);
        if (c->softcap > 0) cap_scores(c, work->scores);
        const int64_t first = int_max(from, s * SIDE), end = int_min(to, (s + 1) * SIDE);
        const int all = row + SIDE <= b->length && (!c->causal || tokens[end - 1] <= row) &&
            (c->window <= 0 || tokens[first] > row + SIDE - 1 - c->window);
        for (int64_t j = first; j < end; j++) {
            const float *dmaps = dmaps_of(c, b, j);
            UNROLL for (int x = 0; x < 2; x++) {
                const __m512 score = _mm512_loadu_ps(work->scores + in_square(j - s * SIDE, x));
                const __m512 w = weight(score, scale, lse[x]), da = upstream(c, dmaps, steps, x);
                const __mmask16 rows = all ? 0xffff : visible(c, row + 16 * x, tokens[j], b->length);
                sums[x] = _mm512_mask3_fmadd_ps(w, da, sums[x], rows);
            }
        }
    }
    float *delta = b->delta + panel * SIDE;
    for (int x = 0; x < 2; x++) store(delta + 16 * x, load(delta + 16 * x) + sums[x]);
}

INLINE __m512 read16(const uint16_t *x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16);
}

/* lse and delta = rowsum(dO * O) - dlse of a block's rows. `exact`, which is 0 at first, gets
 * delta in float64 for the gradient of sinks. */
static void read_delta(const AttentionCall *c, Block *b, double exact[ROWS]) {
    const int64_t batch = c->plan.batch[b->n], row = c->plan.begin[b->n] + b->first;
    const int64_t at_row = (batch * c->q_heads + b->h) * c->rows + row;
    memset(b->lse, 0, sizeof(b->lse));
    memset(b->delta, 0, sizeof(b->delta));
    for (int64_t r = 0; r < b->count; r++) {
        b->lse[r] = c->lse[at_row + r];
        if (c->dout) {
            const uint16_t *out = (const uint16_t *)c->out + at(c->out_strides, batch, b->h, row + r);
            const uint16_t *dout = (const uint16_t *)c->dout + at(c->dout_strides, batch, b->h, row + r);
            __m512 sum = _mm512_setzero_ps();
            for (int64_t d = 0; d < c->value_dim; d += 16)
                sum = _mm512_fmadd_ps(read16(out + d), read16(dout + d), sum);
            b->delta[r] = _mm512_reduce_add_ps(sum);
            if (c->delta)
                for (int64_t d = 0; d < c->value_dim; d++) exact[r] += (double)from_bf16(out[d]) * from_bf16(dout[d]);
        }
        if (c->dlse) {
            b->delta[r] -= c->dlse[at_row + r];
            exact[r] -= c->dlse[at_row + r];
        }
    }
}

/* What a square of the backward needs besides its tiles. */
typedef struct {
    const AttentionCall *c;
    int64_t row, key, length;  /* the square's first row and key */
    __m512 lse[2], delta[2];
    uint16_t *weights_left, *dscores_left, *dscores;
} Backward;

/* P^T and dS^T of a square from its scores and dP^T, packed. */
INLINE void dscores_square(const Backward *s, const float *scores, const float *dweights, int masked, int capped) {
    const __m512 scale = splat(capped ? (float)s->c->softcap : (float)s->c->scale);
    const __m512 by = splat(capped ? (float)(s->c->scale / s->c->softcap) : 1.0f);
    for (int i = 0; i < SIDE; i += 2) {
        __m512 w[2][2], ds[2][2];
        UNROLL for (int odd = 0; odd < 2; odd++) UNROLL for (int x = 0; x < 2; x++) {
            const int64_t offset = in_square(i + odd, x);
            __m512 score = _mm512_loadu_ps(scores + offset);
            if (capped) score = hyperbolic_tangent(score * by);
            w[odd][x] = weight(score, scale, s->lse[x]);
            ds[odd][x] = w[odd][x] * (_mm512_loadu_ps(dweights + offset) - s->delta[x]);
            if (capped) ds[odd][x] *= (1.0f - score) * (1.0f + score);
            if (masked) { /* both: a product of 0 and NaN is NaN */
                const __mmask16 rows = visible(s->c, s->row + 16 * x, s->key + i + odd, s->length);
                w[odd][x] = _mm512_maskz_mov_ps(rows, w[odd][x]);
                ds[odd][x] = _mm512_maskz_mov_ps(rows, ds[odd][x]);
            }
        }
        UNROLL for (int odd = 0; odd < 2; odd++) {
            const int64_t to = i / 16 * TILE + (i % 16 + odd) * 32;
            _mm512_storeu_si512(s->weights_left + to, (__m512i)_mm512_cvtne2ps_pbh(w[odd][1], w[odd][0]));
            _mm512_storeu_si512(s->dscores_left + to, (__m512i)_mm512_cvtne2ps_pbh(ds[odd][1], ds[odd][0]));
        }
        UNROLL for (int x = 0; x < 2; x++)
            _mm512_storeu_si512(s->dscores + x * TILE + i / 2 * 32, right_row(ds[0][x], ds[1][x]));
    }
}

static void plain_square(const Backward *s, const float *scores, const float *dweights) {
    dscores_square(s, scores, dweights, 0, 0);
}
static void masked_square(const Backward *s, const float *scores, const float *dweights) {
    dscores_square(s, scores, dweights, 1, 0);
}
static void capped_square(const Backward *s, const float *scores, const float *dweights) {
    dscores_square(s, scores, dweights, 1, 1);
}

void bf16_backward_block(
    const AttentionCall *c, int64_t h, int64_t task, const uint16_t *packed, float *key_sums, void *memory
) {
    const int64_t width = width_of(c->head_dim), v_width = width_of(c->value_dim), size = square_size(c, 1);
    Work *work = memory;
    Block b;
    double exact[ROWS] = {0};
    Steps steps[PANELS];
    Range live[PANELS];
    int started[PANELS] = {0};
    find_block(c, h, task, &b);
    const int64_t panels = pack_queries(c, &b, work, 1), batch = c->plan.batch[b.n], row = c->plan.begin[b.n] + b.first;
    for (int64_t p = 0; p < panels && c->dout; p++) {
        const Rows rows = rows_of(c, c->dout, c->dout_strides, b.n, h, b.first + p * SIDE, c->value_dim);
        pack_right(rows, v_width, work->dout + p * 2 * v_width * TILE);
        pack_right_by_row(rows, v_width, work->dout_by_row + p * 2 * v_width * TILE);
    }
    read_delta(c, &b, exact);
    for (int64_t p = 0; p < panels; p++) {
        live[p] = squares_of(c, &b, p);
        if (!c->dmaps || !b.columns) continue;
        find_steps(&b, p, &steps[p]);
        float before[SIDE];
        memcpy(before, b.delta + p * SIDE, sizeof(before));
        if (steps[p].count) add_delta_of_map(c, &b, p, &steps[p], packed, work);
        for (int r = 0; r < SIDE; r++) exact[p * SIDE + r] += b.delta[p * SIDE + r] - before[r];
    }
    for (int64_t r = 0; c->delta && r < b.count; r++) c->delta[(batch * c->q_heads + h) * c->rows + row + r] = exact[r];

    const int32_t *tokens = c->plan.tokens + b.n * c->plan.columns + b.first_column;
    int64_t token = 0, from = live[0].from, to = live[panels - 1].to;
    for (int64_t block = from; block < to; block += KEY_SQUARES) {
        const int64_t squares = int_min(KEY_SQUARES, to - block);
        for (int64_t s = block; s < block + squares; s++) {
            const uint16_t *keys = packed + s * size, *values = keys + 2 * width * TILE;
            float *dv = key_sums + s * sums_size(c), *dk = dv + v_width * SQUARE;
            int64_t p0 = 0, p1 = panels;
            while (p0 < panels && live[p0].to <= s) p0++;
            while (p1 > p0 && live[p1 - 1].from > s) p1--;
            const int64_t first_token = token;
            while (token < b.columns && tokens[token] < (s + 1) * SIDE) token++;
            for (int64_t p = p0; p < p1; p++) {
                const Operand q = {work->q + p * 2 * width * TILE, width * TILE, TILE};
                if (c->dout) { /* before the scores: dA is added to what the tile registers wrote last but one */
                    const Operand dout = {work->dout + p * 2 * v_width * TILE, v_width * TILE, TILE};
                    product(c, (Operand){values, v_width * TILE, TILE}, dout, v_width, work->dweights, 0);
                } else {
                    memset(work->dweights, 0, sizeof(work->dweights));
                }
                product(c, (Operand){keys, width * TILE, TILE}, q, width, work->scores, 0);
                for (int64_t j = first_token; c->dmaps && j < token; j++)
                    UNROLL for (int x = 0; x < 2; x++) {
                        float *dp = work->dweights + in_square(tokens[j] - s * SIDE, x);
                        store(dp, load(dp) + upstream(c, dmaps_of(c, &b, b.first_column + j), &steps[p], x));
                    }
                const int64_t at_row = p * SIDE;
                const float *lse = b.lse + at_row, *delta = b.delta + at_row;
                const Backward square = {
                    c, b.first + at_row, s * SIDE, b.length,
                    {load(lse), load(lse + 16)}, {load(delta), load(delta + 16)},
                    work->weights_left + p * 2 * TILE, work->dscores_left + p * 2 * TILE,
                    work->dscores + (p * KEY_SQUARES + s - block) * 2 * TILE,
                };
                const int all = all_visible(c, b.first + at_row, s, b.length);
                (c->softcap > 0 ? capped_square : all ? plain_square : masked_square)(
                    &square, work->scores, work->dweights
                );
            }
            if (p0 == p1) continue;
            const Operand weights = {work->weights_left + p0 * 2 * TILE, TILE, 2 * TILE};
            const Operand dscores = {work->dscores_left + p0 * 2 * TILE, TILE, 2 * TILE};
            for (int64_t d = 0; d < v_width && c->dout; d++) {
                const Operand dout = {work->dout_by_row + (p0 * v_width + d) * 2 * TILE, TILE, 2 * v_width * TILE};
                product(c, weights, dout, p1 - p0, dv + d * SQUARE, 1);
            }
            for (int64_t d = 0; d < width; d++) {
                const Operand q = {work->q_by_row + (p0 * width + d) * 2 * TILE, TILE, 2 * width * TILE};
                product(c, dscores, q, p1 - p0, dk + d * SQUARE, 1);
            }
        }
        for (int64_t p = 0; p < panels; p++) {
            const int64_t s0 = int_max(live[p].from, block), s1 = int_min(live[p].to, block + squares);
            if (s0 >= s1) continue;
            const uint16_t *keys = packed + s0 * size + 2 * (width + v_width) * TILE;
            const Operand dscores = {work->dscores + (p * KEY_SQUARES + s0 - block) * 2 * TILE, TILE, 2 * TILE};
            for (int64_t d = 0; d < width; d++)
                product(c, (Operand){keys + 2 * d * TILE, TILE, size}, dscores, s1 - s0,
                        work->result + (p * width + d) * SQUARE, started[p]);
            started[p] = 1;
        }
    }
    float scale[SIDE];
    for (int i = 0; i < SIDE; i++) scale[i] = (float)c->scale;
    for (int64_t p = 0; p < panels; p++)
        write_transposed(work->result + p * width * SQUARE, width, scale,
                         (uint16_t *)c->dq + at(c->dq_strides, batch, h, row + p * SIDE), c->dq_strides[2],
                         int_min(SIDE, b.count - p * SIDE), c->head_dim);
}

/* Round the sums of a gradient of a square of keys and write their rows. Sums of other threads come in `parts`. */
INLINE void write_rows(
    const float *sums, const float *const *parts, int64_t count, float scale, uint16_t *to, int64_t stride,
    int64_t rows, int64_t columns
) {
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < columns; d += 16) {
            const int64_t offset = d / 32 * SQUARE + in_square(r, d / 16 % 2);
            __m512 x = load(sums + offset);
            for (int64_t t = 0; t < count; t++) x += load(parts[t] + offset);
            _mm256_storeu_si256((__m256i *)(to + r * stride + d), (__m256i)_mm512_cvtneps_pbh(x * scale));
        }
}

void bf16_write_key_gradients(
    const AttentionCall *c, int64_t g, int64_t task, const float *key_sums, const float *const *parts, int64_t count
) {
    const Plan *p = &c->plan;
    const int64_t n = p->task_sequence[task], size = sums_size(c), v_size = width_of(c->value_dim) * SQUARE;
    for (int64_t s = 0; s < PANELS; s++) {
        const int64_t key = p->task_row[task] + s * SIDE, rows = int_min(SIDE, p->length[n] - key);
        const int64_t row = p->begin[n] + key, offset = key / SIDE * size;
        if (rows <= 0) break;
        const float *dv[count + 1], *dk[count + 1];
        for (int64_t t = 0; t < count; t++) {
            dv[t] = parts[t] + offset;
            dk[t] = dv[t] + v_size;
        }
        write_rows(key_sums + offset, dv, count, 1.0f, (uint16_t *)c->dv + at(c->dv_strides, p->batch[n], g, row),
                   c->dv_strides[2], rows, c->value_dim);
        write_rows(key_sums + offset + v_size, dk, count, (float)c->scale,
                   (uint16_t *)c->dk + at(c->dk_strides, p->batch[n], g, row), c->dk_strides[2], rows, c->head_dim);
    }
}

#endif
