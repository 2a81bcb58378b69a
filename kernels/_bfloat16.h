/* bfloat16 and float32 for compilers that know float32 alone; loops over them become vector instructions. */

#ifndef BFLOAT16_H
#define BFLOAT16_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

INLINE float float_of(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* A bfloat16 is the upper half of a float32. */
INLINE float widen(uint16_t half) { return float_of((uint32_t)half << 16); }

/* The nearest bfloat16, of two the even one. What is no number stays none if its lower half is 0, as that of all is that
   come of bfloat16 or of arithmetic. */
INLINE uint16_t narrow(float value) {
    uint32_t bits = bits_of(value);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* Of memory that holds float32 or, where it is of halves, bfloat16. */
INLINE float load(const void *numbers, int half, int64_t i) {
    return half ? widen(((const uint16_t *)numbers)[i]) : ((const float *)numbers)[i];
}

INLINE void store(void *numbers, int half, int64_t i, float value) {
    if (half)
        ((uint16_t *)numbers)[i] = narrow(value);
    else
        ((float *)numbers)[i] = value;
}

INLINE void *place(const void *numbers, int half, int64_t i) {
    return (char *)numbers + i * (half ? sizeof(uint16_t) : sizeof(float));
}

#endif
