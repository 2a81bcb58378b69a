/* The softmax of rows of bfloat16 and its gradient, in one visit of each row: for a CPU. */

#include <math.h>
#include <stdlib.h>

#include "_bfloat16.h"

/* Rows are widened to a multiple of this, so that vectors hold whole pieces of them. */
#define LANES 16

/* Rows that each step is made of before the next, so that a processor need not wait for a row's sum. */
#define ROWS 4

#define LOG2_E 1.44269504f

/* 1.5 * 2^23: beside it float32 has whole numbers only, which stand in the lowest bits. */
#define WHOLE 12582912.0f

/* 2^x of x <= 0, within 3e-7 of it and never below 2^-100, in steps that all processors have vectors for. */
INLINE float power(float x) {
    x = x < -100.0f ? -100.0f : x;
    float whole = x + WHOLE, part = x - (whole - WHOLE);
    float value = 1.33908634e-3f; /* a Chebyshev interpolation of 2^x in -1/2..1/2 */
    value = value * part + 9.67603192e-3f;
    value = value * part + 5.55035711e-2f;
    value = value * part + 2.40221075e-1f;
    value = value * part + 6.93147188e-1f;
    value = value * part + 1.00000008f;
    return value * float_of((bits_of(whole) + 127) << 23);
}

/* Widens a row; returns its largest score. */
INLINE float take(const uint16_t *restrict scores, const uint16_t *restrict grads, int64_t count,
                  float *restrict score, float *restrict grad) {
    float most = -INFINITY;
#pragma omp simd reduction(max : most)
    for (int64_t i = 0; i < count; ++i) {
        score[i] = widen(scores[i]);
        grad[i] = widen(grads[i]);
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

INLINE void give(uint16_t *restrict scores, uint16_t *restrict grads, int64_t count, const float *restrict score,
                 const float *restrict grad, Sums sums) {
    float scale = 1 / sums.sum, dot = sums.dot * scale;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
        float probability = score[i] * scale;
        scores[i] = narrow(probability);
        grads[i] = narrow(probability * (grad[i] - dot));
    }
}

/* Scores become probabilities, gradients of probabilities those of scores. Returns 0, or 1 where there is no memory. */
int softmax_gradient(uint16_t *scores, uint16_t *grads, int64_t rows, int64_t count, int threads) {
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        int64_t padded = (count + LANES - 1) / LANES * LANES;
        float *score = calloc(2 * ROWS * padded, sizeof *score), *grad = score + ROWS * padded;
        failed = !score;
#pragma omp for schedule(static)
        for (int64_t first = 0; first < rows; first += ROWS) {
            int64_t some = failed ? 0 : rows - first < ROWS ? rows - first : ROWS;
            float most[ROWS];
            Sums sums[ROWS];
            for (int64_t r = 0; r < some; ++r) {
                int64_t at = (first + r) * count;
                most[r] = take(scores + at, grads + at, count, score + r * padded, grad + r * padded);
                for (int64_t i = count; i < padded; ++i) score[r * padded + i] = -INFINITY;
            }
            for (int64_t r = 0; r < some; ++r)
                sums[r] = raise(score + r * padded, grad + r * padded, padded, most[r]);
            for (int64_t r = 0; r < some; ++r) {
                int64_t at = (first + r) * count;
                give(scores + at, grads + at, count, score + r * padded, grad + r * padded, sums[r]);
            }
        }
        free(score);
    }
    return failed;
}
