/* Powers of 2 and of e in float32, in steps that all processors have vectors for. */

#include "_bfloat16.h"

#define LOG2_E 1.44269504f

/* 1.5 * 2^23: beside it float32 has whole numbers only, which stand in the lowest bits. */
#define WHOLE 12582912.0f

/* 2^x of x <= 0, within 1e-7 of it and never below 2^-100. */
INLINE float power(float x) {
    x = x < -100.0f ? -100.0f : x;
    float whole = x + WHOLE, part = x - (whole - WHOLE);
    float value = 1.54614447e-4f; /* a Chebyshev interpolation of 2^x in -1/2..1/2 */
    value = value * part + 1.34004282e-3f;
    value = value * part + 9.61805668e-3f;
    value = value * part + 5.55032723e-2f;
    value = value * part + 2.40226509e-1f;
    value = value * part + 6.93147207e-1f;
    value = value * part + 1.0f;
    return value * float_of((bits_of(whole) + 127) << 23);
}
