/* The stepwise map on a CPU from q, k and lse, forward and backward, for attention engines that compute no map.
 *
 * The equations are those of ../attention_map/torch.py, tiled for the registers and caches of one core. ROWS rows of
 * q are copied to the first-level cache as float32. Their scores with the packed key tokens are computed in registers,
 * turned into weights, and summed over the rows of a step (forward) or multiplied by dA (backward). A tile of dS stays
 * in the cache for the products that follow. Nothing of size M x C reaches memory.
 *
 * Deterministic: the rows of a task and the order of its sums depend only on the shapes, the plan and the number of
 * threads.
 */
#include "layout.h"
#include "plan.h"
#include "simd.h"

enum {
    ROWS = MAP_TILE_ROWS,       /* rows of q per tile */
    STRIDE = MAX_HEAD_DIM + 16, /* of the copied rows; an odd number of cache lines */
    COLUMNS = 256,              /* columns of a tile of dS */
    TILE = COLUMNS + 16,
    TERMS = 32 /* products per partial sum of a score: partial sums halve the rounding error of wide heads */
};

typedef struct {
    Plan plan;
    int64_t q_heads, kv_heads, head_dim, steps, words;
    int64_t causal, window, is_bf16, per_head, threads, chunk_rows, chunks;
    int64_t q_strides[3], k_strides[3], dq_strides[3], dk_strides[3], lse_strides[2];
    double scale, word_weight;
    const void *q, *k;
    const float *lse;
    /* Forward. */
    double *sums;  /* per task, from task_slot * heads out * columns on: (heads out, count, columns) */
    float *packed; /* (sequences, kv_heads, head_dim x columns): scaled key tokens in panels of one or two vectors */
    float *maps;
    /* Backward. */
    const float *dmaps;
    float *upstream; /* (sequences, heads in, steps, columns): weighted dA of the word of each key token */
    float *keys;     /* (sequences, kv_heads, columns, head_dim): scaled key tokens */
    float *dk_parts; /* (sequences, q_heads, chunks, columns, head_dim) */
    float *dk_tokens; /* (sequences, kv_heads, columns, head_dim) */
    float *kept;     /* (sequences, q_heads, longest, head_dim): dq of the first phase; NULL: computed again */
    float *dlse;     /* (B, q_heads, M), filled with zeros by the caller */
    void *dq, *dk;
} MapCall;

#define F(field) FIELD(MapCall, field)
const Layout molsaki_layout_MapCall[] = {
    WHOLE(MapCall),
    F(plan), F(q_heads), F(kv_heads), F(head_dim), F(steps), F(words), F(causal), F(window), F(is_bf16), F(per_head),
    F(threads), F(chunk_rows), F(chunks), F(q_strides), F(k_strides), F(dq_strides), F(dk_strides), F(lse_strides),
    F(scale), F(word_weight), F(q), F(k), F(lse), F(sums), F(packed), F(maps), F(dmaps), F(upstream), F(keys),
    F(dk_parts), F(dk_tokens), F(kept), F(dlse), F(dq), F(dk),
    END,
};
#undef F

/* Rows of one sequence and head, in the first-level cache. Missing rows and rows in no step are zeros with lse 0, so
 * that their weights are finite. */
typedef struct {
    float q[ROWS][STRIDE] __attribute__((aligned(64)));
    float lse[ROWS];
    int32_t step[ROWS]; /* -1: in no step */
    int64_t first, count;
    int64_t low, high; /* the columns that at least one row may see; low is a multiple of two vectors */
} Rows;

/* Find the steps and the columns of the rows [first, min(first + ROWS, stop)). Returns 0 if no row is in a step, or no
 * row sees a key token. */
static int find_rows(const MapCall *c, int64_t n, int64_t first, int64_t stop, Rows *rows) {
    const int32_t *steps = c->plan.step_of_row + n * c->plan.longest + first;
    const int32_t *tokens = c->plan.tokens + n * c->plan.columns;
    rows->first = first;
    rows->count = int_min(ROWS, stop - first);
    int any = 0;
    for (int r = 0; r < ROWS; r++) {
        rows->step[r] = r < rows->count ? steps[r] : -1;
        any |= rows->step[r] >= 0;
    }
    rows->low = 0;
    rows->high = c->plan.tokens_used[n];
    if (c->causal) rows->high = below(tokens, rows->high, first + rows->count);
    if (c->window > 0) rows->low = below(tokens, rows->high, first - c->window + 1) / (2 * LANES) * (2 * LANES);
    return any && rows->low < rows->high;
}

static void load_rows(const MapCall *c, int64_t n, int64_t h, int64_t stop, Rows *rows) {
    const int64_t D = c->head_dim, first = rows->first, row = c->plan.begin[n] + first, width = c->is_bf16 ? 2 : 4;
    const int64_t offset = c->plan.batch[n] * c->q_strides[0] + h * c->q_strides[1] + row * c->q_strides[2];
    const float *lse = c->lse + c->plan.batch[n] * c->lse_strides[0] + h * c->lse_strides[1] + row;
    const char *start = (const char *)c->q + offset * width, *next = start + ROWS * c->q_strides[2] * width;
    for (int r = 0; r < ROWS; r++) {
        if (first + ROWS + r < stop)
            for (int64_t x = 0; x < D * width; x += 64) __builtin_prefetch(next + r * c->q_strides[2] * width + x);
        if (rows->step[r] < 0) {
            memset(rows->q[r], 0, D * sizeof(float));
            rows->lse[r] = 0;
            continue;
        }
        rows->lse[r] = lse[r];
        const char *q = start + r * c->q_strides[2] * width;
        read_row(q, 0, c->is_bf16, D, rows->q[r]);
    }
}

/* Copy the scaled key tokens of a sequence and key head into panels of (head_dim, two vectors of columns); the
 * last panel may have one vector. For the backward copy them also as rows. Padding is zero. */
static void pack_keys(const MapCall *c, int64_t n, int64_t g) {
    const int64_t D = c->head_dim, C = c->plan.columns, used = c->plan.tokens_used[n];
    const int32_t *tokens = c->plan.tokens + n * C;
    float *packed = c->packed + (n * c->kv_heads + g) * D * C;
    float *keys = c->keys ? c->keys + (n * c->kv_heads + g) * D * C : 0;
    float row[MAX_HEAD_DIM];
    for (int64_t j = 0; j < C; j++) {
        if (j < used) {
            const int64_t token = c->plan.begin[n] + tokens[j];
            const int64_t offset = c->plan.batch[n] * c->k_strides[0] + g * c->k_strides[1] + token * c->k_strides[2];
            read_row(c->k, offset, c->is_bf16, D, row);
            for (int64_t d = 0; d < D; d++) row[d] *= (float)c->scale;
        } else {
            memset(row, 0, D * sizeof(float));
        }
        if (keys) memcpy(keys + j * D, row, D * sizeof(float));
        const int64_t panel = j / (2 * LANES) * (2 * LANES), width = int_min(2 * LANES, C - panel);
        float *column = packed + panel * D + (j - panel);
        for (int64_t d = 0; d < D; d++) column[d * width] = row[d];
    }
}

/* The width of a panel in vectors. */
INLINE int64_t wide(const MapCall *c, int64_t column) { return int_min(2 * LANES, c->plan.columns - column) / LANES; }

/* The weights of STRIP rows from r on and `vectors` vectors of columns from `column` on, which begin a panel of `wide`
 * vectors. Masked weights are 0. */
INLINE void weights(
    const MapCall *c, const Rows *rows, const float *packed, const int32_t *tokens, int r, int64_t column, int vectors,
    int64_t wide, vf p[STRIP][2]
) {
    const int64_t D = c->head_dim;
    const float *q = rows->q[r], *panel = packed + column * D;
    vf score[STRIP][2];
    UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < vectors; v++) p[i][v] = (vf){0};
    for (int64_t begin = 0; begin < D; begin += TERMS) {
        UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < vectors; v++) score[i][v] = (vf){0};
        for (int64_t d = begin; d < int_min(begin + TERMS, D); d++) {
            vf key[2];
            UNROLL for (int v = 0; v < vectors; v++) key[v] = load(panel + (d * wide + v) * LANES);
            UNROLL for (int i = 0; i < STRIP; i++)
                UNROLL for (int v = 0; v < vectors; v++) score[i][v] += q[i * STRIDE + d] * key[v];
        }
        UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < vectors; v++) p[i][v] += score[i][v];
    }
    UNROLL for (int i = 0; i < STRIP; i++)
        UNROLL for (int v = 0; v < vectors; v++)
            p[i][v] = exponential(clamp(p[i][v] - rows->lse[r + i], -80.0f, 80.0f));
    const int64_t first = rows->first + r, last = first + STRIP - 1, end = column + vectors * LANES;
    const int64_t bound = c->causal ? first : NEVER - 1;
    if (tokens[end - 1] <= bound && (c->window <= 0 || tokens[column] > last - c->window)) return;
    UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < vectors; v++) {
        const vi token = *(const vi_any *)(tokens + column + v * LANES);
        vi visible = token <= (int32_t)(c->causal ? first + i : NEVER - 1);
        if (c->window > 0) visible &= token > (int32_t)(first + i - c->window);
        p[i][v] = (vf)((vi)p[i][v] & visible);
    }
}

INLINE void add_wide(double *sums, vf p) {
    float part[LANES];
    store(part, p);
    for (int i = 0; i < LANES; i++) sums[i] += part[i];
}

/* Add the weights of a tile to the sums of their rows' steps. */
INLINE void sum_tile(
    const MapCall *c, const Rows *rows, const float *packed, const int32_t *tokens, int r, int64_t column, int vectors,
    int64_t wide, int64_t first_step, double *sums
) {
    vf p[STRIP][2];
    weights(c, rows, packed, tokens, r, column, vectors, wide, p);
    const int32_t step = rows->step[r];
    int same = step >= 0;
    for (int i = 1; i < STRIP; i++) same &= rows->step[r + i] == step;
    if (same) {
        UNROLL for (int v = 0; v < vectors; v++) {
            vf sum = p[0][v];
            UNROLL for (int i = 1; i < STRIP; i++) sum += p[i][v];
            add_wide(sums + (step - first_step) * c->plan.columns + column + v * LANES, sum);
        }
        return;
    }
    UNROLL for (int i = 0; i < STRIP; i++)
        if (rows->step[r + i] >= 0)
            for (int v = 0; v < vectors; v++)
                add_wide(sums + (rows->step[r + i] - first_step) * c->plan.columns + column + v * LANES, p[i][v]);
}

static void forward_task(const MapCall *c, int64_t t) {
    const int64_t n = c->plan.task_sequence[t], C = c->plan.columns, count = c->plan.task_count[t];
    const int64_t stop = int_min(c->plan.task_row[t] + TASK_ROWS, c->plan.length[n]);
    const int64_t group = c->q_heads / c->kv_heads, heads_out = c->per_head ? c->q_heads : 1;
    const int32_t *tokens = c->plan.tokens + n * C;
    double *sums = c->sums + c->plan.task_slot[t] * heads_out * C;
    memset(sums, 0, heads_out * count * C * sizeof(double));
    if (count == 0) return;
    Rows rows;
    for (int64_t h = 0; h < c->q_heads; h++) {
        const float *packed = c->packed + (n * c->kv_heads + h / group) * c->head_dim * C;
        double *own = sums + (c->per_head ? h * count * C : 0);
        for (int64_t first = c->plan.task_row[t]; first < stop; first += ROWS) {
            if (!find_rows(c, n, first, stop, &rows)) continue;
            load_rows(c, n, h, stop, &rows);
            int64_t column = rows.low;
            for (; column + LANES < rows.high; column += 2 * LANES)
                for (int r = 0; r < rows.count; r += STRIP)
                    sum_tile(c, &rows, packed, tokens, r, column, 2, 2, c->plan.task_first[t], own);
            if (column < rows.high)
                for (int r = 0; r < rows.count; r += STRIP)
                    sum_tile(c, &rows, packed, tokens, r, column, 1, wide(c, column), c->plan.task_first[t], own);
        }
    }
}

/* The map of a sequence: the sum over its tasks, then over the tokens of each word. */
static void reduce_map(const MapCall *c, int64_t n) {
    const int64_t C = c->plan.columns, heads_out = c->per_head ? c->q_heads : 1;
    const int32_t *word = c->plan.word_of_token + n * C;
    memset(c->maps + n * heads_out * c->steps * c->words, 0, heads_out * c->steps * c->words * sizeof(float));
    int64_t begin = 0, end;
    while (begin < c->plan.tasks && c->plan.task_sequence[begin] < n) begin++;
    for (end = begin; end < c->plan.tasks && c->plan.task_sequence[end] == n; end++) {}
    for (int64_t h = 0; h < heads_out; h++) {
        int64_t from = begin;
        for (int64_t s = 0; s < c->steps; s++) {
            while (from < end && c->plan.task_first[from] + c->plan.task_count[from] <= s) from++; /* steps ascend */
            float *map = c->maps + ((n * heads_out + h) * c->steps + s) * c->words;
            for (int64_t j = 0; j < c->plan.tokens_used[n]; j++) {
                double sum = 0;
                for (int64_t t = from; t < end && (c->plan.task_count[t] == 0 || c->plan.task_first[t] <= s); t++) {
                    const int64_t local = s - c->plan.task_first[t], count = c->plan.task_count[t];
                    if (local < count) sum += c->sums[((c->plan.task_slot[t] * heads_out) + h * count + local) * C + j];
                }
                map[word[j]] += (float)(sum * c->word_weight);
            }
        }
    }
}

void molsaki_map_forward(const MapCall *c) {
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < c->plan.sequences; n++)
            for (int64_t g = 0; g < c->kv_heads; g++) pack_keys(c, n, g);
#pragma omp for schedule(dynamic)
        for (int64_t t = 0; t < c->plan.tasks; t++) forward_task(c, t);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < c->plan.sequences; n++) reduce_map(c, n);
    }
}

/* Copy the weighted dA of each word to its key tokens; zero for padding. */
static void spread_upstream(const MapCall *c, int64_t n) {
    const int64_t C = c->plan.columns, heads_in = c->per_head ? c->q_heads : 1;
    const int32_t *word = c->plan.word_of_token + n * C;
    for (int64_t row = n * heads_in * c->steps; row < (n + 1) * heads_in * c->steps; row++)
        for (int64_t j = 0; j < C; j++)
            c->upstream[row * C + j] =
                j < c->plan.tokens_used[n] ? c->dmaps[row * c->words + word[j]] * (float)c->word_weight : 0;
}

static const float no_upstream[COLUMNS];

/* dS of STRIP rows and one or two vectors of columns, into the tile; its sums over columns are added to `sums`. */
INLINE void dscores_tile(
    const MapCall *c, const Rows *rows, const float *packed, const int32_t *tokens, const float *const *upstream, int r,
    int64_t column, int vectors, int64_t wide, int64_t origin, float (*tile)[TILE], vf *sums
) {
    vf p[STRIP][2];
    weights(c, rows, packed, tokens, r, column, vectors, wide, p);
    UNROLL for (int i = 0; i < STRIP; i++) UNROLL for (int v = 0; v < vectors; v++) {
        const vf ds = p[i][v] * load(upstream[r + i] + column - origin + v * LANES);
        store(&tile[r + i][column - origin + v * LANES], ds);
        sums[r + i] += ds;
    }
}

/* dS of the rows and the columns [origin, stop), into the tile. */
static void dscores(
    const MapCall *c, const Rows *rows, int64_t n, int64_t h, int64_t origin, int64_t stop, float (*tile)[TILE],
    vf *sums
) {
    const int64_t C = c->plan.columns, group = c->q_heads / c->kv_heads;
    const int32_t *tokens = c->plan.tokens + n * C;
    const float *packed = c->packed + (n * c->kv_heads + h / group) * c->head_dim * C;
    const float *all = c->upstream + (c->per_head ? n * c->q_heads + h : n) * c->steps * C + origin;
    const float *upstream[ROWS];
    for (int r = 0; r < ROWS; r++) upstream[r] = rows->step[r] < 0 ? no_upstream : all + rows->step[r] * C;
    int64_t column = origin;
    for (; column + LANES < stop; column += 2 * LANES)
        for (int r = 0; r < rows->count; r += STRIP)
            dscores_tile(c, rows, packed, tokens, upstream, r, column, 2, 2, origin, tile, sums);
    if (column < stop)
        for (int r = 0; r < rows->count; r += STRIP)
            dscores_tile(c, rows, packed, tokens, upstream, r, column, 1, wide(c, column), origin, tile, sums);
}

/* Add the columns [origin, stop) of the tile to dq of the rows. */
static void add_dq_of_tile(
    const MapCall *c, const float (*tile)[TILE], int64_t n, int64_t h, int64_t count, int64_t origin, int64_t stop,
    float (*dq)[STRIDE]
) {
    const int64_t D = c->head_dim, group = c->q_heads / c->kv_heads;
    const float *keys = c->keys + ((n * c->kv_heads + h / group) * c->plan.columns + origin) * D;
    for (int r = 0; r < count; r += GROUP)
        accumulate(tile[r], TILE, 1, keys, D, stop - origin, D, dq[r], STRIDE, GROUP);
}

/* First phase, one chunk of one head's rows: dlse, dk of the key tokens and, if it is kept, dq. */
static void backward_task(const MapCall *c, int64_t n, int64_t h, int64_t chunk) {
    const int64_t D = c->head_dim, C = c->plan.columns;
    const int64_t stop = int_min((chunk + 1) * c->chunk_rows, c->plan.length[n]);
    float *part = c->dk_parts + ((n * c->q_heads + h) * c->chunks + chunk) * C * D;
    float *dlse = c->dlse + c->plan.batch[n] * c->lse_strides[0] + h * c->lse_strides[1] + c->plan.begin[n];
    memset(part, 0, c->plan.tokens_used[n] * D * sizeof(float));
    Rows rows;
    float tile[ROWS][TILE] __attribute__((aligned(64)));
    float dq[ROWS][STRIDE] __attribute__((aligned(64)));
    for (int64_t first = chunk * c->chunk_rows; first < stop; first += ROWS) {
        if (!find_rows(c, n, first, stop, &rows)) continue;
        load_rows(c, n, h, stop, &rows);
        vf sums[ROWS];
        for (int r = 0; r < ROWS; r++) sums[r] = (vf){0};
        if (c->kept) memset(dq, 0, sizeof dq);
        for (int64_t origin = rows.low; origin < rows.high; origin += COLUMNS) {
            const int64_t end = int_min(origin + COLUMNS, rows.high);
            dscores(c, &rows, n, h, origin, end, tile, sums);
            for (int64_t j = origin; j < end; j += GROUP)
                accumulate(&tile[0][j - origin], 1, TILE, rows.q[0], STRIDE, rows.count, D, part + j * D, D, end - j);
            if (c->kept) add_dq_of_tile(c, (const float(*)[TILE])tile, n, h, rows.count, origin, end, dq);
        }
        for (int r = 0; r < rows.count; r++) {
            if (rows.step[r] >= 0)
                dlse[first + r] = -sum_of(sums[r]);
            if (c->kept)
                memcpy(c->kept + ((n * c->q_heads + h) * c->plan.longest + first + r) * D, dq[r], D * sizeof(float));
        }
    }
}

/* dk of the key tokens: the scaled sum over the chunks of all query heads of the group. */
static void reduce_dk(const MapCall *c, int64_t n, int64_t g) {
    const int64_t D = c->head_dim, C = c->plan.columns, group = c->q_heads / c->kv_heads;
    const float *parts = c->dk_parts + (n * c->kv_heads + g) * group * c->chunks * C * D;
    float *dk = c->dk_tokens + (n * c->kv_heads + g) * C * D;
    const int64_t size = c->plan.tokens_used[n] * D;
    memcpy(dk, parts, size * sizeof(float));
    for (int64_t i = 1; i < group * c->chunks; i++)
        for (int64_t x = 0; x < size; x++) dk[x] += parts[i * C * D + x];
    for (int64_t x = 0; x < size; x++) dk[x] *= (float)c->scale;
}

void molsaki_map_dlse(const MapCall *c) {
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for collapse(2) schedule(static) nowait
        for (int64_t n = 0; n < c->plan.sequences; n++)
            for (int64_t g = 0; g < c->kv_heads; g++) pack_keys(c, n, g);
#pragma omp for schedule(static)
        for (int64_t n = 0; n < c->plan.sequences; n++) spread_upstream(c, n);
#pragma omp for collapse(3) schedule(dynamic)
        for (int64_t n = 0; n < c->plan.sequences; n++)
            for (int64_t h = 0; h < c->q_heads; h++)
                for (int64_t chunk = 0; chunk < c->chunks; chunk++) backward_task(c, n, h, chunk);
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < c->plan.sequences; n++)
            for (int64_t g = 0; g < c->kv_heads; g++) reduce_dk(c, n, g);
    }
}

INLINE void add_row(void *target, int64_t offset, const float *row, int64_t D, int64_t is_bf16) {
    if (is_bf16) {
        uint16_t *x = (uint16_t *)target + offset;
        for (int64_t d = 0; d < D; d++) x[d] = to_bf16(from_bf16(x[d]) + row[d]);
    } else {
        float *x = (float *)target + offset;
        for (int64_t d = 0; d < D; d++) x[d] += row[d];
    }
}

/* Second phase: dq of ROWS rows of all heads. In the layout (B, M, H, D) the heads of a row are contiguous. */
static void add_dq(const MapCall *c, int64_t n, int64_t first) {
    const int64_t D = c->head_dim;
    Rows rows;
    if (!find_rows(c, n, first, int_min(first + ROWS, c->plan.length[n]), &rows)) return;
    float tile[ROWS][TILE] __attribute__((aligned(64)));
    float dq[ROWS][STRIDE] __attribute__((aligned(64)));
    vf unused[ROWS];
    for (int r = 0; r < ROWS; r++) unused[r] = (vf){0};
    for (int64_t h = 0; h < c->q_heads; h++) {
        if (!c->kept) {
            load_rows(c, n, h, first + ROWS, &rows);
            memset(dq, 0, sizeof dq);
            for (int64_t origin = rows.low; origin < rows.high; origin += COLUMNS) {
                const int64_t end = int_min(origin + COLUMNS, rows.high);
                dscores(c, &rows, n, h, origin, end, tile, unused);
                add_dq_of_tile(c, (const float(*)[TILE])tile, n, h, rows.count, origin, end, dq);
            }
        }
        const float *kept = c->kept ? c->kept + ((n * c->q_heads + h) * c->plan.longest + first) * D : dq[0];
        const int64_t stride = c->kept ? D : STRIDE;
        const int64_t row = c->plan.begin[n] + first;
        const int64_t offset = c->plan.batch[n] * c->dq_strides[0] + h * c->dq_strides[1] + row * c->dq_strides[2];
        for (int r = 0; r < rows.count; r++)
            if (rows.step[r] >= 0) add_row(c->dq, offset + r * c->dq_strides[2], kept + r * stride, D, c->is_bf16);
    }
}

void molsaki_map_add(const MapCall *c) {
    const int64_t D = c->head_dim, C = c->plan.columns;
#pragma omp parallel num_threads((int)c->threads)
    {
#pragma omp for collapse(2) schedule(dynamic) nowait
        for (int64_t n = 0; n < c->plan.sequences; n++)
            for (int64_t first = 0; first < c->plan.longest; first += ROWS)
                if (first < c->plan.length[n]) add_dq(c, n, first);
#pragma omp for collapse(2) schedule(static)
        for (int64_t n = 0; n < c->plan.sequences; n++)
            for (int64_t g = 0; g < c->kv_heads; g++)
                for (int64_t j = 0; j < c->plan.tokens_used[n]; j++) { /* each token is in one word */
                    const int64_t row = c->plan.begin[n] + c->plan.tokens[n * C + j], b = c->plan.batch[n];
                    const int64_t offset = b * c->dk_strides[0] + g * c->dk_strides[1] + row * c->dk_strides[2];
                    add_row(c->dk, offset, c->dk_tokens + ((n * c->kv_heads + g) * C + j) * D, D, c->is_bf16);
                }
    }
}
