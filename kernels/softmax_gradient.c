/* The softmax of rows of float32 or bfloat16 and its gradient, in one visit of each row: for a CPU. */

#include <math.h>
#include <stdlib.h>

#include "_power.h"

/* Rows are widened to a multiple of this, so that vectors hold whole pieces of them. */
#define LANES 16

/* Rows that each step is made of before the next, so that a processor need not wait for a row's sum. */
#define ROWS 4

/* Widens a row; returns its largest score. */
INLINE float take(const void *restrict scores, const void *restrict grads, int half, int64_t count,
                  float *restrict score, float *restrict grad) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) {
        score[i] = load(scores, half, i);
        grad[i] = load(grads, half, i);
        most = score[i] > most ? score[i] : most;
    }
    return most;
}

typedef struct {
    float sum, dot;
} Sums;

/* Scores become their powers; returns the sum of these, and of the gradients times them. */
INLINE Sums raise(float *restrict score, const float *restrict grad, int64_t padded, float most) {
    float sum = 0, dot = 0;
#pragma omp simd reduction(+ : sum, dot)
    for (int64_t i = 0; i < padded; ++i) {
        score[i] = power((score[i] - most) * LOG2_E);
        sum += score[i];
        dot += score[i] * grad[i];
    }
    return (Sums){sum, dot};
}

INLINE void give(void *restrict scores, void *restrict grads, int half, int64_t count, const float *restrict score,
                 const float *restrict grad, Sums sums) {
    float scale = 1 / sums.sum, dot = sums.dot * scale;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        float probability = score[i] * scale;
        store(scores, half, i, probability);
        store(grads, half, i, probability * (grad[i] - dot));
    }
}

/* Of no more than `ROWS` rows. */
INLINE void some_rows(void *scores, void *grads, int half, int64_t rows, int64_t count, float *score, float *grad,
                      int64_t padded) {
    float most[ROWS];
    Sums sums[ROWS];
    for (int64_t r = 0; r < rows; ++r) {
        float *own = score + r * padded;
        const void *from = place(scores, half, r * count), *of = place(grads, half, r * count);
        most[r] = take(from, of, half, count, own, grad + r * padded);
        for (int64_t i = count; i < padded; ++i) own[i] = -INFINITY;
    }
    for (int64_t r = 0; r < rows; ++r) sums[r] = raise(score + r * padded, grad + r * padded, padded, most[r]);
    for (int64_t r = 0; r < rows; ++r) {
        void *to = place(scores, half, r * count), *of = place(grads, half, r * count);
        give(to, of, half, count, score + r * padded, grad + r * padded, sums[r]);
    }
}

/* Scores become probabilities, gradients of probabilities those of scores. Returns 0, or 1 where there is no memory. */
int softmax_gradient(void *scores, void *grads, int half, int64_t rows, int64_t count, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int64_t padded = (count + LANES - 1) / LANES * LANES;
        float *score = calloc(2 * ROWS * padded, sizeof *score), *grad = score + ROWS * padded;
        failed = !score;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += ROWS) {
            int64_t some = failed ? 0 : rows - first < ROWS ? rows - first : ROWS;
            void *of = place(scores, half, first * count), *beside = place(grads, half, first * count);
            if (half)
                some_rows(of, beside, 1, some, count, score, grad, padded);
            else
                some_rows(of, beside, 0, some, count, score, grad, padded);
        }
        free(score);
    }
    return failed;
}
