/* What stands between the products of a transformer block, row by row, in float32 from and to float32 or bfloat16: for a
   CPU. `block_rows.py` tells what the arguments are. A function returns 0, or 1 where there is no memory. */

#include <math.h>
#include <stdlib.h>

#include "_power.h"

/* Rows whose sum one thread forms. Sums are added in the order of rows and do not depend on the number of threads. */
#define PART 32

#define PARTS(rows) (((rows) + PART - 1) / PART)
#define END(part, rows) (((part) + 1) * PART < (rows) ? ((part) + 1) * PART : (rows))

static void add_up(float *restrict sums, const float *restrict of_parts, int64_t count, int64_t parts) {
    for (int64_t part = 0; part < parts; ++part)
        for (int64_t i = 0; i < count; ++i) sums[i] += of_parts[part * count + i];
}

/* ---- GELU ---- */

typedef struct {
    float below, density; /* the normal distribution: the share below a number, and the density at it */
} Normal;

/* The share beyond a number is its density times a polynomial in 1 / (1 + 0.3 x), fitted for the least relative error
   in 0..14, 1.5e-7. In float32 a share is within 3e-7 of the exact one. */
INLINE Normal normal(float x) {
    float size = fabsf(x), near = 1 / (1 + 0.3f * size), bell = power(-0.5f * LOG2_E * size * size);
    float value = 3.56748769e-2f;
    value = value * near - 1.57203499e-1f;
    value = value * near + 2.06354196e-1f;
    value = value * near - 5.36842455e-2f;
    value = value * near + 1.28561924e-1f;
    value = value * near + 9.99134088e-2f;
    value = value * near + 1.20753968e-1f;
    value = value * near + 1.19629298e-1f;
    float beyond = bell * near * value;
    /* From there on `power` is 2^-100, which a huge number times it would show. */
    float density = size > 11.7f ? 0 : 0.39894228f * bell;
    return (Normal){x < 0 ? beyond : 1 - beyond, density};
}

INLINE void activate(const void *hidden, const void *bias, void *out, int half, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float x = load(hidden, half, i) + load(bias, half, i);
        store(out, half, i, x * normal(x).below);
    }
}

int gelu_rows(const void *hidden, const void *bias, void *out, int half, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const void *from = place(hidden, half, r * width);
        void *to = place(out, half, r * width);
        if (half)
            activate(from, bias, to, 1, width);
        else
            activate(from, bias, to, 0, width);
    }
    return 0;
}

INLINE void activate_back(void *hidden, const void *bias, void *grad, float *restrict sum, int half, int64_t width) {
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float x = load(hidden, half, i) + load(bias, half, i);
        Normal at = normal(x);
        float slope = load(grad, half, i) * (at.below + x * at.density);
        store(hidden, half, i, x * at.below);
        store(grad, half, i, slope);
        sum[i] += slope;
    }
}

int gelu_rows_gradient(void *hidden, const void *bias, void *grad, float *of_bias, int half, int64_t rows,
                       int64_t width, int threads) {
    float *sums = calloc(PARTS(rows) * width + 1, sizeof *sums);
    if (!sums) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t part = 0; part < PARTS(rows); ++part)
        for (int64_t r = part * PART; r < END(part, rows); ++r) {
            void *row = place(hidden, half, r * width), *upstream = place(grad, half, r * width);
            if (half)
                activate_back(row, bias, upstream, sums + part * width, 1, width);
            else
                activate_back(row, bias, upstream, sums + part * width, 0, width);
        }
    add_up(of_bias, sums, width, PARTS(rows));
    free(sums);
    return 0;
}

/* ---- LayerNorm ---- */

INLINE void normalise(const void *x, const void *gain, const void *shift, float eps, void *out, int half,
                      int64_t width) {
    float sum = 0, squares = 0, share = 1.0f / width;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += load(x, half, i);
    float mean = sum * share;
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < width; ++i) {
        float centred = load(x, half, i) - mean;
        squares += centred * centred;
    }
    float scale = 1 / sqrtf(squares * share + eps);
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float normed = (load(x, half, i) - mean) * scale;
        store(out, half, i, normed * load(gain, half, i) + load(shift, half, i));
    }
}

int norm_rows(const void *x, const void *gain, const void *shift, float eps, void *out, int half, int64_t rows,
              int64_t width, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) {
        const void *from = place(x, half, r * width);
        void *to = place(out, half, r * width);
        if (half)
            normalise(from, gain, shift, eps, to, 1, width);
        else
            normalise(from, gain, shift, eps, to, 0, width);
    }
    return 0;
}

typedef struct {
    float *restrict centred, *restrict grad; /* of one row */
    float *restrict of_gain, *restrict of_shift, *restrict of_added; /* sums over a part */
} Work;

INLINE void norm_back(const void *x, const void *gain, const void *shift, float eps, void *grad, const void *added,
                      void *of_x, const Work work, int half, int adds, int64_t width) {
    float sum = 0, squares = 0, sum_grad = 0, dot = 0, share = 1.0f / width;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) {
        work.centred[i] = load(x, half, i);
        sum += work.centred[i];
    }
    float mean = sum * share;
#pragma omp simd reduction(+ : squares, sum_grad, dot)
    for (int64_t i = 0; i < width; ++i) {
        float centred = work.centred[i] - mean, slope = load(grad, half, i) * load(gain, half, i);
        work.centred[i] = centred;
        work.grad[i] = slope;
        squares += centred * centred;
        sum_grad += slope;
        dot += slope * centred;
    }
    float scale = 1 / sqrtf(squares * share + eps);
    float mean_grad = sum_grad * share, along = dot * scale * share;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
        float normed = work.centred[i] * scale, slope = load(grad, half, i);
        float value = scale * (work.grad[i] - mean_grad - normed * along);
        work.of_gain[i] += slope * normed;
        work.of_shift[i] += slope;
        store(grad, half, i, normed * load(gain, half, i) + load(shift, half, i));
        if (adds) {
            float more = load(added, half, i);
            work.of_added[i] += more;
            value += more;
        }
        store(of_x, half, i, value);
    }
}

int norm_rows_gradient(const void *x, const void *gain, const void *shift, float eps, void *grad, const void *added,
                       void *of_x, float *sums, int half, int64_t rows, int64_t width, int threads) {
    float *of_parts = calloc(PARTS(rows) * 3 * width + 1, sizeof *of_parts);
    if (!of_parts) return 1;
    int failed = 0;
#pragma omp parallel num_threads(threads) reduction(| : failed)
    {
        float *row = malloc(2 * width * sizeof *row);
        failed = !row;
#pragma omp for schedule(static)
        for (int64_t part = 0; part < PARTS(rows); ++part) {
            float *own = of_parts + part * 3 * width;
            Work work = {row, row + width, own, own + width, own + 2 * width};
            for (int64_t r = part * PART; r < (failed ? 0 : END(part, rows)); ++r) {
                const void *from = place(x, half, r * width);
                const void *more = added ? place(added, half, r * width) : 0;
                void *upstream = place(grad, half, r * width), *to = place(of_x, half, r * width);
                if (half && added)
                    norm_back(from, gain, shift, eps, upstream, more, to, work, 1, 1, width);
                else if (half)
                    norm_back(from, gain, shift, eps, upstream, more, to, work, 1, 0, width);
                else if (added)
                    norm_back(from, gain, shift, eps, upstream, more, to, work, 0, 1, width);
                else
                    norm_back(from, gain, shift, eps, upstream, more, to, work, 0, 0, width);
            }
        }
        free(row);
    }
    if (!failed) add_up(sums, of_parts, 3 * width, PARTS(rows));
    free(of_parts);
    return failed;
}
