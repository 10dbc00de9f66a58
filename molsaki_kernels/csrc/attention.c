/* Attention and its stepwise map on a CPU in one pass, forward and backward (engine "native").
 *
 * The equations are those of flash attention and of docs/derivation.md. The lanes of a vector are query positions
 * (rows). Scores are computed transposed, as S^T = K Q^T, from broadcast keys and the transposed queries of PANEL
 * rows. The softmax over keys then needs no sums across lanes, and the scores of one key token are contiguous over
 * rows. A block is TASK_ROWS rows against KEYS keys.
 *
 * Forward: the scores of key tokens are saved. Once the maximum and the sum of each row are known, the scores
 * become weights and are summed per step.
 * Backward: the weights of key tokens are computed first, because dlse needs them. dA is added to dP in the block that
 * contains the key token.
 *
 * Deterministic: the work of each thread and the order of its sums depend only on the shapes, the plan and the
 * number of threads.
 */
#include "attention.h"
#include "layout.h"

#include <omp.h>

enum {
    PANEL = 2 * LANES, /* rows whose scores with STRIP keys are in registers together */
    PANELS = ROWS / PANEL,
    VECTORS = ROWS / LANES,
    KEYS = 96, /* a multiple of STRIP and GROUP */
    WIDEST = MAX_HEAD_DIM + 16 /* of the copied rows; an odd number of cache lines */
};

#define F(field) FIELD(Plan, field)
const Layout molsaki_layout_Plan[] = {
    WHOLE(Plan),
    F(sequences), F(columns), F(longest), F(tasks), F(batch), F(begin), F(length), F(tokens_used), F(tokens),
    F(word_of_token), F(step_of_row), F(task_sequence), F(task_row), F(task_first), F(task_count), F(task_slot),
    END,
};
#undef F

#define F(field) FIELD(AttentionCall, field)
const Layout molsaki_layout_AttentionCall[] = {
    WHOLE(AttentionCall),
    F(plan), F(rows), F(q_heads), F(kv_heads), F(head_dim), F(value_dim), F(steps), F(words), F(causal), F(window),
    F(is_bf16), F(per_head), F(threads), F(unit), F(q_strides), F(k_strides), F(v_strides), F(out_strides),
    F(dout_strides),
    F(dq_strides), F(dk_strides), F(dv_strides), F(scale), F(softcap), F(word_weight), F(q), F(k), F(v), F(sinks),
    F(out), F(lse), F(work), F(packed), F(groups), F(sums), F(maps), F(dout), F(dlse), F(dmaps), F(delta), F(dq), F(dk),
    F(dv), F(parts), F(part_of),
    END,
};
#undef F

#define F(field) FIELD(AttentionMemory, field)
const Layout molsaki_layout_AttentionMemory[] = {WHOLE(AttentionMemory), F(work), F(packed), F(parts), END};
#undef F

const Layout molsaki_layout_constants[] = {
    CONSTANT(TASK_ROWS), CONSTANT(MAP_TILE_ROWS), CONSTANT(COLUMN_MULTIPLE), CONSTANT(HEAD_DIM_MULTIPLE),
    CONSTANT(MAX_HEAD_DIM), CONSTANT(NEVER), CONSTANT(FLOAT32), CONSTANT(VECTORS_BF16), CONSTANT(TILES_BF16),
    END,
};
_Static_assert(HEAD_DIM_MULTIPLE % LANES == 0 && COLUMN_MULTIPLE % LANES == 0, "rows are whole vectors");

/* Working memory of one thread: its copies of a block's inputs, and the results. Too large for the stack. */
typedef struct {
    float q[ROWS * WIDEST], dout[ROWS * WIDEST], k[KEYS * WIDEST], v[KEYS * WIDEST];
    float q_panel[ROWS * MAX_HEAD_DIM], dout_panel[ROWS * MAX_HEAD_DIM];
    float result[ROWS * WIDEST]; /* out or dq */
    float weights[KEYS][ROWS], dscores[KEYS][ROWS]; /* `weights` holds the scores first */
    float slopes[STRIP][ROWS];                      /* derivative of the softcap; dscores are multiplied by it */
    float aside[][ROWS]; /* (columns + STRIP): scores of key tokens, or their dA; then the key tokens' vectors */
} Work;

/* The stride of the copied rows: one of three constants, so that addressing an element of a key takes one load. */
static int64_t width_of(int64_t D) { return D <= 64 ? 80 : D <= 128 ? 144 : WIDEST; }

/* The units that this machine supports: bit u for unit u. */
int64_t molsaki_units(void) {
#ifdef __AVX512BF16__
    return 1 << FLOAT32 | 1 << VECTORS_BF16 | (bf16_has_tiles() ? 1 << TILES_BF16 : 0);
#else
    return 1 << FLOAT32;
#endif
}

/* The memory of one thread. */
static int64_t work_size(const AttentionCall *c) { /* in bytes */
    if (TAKES_BF16(c)) return bf16_work(c);
    return sizeof(Work) + (c->plan.columns + STRIP) * (ROWS + width_of(c->head_dim)) * sizeof(float);
}

static int64_t part_size(const AttentionCall *c) { /* in numbers */
    if (TAKES_BF16(c)) return bf16_key_sums(c, (c->plan.longest + ROWS - 1) / ROWS);
    return c->plan.longest * (c->head_dim + c->value_dim);
}

/* Write the bytes of memory that a call needs. It reads no pointer of the call. */
void molsaki_attention_memory(const AttentionCall *c, int64_t backward, AttentionMemory *bytes) {
    bytes->work = c->threads * work_size(c);
    bytes->packed = TAKES_BF16(c) ? bf16_packed(c, backward) : 0;
    bytes->parts = backward ? (TAKES_BF16(c) ? 2 : 1) * c->threads * part_size(c) * sizeof(float) : 0;
}

static void *own_work(const AttentionCall *c) {
    return (char *)c->work + omp_get_thread_num() * work_size(c);
}

/* exp(x), or 0 where it is below 1e-34. Keeps NaN. */
INLINE vf weight(vf x) {
    const vi vanishes = x <= splat(-80.0f);
    return (vf)((vi)exponential(clamp(x, -80.0f, 80.0f)) & ~vanishes);
}

/* Transpose 8 x 8 numbers. */
INLINE void transpose8(const float *from, int64_t from_row, float *to, int64_t to_row) {
    __m256 a[8], b[8];
    UNROLL for (int i = 0; i < 8; i++) a[i] = _mm256_loadu_ps(from + i * from_row);
    UNROLL for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    UNROLL for (int i = 0; i < 8; i += 4) {
        a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
        a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
        a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
        a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    UNROLL for (int i = 0; i < 4; i++) {
        _mm256_storeu_ps(to + i * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
        _mm256_storeu_ps(to + (i + 4) * to_row, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
    }
}

/* Transpose (ROWS, width) into panels of (D, PANEL). */
INLINE void to_panels(const float *rows, int64_t panels, int64_t D, int64_t width, float *panel) {
    for (int64_t p = 0; p < panels; p++)
        for (int64_t d = 0; d < D; d += 8)
            for (int r = 0; r < PANEL; r += 8)
                transpose8(rows + (p * PANEL + r) * width + d, width, panel + (p * D + d) * PANEL + r, PANEL);
}

/* Copy `count` rows of a tensor from `offset` on, and fill with zeros up to `padded` rows. */
INLINE void read_rows(
    const void *x, int64_t offset, int64_t stride, int64_t is_bf16, int64_t D, int64_t count, int64_t padded,
    int64_t width, float *rows
) {
    for (int64_t r = 0; r < count; r++) read_row(x, offset + r * stride, is_bf16, D, rows + r * width);
    for (int64_t r = count; r < padded; r++) memset(rows + r * width, 0, D * sizeof(float));
}

/* The unmasked scores of STRIP keys and the rows of a panel, into PANEL columns of a tile. */
INLINE void scores_of_width(const float *keys, int width, const float *panel, int64_t D, float *tile) {
    vf s[STRIP][2];
    UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < 2; v++) s[i][v] = (vf){0};
    for (int64_t d = 0; d < D; d++) {
        const vf a = load(panel + d * PANEL), b = load(panel + d * PANEL + LANES);
        UNROLL for (int i = 0; i < STRIP; i++) {
            const float key = keys[i * width + d];
            s[i][0] += key * a;
            s[i][1] += key * b;
        }
    }
    UNROLL for (int i = 0; i < STRIP; i++)
        UNROLL for (int v = 0; v < 2; v++) store(tile + i * ROWS + v * LANES, s[i][v]);
}

static void scores(const float *keys, const float *panel, int64_t D, float *tile) {
    if (D <= 64) scores_of_width(keys, 80, panel, D, tile);
    else if (D <= 128) scores_of_width(keys, 144, panel, D, tile);
    else scores_of_width(keys, WIDEST, panel, D, tile);
}

/* Replace the scores of STRIP keys and a panel by softcap * tanh(score / softcap). Its derivative goes to `slopes`
 * unless that is NULL. */
static void cap_scores(const AttentionCall *c, float *tile, float *slopes) {
    const float cap = (float)c->softcap;
    for (int i = 0; i < STRIP; i++)
        for (int v = 0; v < 2; v++) {
            const vf t = hyperbolic_tangent(load(tile + i * ROWS + v * LANES) * (1.0f / cap));
            store(tile + i * ROWS + v * LANES, t * cap);
            if (slopes) store(slopes + i * ROWS + v * LANES, (1.0f - t) * (1.0f + t));
        }
}

/* The mask of the lanes, rows from `row` on, that see the key. */
INLINE vi visible(const AttentionCall *c, int64_t row, int64_t key, int64_t length) {
    vi rows;
    for (int i = 0; i < LANES; i++) rows[i] = i;
    if (key >= length) return (vi){0};
    const int32_t distance = (int32_t)(row - key);
    vi mask = (vi){0} == 0;
    if (c->causal) mask &= rows >= -distance;
    if (c->window > 0) mask &= rows < (int32_t)c->window - distance;
    return mask;
}

/* Write `hidden` where a row of the panel from `row` on does not see one of the STRIP keys from `key` on. */
static void hide(const AttentionCall *c, int64_t row, int64_t key, int64_t length, float *tile, float hidden) {
    const int64_t last = key + STRIP - 1;
    if (last < length && (!c->causal || last <= row) && (c->window <= 0 || key > row + PANEL - 1 - c->window)) return;
    for (int i = 0; i < STRIP; i++)
        for (int v = 0; v < 2; v++) {
            float *x = tile + i * ROWS + v * LANES;
            const vi mask = visible(c, row + v * LANES, key + i, length);
            store(x, (vf)(((vi)load(x) & mask) | ((vi)splat(hidden) & ~mask)));
        }
}

/* The strips of keys, counted from `key`, with at least one key that a row of the panel sees. */
typedef struct { int64_t from, to; } Range;
INLINE Range live_strips(const AttentionCall *c, const Block *b, int64_t panel, int64_t key, int64_t keys) {
    const int64_t row = b->first + panel * PANEL, last = int_min(row + PANEL, b->first + b->count) - 1;
    const int64_t low = c->window > 0 ? int_max(row - c->window + 1 - key, 0) : 0;
    const int64_t high = c->causal ? int_min(last + 1 - key, keys) : keys;
    if (high <= low) return (Range){0, 0};
    return (Range){low / STRIP, (high + STRIP - 1) / STRIP};
}

/* The keys of a block, counted from `key`, that at least one of GROUP rows from r on sees. The tile has all keys
 * between. */
INLINE Range keys_of(const AttentionCall *c, const Block *b, const Range *live, int64_t r, int64_t key, int64_t keys) {
    const int64_t last = int_min(r + GROUP, b->count) - 1;
    Range x = live[r / PANEL], y = live[last / PANEL];
    if (x.from == x.to) x = y;
    if (y.from == y.to) y = x;
    const int64_t to = int_min(y.to * STRIP, keys);
    return (Range){x.from * STRIP, c->causal ? int_min(b->first + last + 1 - key, to) : to};
}

/* Write zeros to the strips of a panel that are not live. */
INLINE void clear_dead(float (*tile)[ROWS], int64_t panel, Range live, int64_t strips) {
    for (int64_t j = 0; j < strips * STRIP; j++)
        if (j < live.from * STRIP || j >= live.to * STRIP)
            UNROLL for (int v = 0; v < 2; v++) store(&tile[j][panel * PANEL + v * LANES], (vf){0});
}

/* A block's scaled queries, as rows and as panels. */
static void read_queries(const AttentionCall *c, const Block *b, float *q, float *panel) {
    const int64_t D = c->head_dim, width = width_of(D), panels = (b->count + PANEL - 1) / PANEL;
    const int64_t row = c->plan.begin[b->n] + b->first, offset = at(c->q_strides, c->plan.batch[b->n], b->h, row);
    read_rows(c->q, offset, c->q_strides[2], c->is_bf16, D, b->count, panels * PANEL, width, q);
    for (int64_t r = 0; r < b->count; r++)
        for (int64_t d = 0; d < D; d++) q[r * width + d] *= (float)c->scale;
    to_panels(q, panels, D, width, panel);
}

/* Add the weights of each vector's rows to the sums of their steps. */
INLINE void sum_steps(const AttentionCall *c, const Block *b, const vf *w, double *sums) {
    const int64_t first = c->plan.task_first[b->task], C = c->plan.columns;
    for (int v = 0; v < VECTORS && v * LANES < b->count; v++) {
        const vi steps = *(const vi_any *)(b->step + v * LANES);
        int32_t done = -1;
        for (int i = 0; i < LANES; i++) { /* steps ascend: each is a run of lanes, with rows in no step between */
            const int32_t step = b->step[v * LANES + i];
            if (step <= done) continue;
            sums[(step - first) * C] += sum_of((vf)((vi)w[v] & (steps == step)));
            done = step;
        }
    }
}

/* The map of a forward block: turn the saved scores into weights and sum them over the rows of each step. */
INLINE void add_map(
    const AttentionCall *c, const Block *b, float (*aside)[ROWS], const vf *max, const vf *sum, double *sums
) {
    vf share[VECTORS];
    for (int v = 0; v < VECTORS; v++) share[v] = 1.0f / sum[v];
    for (int64_t j = 0; j < b->columns; j++) {
        vf w[VECTORS]; /* from max and sum rather than from lse, which is rounded */
        for (int v = 0; v < VECTORS; v++) w[v] = weight(load(&aside[j][v * LANES]) - max[v]) * share[v];
        sum_steps(c, b, w, sums + b->first_column + j);
    }
}

/* Online softmax of a panel over the keys [from, to) of the block: replace scores by exp(score - max), update max and
 * sum, and return in `shrink` the factor exp(old max - max) for earlier results. */
INLINE void softmax(float (*tile)[ROWS], int64_t panel, int64_t from, int64_t to, vf *max, vf *sum, vf *shrink) {
    float *column = &tile[0][panel * PANEL];
    UNROLL for (int v = 0; v < 2; v++) {
        vf m0 = max[v], m1 = m0;
        int64_t j = from;
        for (; j + 1 < to; j += 2) {
            m0 = vf_max(load(column + j * ROWS + v * LANES), m0);
            m1 = vf_max(load(column + (j + 1) * ROWS + v * LANES), m1);
        }
        if (j < to) m0 = vf_max(load(column + j * ROWS + v * LANES), m0);
        const vf m = vf_max(m0, m1);
        shrink[v] = weight(max[v] - m);
        shrink[v] = (vf)(((vi)shrink[v] & (max[v] != m)) | ((vi)splat(1.0f) & (max[v] == m))); /* also for infinities */
        max[v] = m;
    }
    vf total[2] = {{0}, {0}};
    for (int64_t j = from; j < to; j++) UNROLL for (int v = 0; v < 2; v++) {
        float *score = column + j * ROWS + v * LANES;
        const vf p = weight(load(score) - max[v]);
        store(score, p);
        total[v] += p;
    }
    UNROLL for (int v = 0; v < 2; v++) sum[v] = sum[v] * shrink[v] + total[v];
}

INLINE int differs_from_one(vf x) {
    const vi unequal = x != splat(1.0f);
    int any = 0;
    for (int i = 0; i < LANES; i++) any |= unequal[i];
    return any;
}

static void forward_block(const AttentionCall *c, int64_t h, int64_t task, void *memory, double *sums) {
    Work *work = memory;
    const int64_t D = c->head_dim, width = width_of(D), Dv = c->value_dim, v_width = width_of(Dv);
    const Plan *plan = &c->plan;
    Block b;
    find_block(c, h, task, &b);
    const int64_t batch = plan->batch[b.n], begin = plan->begin[b.n], panels = (b.count + PANEL - 1) / PANEL;
    float *q = work->q, *k = work->k, *v = work->v, *panel = work->q_panel, *out = work->result;
    float(*tile)[ROWS] = work->weights, (*aside)[ROWS] = work->aside;
    vf max[VECTORS], sum[VECTORS];

    read_queries(c, &b, q, panel);
    memset(out, 0, b.count * v_width * sizeof(float));
    const float start = c->sinks && !(c->sinks[h] < FIRST_MAX) ? c->sinks[h] : FIRST_MAX; /* keeps NaN */
    for (int x = 0; x < VECTORS; x++) {
        max[x] = splat(start);
        sum[x] = splat(c->sinks ? 1.0f : 0.0f);
    }
    for (int64_t j = 0; j < b.columns; j++)
        for (int x = 0; x < VECTORS; x++) store(&aside[j][x * LANES], splat(HIDDEN));
    const int32_t *tokens = plan->tokens + b.n * plan->columns + b.first_column;
    int64_t token = 0;

    for (int64_t key = b.low; key < b.high; key += KEYS) {
        const int64_t keys = int_min(KEYS, b.high - key), strips = (keys + STRIP - 1) / STRIP;
        read_rows(c->k, at(c->k_strides, batch, b.g, begin + key), c->k_strides[2], c->is_bf16, D, keys, strips * STRIP,
                  width, k);
        read_rows(c->v, at(c->v_strides, batch, b.g, begin + key), c->v_strides[2], c->is_bf16, Dv, keys, keys,
                  v_width, v);
        Range live[PANELS];
        for (int64_t p = 0; p < panels; p++) {
            const int64_t row = b.first + p * PANEL;
            live[p] = live_strips(c, &b, p, key, keys);
            clear_dead(tile, p, live[p], strips);
            for (int64_t strip = live[p].from; strip < live[p].to; strip++) {
                const int64_t first = key + strip * STRIP;
                scores(k + strip * STRIP * width, panel + p * D * PANEL, D, &tile[strip * STRIP][p * PANEL]);
                if (c->softcap > 0) cap_scores(c, &tile[strip * STRIP][p * PANEL], 0);
                hide(c, row, first, b.length, &tile[strip * STRIP][p * PANEL], HIDDEN);
            }
        }
        while (token < b.columns && tokens[token] < key) token++;
        for (; token < b.columns && tokens[token] < key + keys; token++) {
            const int64_t j = tokens[token] - key;
            for (int64_t p = 0; p < panels; p++)
                if (j / STRIP >= live[p].from && j / STRIP < live[p].to)
                    memcpy(&aside[token][p * PANEL], &tile[j][p * PANEL], PANEL * sizeof(float));
        }
        for (int64_t p = 0; p < panels; p++) {
            if (live[p].from == live[p].to) continue;
            vf shrink[2];
            softmax(tile, p, live[p].from * STRIP, live[p].to * STRIP, max + 2 * p, sum + 2 * p, shrink);
            if (key == b.low || !(differs_from_one(shrink[0]) | differs_from_one(shrink[1]))) continue;
            for (int r = 0; r < PANEL; r++) {
                const float by = shrink[r / LANES][r % LANES];
                for (int64_t d = 0; d < Dv; d++) out[(p * PANEL + r) * v_width + d] *= by;
            }
        }
        for (int64_t r = 0; r < b.count; r += GROUP) {
            const Range range = keys_of(c, &b, live, r, key, keys);
            if (range.from < range.to)
                accumulate(&tile[range.from][r], 1, ROWS, v + range.from * v_width, v_width, range.to - range.from, Dv,
                           out + r * v_width, v_width, GROUP);
        }
    }
    float *lse = c->lse + (batch * c->q_heads + h) * c->rows + begin + b.first;
    for (int64_t r = 0; r < b.count; r++) {
        const float total = sum[r / LANES][r % LANES], by = 1.0f / total;
        lse[r] = (float)(max[r / LANES][r % LANES] + log(total)); /* one rounding */
        const int64_t offset = at(c->out_strides, batch, h, begin + b.first + r);
        if (c->is_bf16)
            for (int64_t d = 0; d < Dv; d++) ((uint16_t *)c->out)[offset + d] = to_bf16(out[r * v_width + d] * by);
        else
            for (int64_t d = 0; d < Dv; d++) ((float *)c->out)[offset + d] = out[r * v_width + d] * by;
    }
    add_map(c, &b, aside, max, sum, sums);
}

/* The map of one step of a sequence: the sum over tasks and groups of heads, then over the tokens of each word. */
static void reduce_map(const AttentionCall *c, int64_t n, int64_t s) {
    const Plan *p = &c->plan;
    const int64_t C = p->columns, heads = c->per_head ? c->q_heads : 1, groups = c->per_head ? 1 : c->groups;
    const int32_t *word = p->word_of_token + n * C;
    int64_t begin = first_task(p, n), end;
    while (begin < p->tasks && p->task_sequence[begin] == n && p->task_first[begin] + p->task_count[begin] <= s)
        begin++;
    for (end = begin; end < p->tasks && p->task_sequence[end] == n; end++) /* the steps of tasks ascend */
        if (p->task_count[end] && p->task_first[end] > s) break;
    for (int64_t h = 0; h < heads; h++) {
        float *map = c->maps + ((n * heads + h) * c->steps + s) * c->words;
        memset(map, 0, c->words * sizeof(float));
        for (int64_t j = 0; j < p->tokens_used[n]; j++) {
            double total = 0;
            for (int64_t t = begin; t < end; t++)
                for (int64_t group = h; p->task_count[t] && group < h + groups; group++) {
                    const int64_t slot = p->task_slot[t] * c->groups + group * p->task_count[t] + s - p->task_first[t];
                    total += c->sums[slot * C + j];
                }
            map[word[j]] += (float)(total * c->word_weight);
        }
    }
}

/* One task for one group of heads. */
static void forward_task(const AttentionCall *c, int64_t task, int64_t group) {
    const Plan *p = &c->plan;
    const int64_t count = p->task_count[task], heads = (c->q_heads + c->groups - 1) / c->groups;
    double *sums = c->sums + (p->task_slot[task] * c->groups + group * count) * p->columns;
    if (count * p->columns > 0) memset(sums, 0, count * p->columns * sizeof(double));
    for (int64_t h = group * heads; h < int_min((group + 1) * heads, c->q_heads); h++)
        (TAKES_BF16(c) ? bf16_forward_block : forward_block)(c, h, task, own_work(c), sums);
}

void molsaki_attention_forward(const AttentionCall *c) {
    const Plan *p = &c->plan;
#pragma omp parallel num_threads((int)c->threads)
    {
        if (TAKES_BF16(c)) {
            bf16_begin(c);
#pragma omp for collapse(2) schedule(static)
            for (int64_t g = 0; g < c->kv_heads; g++)
                for (int64_t t = 0; t < p->tasks; t++) bf16_pack(c, g, t);
        }
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t t = p->tasks - 1; t >= 0; t--) /* with a causal mask, the longest task first */
            for (int64_t group = 0; group < c->groups; group++) forward_task(c, t, group);
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < p->sequences; n++)
            for (int64_t s = 0; s < c->steps; s++)
                if (c->words > 0) reduce_map(c, n, s);
        if (TAKES_BF16(c)) bf16_end(c);
    }
}

/* dA of a key token for the rows of one vector. */
INLINE vf upstream(const AttentionCall *c, const Block *b, int64_t column, int v) {
    const int32_t *step = b->step + v * LANES, word = c->plan.word_of_token[b->n * c->plan.columns + column];
    const int64_t map = c->per_head ? b->n * c->q_heads + b->h : b->n;
    const float *dmaps = c->dmaps + map * c->steps * c->words + word;
    if (step[0] >= 0 && step[0] == step[LANES - 1]) return splat(dmaps[step[0] * c->words] * (float)c->word_weight);
    vf x = (vf){0};
    for (int i = 0; i < LANES; i++)
        if (step[i] >= 0) x[i] = dmaps[step[i] * c->words] * (float)c->word_weight;
    return x;
}

/* Write dA of the key tokens to `aside`, and each row's sum of weight * dA, the map's part of delta, to `added`. */
static void upstream_of_map(
    const AttentionCall *c, const Block *b, const float *key_tokens, const float *panel, float (*aside)[ROWS],
    float *added
) {
    const int64_t D = c->head_dim, width = width_of(D), panels = (b->count + PANEL - 1) / PANEL;
    const int32_t *tokens = c->plan.tokens + b->n * c->plan.columns;
    vf sums[VECTORS];
    for (int v = 0; v < VECTORS; v++) sums[v] = (vf){0};
    for (int64_t j = 0; j < b->columns; j += STRIP)
        for (int64_t p = 0; p < panels; p++) {
            const int64_t column = b->first_column + j, count = int_min(STRIP, b->columns - j);
            const int64_t row = b->first + p * PANEL;
            if (c->causal && tokens[column] >= row + PANEL) { /* no row sees it or a later column */
                for (int64_t i = 0; i < count; i++) memset(&aside[j + i][p * PANEL], 0, PANEL * sizeof(float));
                continue;
            }
            float s[STRIP][ROWS];
            scores(key_tokens + column * width, panel + p * D * PANEL, D, s[0]);
            if (c->softcap > 0) cap_scores(c, s[0], 0);
            for (int64_t i = 0; i < count; i++) UNROLL for (int x = 0; x < 2; x++) {
                const int64_t v = 2 * p + x;
                const vf da = upstream(c, b, column + i, v);
                const vf w = weight(load(&s[i][x * LANES]) - load(b->lse + v * LANES));
                store(&aside[j + i][v * LANES], da);
                sums[v] += (vf)((vi)w & visible(c, row + x * LANES, tokens[column + i], b->length)) * da;
            }
        }
    for (int v = 0; v < VECTORS; v++) store(added + v * LANES, sums[v]);
}

/* lse and delta = rowsum(dO * O) - dlse of a block's rows. */
INLINE void read_delta(const AttentionCall *c, Block *b, int64_t batch, int64_t row, const float *dout) {
    const int64_t Dv = c->value_dim, width = width_of(Dv), at_row = (batch * c->q_heads + b->h) * c->rows + row;
    for (int64_t r = 0; r < ROWS; r++) b->lse[r] = b->delta[r] = 0;
    for (int64_t r = 0; r < b->count; r++) {
        b->lse[r] = c->lse[at_row + r];
        double exact = 0;
        if (c->dout) {
            float out[MAX_HEAD_DIM];
            read_row(c->out, at(c->out_strides, batch, b->h, row + r), c->is_bf16, Dv, out);
            if (c->delta)
                for (int64_t d = 0; d < Dv; d++) exact += (double)dout[r * width + d] * out[d];
            vf sum = (vf){0};
            for (int64_t d = 0; d < Dv; d += LANES) sum += load(dout + r * width + d) * load(out + d);
            b->delta[r] = sum_of(sum);
        }
        if (c->dlse) b->delta[r] -= c->dlse[at_row + r];
        if (c->delta) c->delta[at_row + r] = exact - (c->dlse ? c->dlse[at_row + r] : 0);
    }
}

INLINE void zero_rows(float *x, int64_t row, int64_t count, int64_t D) {
    for (int64_t r = 0; r < count; r++) memset(x + r * row, 0, D * sizeof(float));
}

/* Where the gradients of a key head are summed, starting from zero: in the result or in the thread's part. */
typedef struct { float *dk, *dv; int64_t dk_row, dv_row; } KeyGradients;
static KeyGradients key_gradients(const AttentionCall *c, int64_t n, int64_t g, int in_place, int64_t thread) {
    const Plan *p = &c->plan;
    const int64_t D = c->head_dim, Dv = c->value_dim, b = p->batch[n], row = p->begin[n];
    float *part = c->parts + thread * part_size(c);
    KeyGradients to = {part, part + p->longest * D, D, Dv};
    if (in_place)
        to = (KeyGradients){
            (float *)c->dk + at(c->dk_strides, b, g, row), (float *)c->dv + at(c->dv_strides, b, g, row),
            c->dk_strides[2], c->dv_strides[2],
        };
    else
        c->part_of[thread] = n * c->kv_heads + g;
    zero_rows(to.dk, to.dk_row, p->length[n], D);
    zero_rows(to.dv, to.dv_row, p->length[n], Dv);
    return to;
}

/* Copy the keys of a head's key tokens, one per row, followed by zeros. */
static void read_key_tokens(const AttentionCall *c, int64_t n, int64_t g, float *rows) {
    const Plan *p = &c->plan;
    const int64_t D = c->head_dim, width = width_of(D), used = p->tokens_used[n];
    for (int64_t j = 0; j < used; j++) {
        const int64_t row = p->begin[n] + p->tokens[n * p->columns + j];
        read_row(c->k, at(c->k_strides, p->batch[n], g, row), c->is_bf16, D, rows + j * width);
    }
    zero_rows(rows + used * width, width, p->columns + STRIP - used, D);
}

static void backward_block(
    const AttentionCall *c, int64_t h, int64_t task, const KeyGradients *to, const float *key_tokens, Work *work
) {
    const int64_t D = c->head_dim, width = width_of(D), Dv = c->value_dim, v_width = width_of(Dv);
    const Plan *plan = &c->plan;
    Block b;
    find_block(c, h, task, &b);
    const int64_t batch = plan->batch[b.n], begin = plan->begin[b.n], panels = (b.count + PANEL - 1) / PANEL;
    const int64_t row = begin + b.first;
    float *q = work->q, *dout = work->dout, *k = work->k, *v = work->v, *dq = work->result;
    float *q_panel = work->q_panel, *dout_panel = work->dout_panel;
    float(*weights)[ROWS] = work->weights, (*dscores)[ROWS] = work->dscores, (*aside)[ROWS] = work->aside;

    read_queries(c, &b, q, q_panel);
    if (c->dout) {
        read_rows(c->dout, at(c->dout_strides, batch, h, row), c->dout_strides[2], c->is_bf16, Dv, b.count,
                  panels * PANEL, v_width, dout);
        to_panels(dout, panels, Dv, v_width, dout_panel);
    }
    read_delta(c, &b, batch, row, dout);
    if (c->dmaps) {
        float added[ROWS];
        upstream_of_map(c, &b, key_tokens, q_panel, aside, added);
        for (int r = 0; r < ROWS; r++) b.delta[r] += added[r];
        if (c->delta)
            for (int64_t r = 0; r < b.count; r++) c->delta[(batch * c->q_heads + h) * c->rows + row + r] += added[r];
    }
    memset(dq, 0, b.count * width * sizeof(float));
    const int32_t *tokens = plan->tokens + b.n * plan->columns + b.first_column;
    int64_t token = 0;

    for (int64_t key = b.low; key < b.high; key += KEYS) {
        const int64_t keys = int_min(KEYS, b.high - key), strips = (keys + STRIP - 1) / STRIP;
        read_rows(c->k, at(c->k_strides, batch, b.g, begin + key), c->k_strides[2], c->is_bf16, D, keys, strips * STRIP,
                  width, k);
        if (c->dout)
            read_rows(c->v, at(c->v_strides, batch, b.g, begin + key), c->v_strides[2], c->is_bf16, Dv, keys,
                      strips * STRIP, v_width, v);
        const float *da[KEYS];
        for (int j = 0; j < KEYS; j++) da[j] = 0;
        if (c->dmaps) {
            while (token < b.columns && tokens[token] < key) token++;
            for (; token < b.columns && tokens[token] < key + keys; token++) da[tokens[token] - key] = aside[token];
        }
        Range live[PANELS];
        for (int64_t p = 0; p < panels; p++) {
            live[p] = live_strips(c, &b, p, key, keys);
            clear_dead(weights, p, live[p], strips);
            clear_dead(dscores, p, live[p], strips);
            const vf lse[2] = {load(b.lse + p * PANEL), load(b.lse + p * PANEL + LANES)};
            const vf delta[2] = {load(b.delta + p * PANEL), load(b.delta + p * PANEL + LANES)};
            for (int64_t strip = live[p].from; strip < live[p].to; strip++) {
                const int64_t j = strip * STRIP, first = key + j;
                float *w = &weights[j][p * PANEL], *ds = &dscores[j][p * PANEL];
                scores(k + j * width, q_panel + p * D * PANEL, D, w);
                if (c->softcap > 0) cap_scores(c, w, work->slopes[0]);
                for (int i = 0; i < STRIP; i++)
                    UNROLL for (int x = 0; x < 2; x++) {
                        float *score = w + i * ROWS + x * LANES;
                        store(score, weight(load(score) - lse[x]));
                    }
                hide(c, b.first + p * PANEL, first, b.length, w, 0);
                if (c->dout) scores(v + j * v_width, dout_panel + p * Dv * PANEL, Dv, ds);
                else for (int i = 0; i < STRIP; i++) memset(ds + i * ROWS, 0, PANEL * sizeof(float));
                for (int i = 0; i < STRIP; i++)
                    UNROLL for (int x = 0; x < 2; x++) {
                        float *to_ds = ds + i * ROWS + x * LANES;
                        vf dp = load(to_ds);
                        if (da[j + i]) dp += load(da[j + i] + p * PANEL + x * LANES);
                        dp = load(w + i * ROWS + x * LANES) * (dp - delta[x]);
                        store(to_ds, c->softcap > 0 ? dp * load(&work->slopes[i][x * LANES]) : dp);
                    }
            }
        }
        for (int64_t j = 0; j < keys; j += GROUP) {
            const int64_t from = c->causal ? int_max(key + j - b.first, 0) : 0, limit = int_min(GROUP, keys - j);
            const int64_t end = c->window > 0 ? int_min(key + j + GROUP - 1 + c->window - b.first, b.count) : b.count;
            if (from >= end) continue;
            accumulate(&dscores[j][from], ROWS, 1, q + from * width, width, end - from, D,
                       to->dk + (key + j) * to->dk_row, to->dk_row, limit);
            if (c->dout)
                accumulate(&weights[j][from], ROWS, 1, dout + from * v_width, v_width, end - from, Dv,
                           to->dv + (key + j) * to->dv_row, to->dv_row, limit);
        }
        for (int64_t r = 0; r < b.count; r += GROUP) {
            const Range range = keys_of(c, &b, live, r, key, keys);
            if (range.from < range.to)
                accumulate(&dscores[range.from][r], 1, ROWS, k + range.from * width, width, range.to - range.from, D,
                           dq + r * width, width, GROUP);
        }
    }
    for (int64_t r = 0; r < b.count; r++) {
        float *target = (float *)c->dq + at(c->dq_strides, batch, h, row + r);
        for (int64_t d = 0; d < D; d++) target[d] = dq[r * width + d] * (float)c->scale;
    }
}

/* The approximate cost of a task. */
INLINE int64_t cost(const AttentionCall *c, int64_t task) {
    const int64_t first = c->plan.task_row[task], length = c->plan.length[c->plan.task_sequence[task]];
    const int64_t stop = int_min(first + ROWS, length), low = c->window > 0 ? int_max(first - c->window + 1, 0) : 0;
    return (stop - first) * ((c->causal ? stop : length) - low + 64);
}

/* A key head in a thread's share, for a unit that takes bfloat16. */
typedef struct { int64_t n, g, first_task; int began; const uint16_t *packed; float *sums; } KeyHead;

/* A thread's memory for dk and dv: of the key head that it started last, or of one that another thread started. */
INLINE float *sums_of(const AttentionCall *c, int64_t thread, int began) {
    return c->parts + (2 * thread + began) * part_size(c);
}

/* Write dk and dv of a key head that the thread started, all of whose blocks are done. */
INLINE void write_head(const AttentionCall *c, const KeyHead *head) {
    if (!head->packed || !head->began) return;
    for (int64_t row = 0; row < c->plan.length[head->n]; row += ROWS)
        bf16_write_key_gradients(c, head->g, head->first_task + row / ROWS, head->sums, 0, 0);
}

INLINE KeyHead start_head(const AttentionCall *c, int64_t n, int64_t g, int64_t first_task, int began, int64_t thread) {
    const uint16_t *packed = bf16_pack_head(c, n, g, first_task, thread);
    const KeyHead head = {n, g, first_task, began, packed, sums_of(c, thread, began)};
    c->part_of[began ? c->threads + thread : thread] = n * c->kv_heads + g;
    memset(head.sums, 0, bf16_key_sums(c, (c->plan.length[n] + ROWS - 1) / ROWS) * sizeof(float));
    return head;
}

/* The share of one thread: consecutive blocks in the order of sequences, heads, rows. The thread that has the first
 * block of a key head sums the head's gradients in the result (for a unit that takes bfloat16, in memory of its own,
 * from which they are written when the head is done). A later thread uses its own part. It needs only one, because its
 * share starts within at most one key head. */
static void backward_share(const AttentionCall *c, int64_t thread, int64_t threads) {
    const Plan *p = &c->plan;
    const int64_t H = c->q_heads, group = H / c->kv_heads;
    int64_t total = 0, done = 0, current = -1, tasks;
    for (int64_t t = 0; t < p->tasks; t++) total += H * cost(c, t);
    const int64_t begin = total / threads * thread, end = thread + 1 < threads ? total / threads * (thread + 1) : total;
    Work *work = own_work(c);
    float *key_tokens = TAKES_BF16(c) ? 0 : work->aside[p->columns + STRIP];
    KeyGradients to = {0};
    KeyHead head = {0};
    c->part_of[thread] = -1;
    if (TAKES_BF16(c)) c->part_of[c->threads + thread] = -1;
    for (int64_t first = 0; first < p->tasks; first += tasks) {
        const int64_t n = p->task_sequence[first];
        int64_t of_head = 0;
        for (tasks = 0; first + tasks < p->tasks && p->task_sequence[first + tasks] == n; tasks++)
            of_head += cost(c, first + tasks);
        for (int64_t h = 0; h < H; h++) {
            if (done + of_head <= begin || done >= end) {
                done += of_head;
                continue;
            }
            for (int64_t t = first; t < first + tasks; done += cost(c, t), t++) {
                if (done < begin || done >= end) continue;
                const int64_t g = h / group;
                const int another = n * c->kv_heads + g != current, began = h % group == 0 && t == first;
                current = n * c->kv_heads + g;
                if (TAKES_BF16(c)) {
                    if (another) {
                        write_head(c, &head);
                        head = start_head(c, n, g, first, began, thread);
                    }
                    bf16_backward_block(c, h, t, head.packed, head.sums, work);
                    continue;
                }
                if (another) to = key_gradients(c, n, g, began, thread);
                if (another && c->dmaps) read_key_tokens(c, n, g, key_tokens);
                backward_block(c, h, t, &to, key_tokens, work);
            }
        }
    }
}

/* Add the threads' parts of the gradients of a row of all sequences. */
static void add_parts(const AttentionCall *c, int64_t row, int64_t threads) {
    const Plan *p = &c->plan;
    const int64_t D = c->head_dim, Dv = c->value_dim;
    for (int64_t t = 0; t < threads; t++) {
        const int64_t n = c->part_of[t] / c->kv_heads, g = c->part_of[t] % c->kv_heads;
        if (c->part_of[t] < 0 || row >= p->length[n]) continue;
        const float *part = c->parts + t * part_size(c);
        float *dk = (float *)c->dk + at(c->dk_strides, p->batch[n], g, p->begin[n] + row);
        float *dv = (float *)c->dv + at(c->dv_strides, p->batch[n], g, p->begin[n] + row);
        for (int64_t d = 0; d < D; d++) dk[d] += part[row * D + d];
        for (int64_t d = 0; d < Dv; d++) dv[d] += part[p->longest * D + row * Dv + d];
    }
}

/* The gradients of the key head that a thread started last; later threads may hold parts of them. */
INLINE void write_last_head(const AttentionCall *c, int64_t thread, int64_t threads) {
    const Plan *p = &c->plan;
    const int64_t head = c->part_of[c->threads + thread];
    if (head < 0) return;
    const int64_t n = head / c->kv_heads, first = first_task(p, n);
    const float *parts[threads];
    int64_t count = 0;
    for (int64_t t = 0; t < threads; t++)
        if (c->part_of[t] == head) parts[count++] = sums_of(c, t, 0);
#pragma omp for schedule(static)
    for (int64_t t = first; t < first + (p->length[n] + ROWS - 1) / ROWS; t++)
        bf16_write_key_gradients(c, head % c->kv_heads, t, sums_of(c, thread, 1), parts, count);
}

void molsaki_attention_backward(const AttentionCall *c) {
    const Plan *p = &c->plan;
#pragma omp parallel num_threads((int)c->threads)
    {
        const int64_t threads = omp_get_num_threads();
        if (TAKES_BF16(c)) bf16_begin(c);
        backward_share(c, omp_get_thread_num(), threads);
#pragma omp barrier
        if (TAKES_BF16(c)) {
            for (int64_t t = 0; t < threads; t++) write_last_head(c, t, threads);
            bf16_end(c);
        } else {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < p->longest; row++) add_parts(c, row, threads);
        }
    }
}
