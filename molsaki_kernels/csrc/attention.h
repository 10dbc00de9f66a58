/* A call of attention with its map, and the blocks that it is divided into. */
#pragma once
#include "plan.h"
#include "simd.h"

#include <float.h>
#include <math.h>

enum { ROWS = TASK_ROWS };

#define HIDDEN -INFINITY /* the score of a key that the row cannot see */
#define FIRST_MAX -FLT_MAX /* the initial maximum */

/* What computes the products of an attention call. Bit u of molsaki_units stands for unit u. */
typedef enum {
    FLOAT32, /* vectors of float32, also for bfloat16 inputs */
    VECTORS_BF16, /* AVX-512 BF16 */
    TILES_BF16 /* AMX */
} Unit;

typedef struct {
    Plan plan;
    int64_t rows, q_heads, kv_heads, head_dim, value_dim, steps, words; /* value_dim: of v, out and dout */
    int64_t causal, window, is_bf16, per_head, threads;
    int64_t unit; /* a Unit, which computes the products */
    int64_t q_strides[3], k_strides[3], v_strides[3], out_strides[3], dout_strides[3];
    int64_t dq_strides[3], dk_strides[3], dv_strides[3];
    double scale, softcap, word_weight; /* softcap 0: no softcap */
    const void *q, *k, *v;
    const float *sinks; /* (q_heads), or NULL */
    void *out;
    float *lse;  /* (B, q_heads, rows) */
    void *work, *packed; /* memory for each thread; for packed keys and values. Sizes: molsaki_attention_memory */
    /* Forward. */
    int64_t groups; /* groups of query heads, each one a unit of work; with per_head, one head per group */
    double *sums; /* per task, from task_slot * groups * columns on: (groups, count, columns) */
    float *maps;
    /* Backward. */
    const void *dout; /* NULL: only the map has a gradient */
    const float *dlse, *dmaps; /* each may be NULL */
    double *delta;    /* (B, q_heads, rows): rowsum(dO * O) - dlse, for the gradient of sinks; NULL without sinks */
    void *dq, *dk, *dv; /* float32; bfloat16 with a unit for it */
    float *parts;     /* per thread: dk and dv of one key head; with such a unit, of two */
    int64_t *part_of; /* per thread: the sequence and key head of its part, n * kv_heads + g, or -1; then, with such a
                         unit, also of the key head that it began last */
} AttentionCall;

/* What molsaki_attention_memory returns: bytes for the fields of these names of a call. */
typedef struct {
    int64_t work, packed, parts;
} AttentionMemory;

INLINE int64_t at(const int64_t *strides, int64_t b, int64_t h, int64_t row) {
    return b * strides[0] + h * strides[1] + row * strides[2];
}

/* Up to TASK_ROWS rows of one head of one sequence. */
typedef struct {
    int64_t n, h, g, task, first, count, length;
    int64_t low, high;               /* the keys that at least one row sees */
    int64_t first_column, columns;   /* the key tokens among them */
    int32_t step[ROWS];              /* -1: in no step */
    float lse[ROWS], delta[ROWS];    /* backward; delta = rowsum(dO * O) - dlse, including the dlse of the map */
} Block;

/* The fields of a block that depend only on the sequence, the head and the task. */
INLINE void find_block(const AttentionCall *c, int64_t h, int64_t task, Block *b) {
    const Plan *p = &c->plan;
    b->n = p->task_sequence[task];
    b->h = h;
    b->g = h / (c->q_heads / c->kv_heads);
    b->task = task;
    b->first = p->task_row[task];
    b->length = p->length[b->n];
    b->count = int_min(ROWS, b->length - b->first);
    b->low = c->window > 0 ? int_max(b->first - c->window + 1, 0) : 0;
    b->high = c->causal ? b->first + b->count : b->length;
    const int32_t *steps = p->step_of_row + b->n * p->longest + b->first;
    for (int r = 0; r < ROWS; r++) b->step[r] = r < b->count ? steps[r] : -1;
    const int32_t *tokens = p->tokens + b->n * p->columns;
    const int64_t used = p->task_count[task] ? p->tokens_used[b->n] : 0; /* without a step the map needs no key token */
    b->first_column = below(tokens, used, b->low);
    b->columns = below(tokens, used, b->high) - b->first_column;
}

INLINE int64_t first_task(const Plan *p, int64_t n) {
    int64_t low = 0, high = p->tasks;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (p->task_sequence[middle] < n) low = middle + 1; else high = middle;
    }
    return low;
}

/* Functions of attention_bf16.c, for the units that take bfloat16. */
#ifdef __AVX512BF16__
#define TAKES_BF16(call) ((call)->unit != FLOAT32)
#else
#define TAKES_BF16(call) 0
#endif
#pragma GCC visibility push(hidden)
int bf16_has_tiles(void); /* and whether the operating system permits their use */
int64_t bf16_work(const AttentionCall *c);
int64_t bf16_packed(const AttentionCall *c, int64_t backward);
int64_t bf16_key_sums(const AttentionCall *c, int64_t tasks); /* numbers for dk and dv of `tasks` tasks of a head */
void bf16_begin(const AttentionCall *c); /* before and after a thread's work */
void bf16_end(const AttentionCall *c);
void bf16_pack(const AttentionCall *c, int64_t g, int64_t task); /* keys and values for the forward */
void bf16_forward_block(const AttentionCall *c, int64_t h, int64_t task, void *work, double *sums);
/* Pack the keys, values and key tokens of a sequence and key head for the backward, into the thread's memory. */
const uint16_t *bf16_pack_head(const AttentionCall *c, int64_t n, int64_t g, int64_t first_task, int64_t thread);
void bf16_backward_block(
    const AttentionCall *c, int64_t h, int64_t task, const uint16_t *packed, float *key_sums, void *work
);
/* Write dk and dv of a task's keys from the sums of its key head and `count` parts of other threads. */
void bf16_write_key_gradients(
    const AttentionCall *c, int64_t g, int64_t task, const float *key_sums, const float *const *parts, int64_t count
);
#pragma GCC visibility pop
