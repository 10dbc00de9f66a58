/* The plan of a call: where each sequence is, its key tokens and the step of each of its rows (query positions). */
#pragma once
#include <stdint.h>

#define NEVER INT32_MAX /* the position of a padding token */

enum {
    TASK_ROWS = 192,        /* rows of a task */
    MAP_TILE_ROWS = 24,     /* rows of a tile of the map alone */
    COLUMN_MULTIPLE = 16,   /* the caller pads the lists of key tokens to a multiple of it */
    HEAD_DIM_MULTIPLE = 16, /* the caller refuses, or pads, head dimensions that are no multiple of it */
};
_Static_assert(TASK_ROWS % MAP_TILE_ROWS == 0, "a tile is part of one task");

/* Built by `../_native/plan_arrays.py`. A row is a query position within its sequence. */
typedef struct {
    int64_t sequences;
    int64_t columns; /* key tokens of the longest list, rounded up to a COLUMN_MULTIPLE */
    int64_t longest; /* rows of the longest sequence */
    int64_t tasks;
    const int64_t *batch, *begin, *length, *tokens_used; /* (sequences): batch index, first row, rows, key tokens */
    const int32_t *tokens, *word_of_token;               /* (sequences, columns) */
    const int32_t *step_of_row;                          /* (sequences, longest); -1: in no step */
    /* Task t covers the rows [row, row + TASK_ROWS) of a sequence. They belong to `count` steps from step `first` on.
     * `slot` is the number of steps of all earlier tasks. Each is (tasks). */
    const int64_t *task_sequence, *task_row, *task_first, *task_count, *task_slot;
} Plan;

/* The number of tokens below `bound`, of n ascending tokens. */
static inline int64_t below(const int32_t *tokens, int64_t n, int64_t bound) {
    int64_t low = 0, high = n;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (tokens[middle] < bound) low = middle + 1; else high = middle;
    }
    return low;
}

