/* AdamW on float32 numbers in two halves, and the norm of their gradient, each in one pass over memory: for a CPU.
   `adamw_halves.py` tells what the arguments are; what it gives as a list is here an array of pointers. */

#include <math.h>
#include <stdlib.h>

#include "_bfloat16.h"

/* Numbers that one thread takes at a time. Where parts begin does not depend on how many threads there are, and so
   neither does a sum. */
#define PART 4096

#define PARTS(count) (((count) + PART - 1) / PART)
#define END(part, count) (((part) + 1) * PART < (count) ? ((part) + 1) * PART : (count))

typedef struct {
    float rate, root, scale, allowed; /* `adamw_factors` */
    float rate1, rate2, eps, decay;
} Step;

INLINE void update(uint16_t *restrict low, int16_t *restrict rest, float *restrict exp_avg, float *restrict exp_avg_sq,
                   const void *restrict gradient, int is_half, const Step step, int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) {
        float slope = load(gradient, is_half, i) * step.scale;
        float mean = exp_avg[i] + (slope - exp_avg[i]) * step.rate1;
        float square = exp_avg_sq[i] + (slope * slope - exp_avg_sq[i]) * step.rate2;
        exp_avg[i] = mean;
        exp_avg_sq[i] = square;
        float direction = mean / (sqrtf(square) * step.root + step.eps);
        float value = float_of(((uint32_t)low[i] << 16) + (uint32_t)(int32_t)rest[i]);
        value -= value * step.decay + direction * step.rate;
        uint32_t bits = bits_of(value);
        rest[i] = (int16_t)bits;
        low[i] = (uint16_t)((bits + 0x8000) >> 16);
    }
}

void adamw_halves(int64_t tensors, const int64_t *counts, const int64_t *begins, uint16_t *const *lows,
                  const void *const *gradients, int is_half, int16_t *rest, float *exp_avg, float *exp_avg_sq,
                  const Step *step, int threads) {
    if (step->allowed == 0) return;
#pragma omp parallel num_threads(threads)
    for (int64_t t = 0; t < tensors; ++t) {
        int64_t at = begins[t];
#pragma omp for schedule(static) nowait
        for (int64_t part = 0; part < PARTS(counts[t]); ++part) {
            int64_t begin = part * PART, end = END(part, counts[t]);
            if (is_half)
                update(lows[t], rest + at, exp_avg + at, exp_avg_sq + at, gradients[t], 1, *step, begin, end);
            else
                update(lows[t], rest + at, exp_avg + at, exp_avg_sq + at, gradients[t], 0, *step, begin, end);
        }
    }
}

INLINE float sum_of_squares(const void *gradient, int is_half, int64_t begin, int64_t end) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
        float slope = load(gradient, is_half, i);
        sum += slope * slope;
    }
    return sum;
}

/* Negative where there is no memory. */
double norm(int64_t tensors, const int64_t *counts, const void *const *gradients, int is_half, int threads) {
    int64_t parts = 0;
    for (int64_t t = 0; t < tensors; ++t) parts += PARTS(counts[t]);
    float *sums = malloc((parts + 1) * sizeof *sums);
    if (!sums) return -1;
#pragma omp parallel num_threads(threads)
    {
        int64_t first = 0;
        for (int64_t t = 0; t < tensors; ++t) {
#pragma omp for schedule(static) nowait
            for (int64_t part = 0; part < PARTS(counts[t]); ++part) {
                int64_t begin = part * PART, end = END(part, counts[t]);
                sums[first + part] = is_half ? sum_of_squares(gradients[t], 1, begin, end)
                                             : sum_of_squares(gradients[t], 0, begin, end);
            }
            first += PARTS(counts[t]);
        }
    }
    double total = 0;
    for (int64_t i = 0; i < parts; ++i) total += sums[i];
    free(sums);
    return sqrt(total);
}
