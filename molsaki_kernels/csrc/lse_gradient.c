/* O' = O - dlse / |dO|^2 dO in one float32 pass, which adds the gradient of lse to a backward that ignores it. The
 * equation is explained in ../attention/lse_gradient.py. */
#include "layout.h"
#include "plan.h"

typedef struct {
    int64_t batches, heads, rows, head_dim, threads;
    int64_t out_strides[3], dout_strides[3], folded_strides[3], dlse_strides[3];
    float vanished; /* |dO|^2 below this counts as zero */
    const float *out, *dout;
    float *folded;
    const float *dlse;
} LseGradientCall;

#define F(field) FIELD(LseGradientCall, field)
const Layout molsaki_layout_LseGradientCall[] = {
    WHOLE(LseGradientCall),
    F(batches), F(heads), F(rows), F(head_dim), F(threads), F(out_strides), F(dout_strides), F(folded_strides),
    F(dlse_strides), F(vanished), F(out), F(dout), F(folded), F(dlse),
    END,
};
#undef F

enum { ROWS = 32, LANES = 16 };
_Static_assert(HEAD_DIM_MULTIPLE % LANES == 0, "rows are whole vectors");
typedef float vf __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

/* head_dim is a HEAD_DIM_MULTIPLE. Returns nonzero if dO vanishes in a row; the result is then not usable. */
int64_t molsaki_lse_gradient(const LseGradientCall *c) {
    int64_t vanished = 0;
    const int64_t blocks = (c->rows + ROWS - 1) / ROWS;
#pragma omp parallel for collapse(2) schedule(static) num_threads((int)c->threads) reduction(| : vanished)
    for (int64_t b = 0; b < c->batches; b++)
        for (int64_t block = 0; block < blocks; block++)
            for (int64_t h = 0; h < c->heads; h++)
                for (int64_t i = block * ROWS; i < (block + 1) * ROWS && i < c->rows; i++) {
#define ROW(x) (c->x + b * c->x##_strides[0] + h * c->x##_strides[1] + i * c->x##_strides[2])
                    const float *out = ROW(out), *dout = ROW(dout);
                    float *folded = ROW(folded), lanes[LANES];
                    vf squares = {0};
                    for (int64_t d = 0; d < c->head_dim; d += LANES) {
                        const vf x = *(const vf *)(dout + d);
                        squares += x * x;
                    }
                    *(vf *)lanes = squares;
                    for (int half = LANES / 2; half > 0; half /= 2)
                        for (int l = 0; l < half; l++) lanes[l] += lanes[l + half];
                    vanished |= !(lanes[0] >= c->vanished);
                    const float step = *ROW(dlse) / lanes[0];
                    for (int64_t d = 0; d < c->head_dim; d += LANES)
                        *(vf *)(folded + d) = *(const vf *)(out + d) - step * *(const vf *)(dout + d);
                }
    return vanished;
}
