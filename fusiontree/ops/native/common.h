/* bf16 as 16 bits, widened by a shift and narrowed to the nearest even. */
#ifndef FUSIONTREE_COMMON_H
#define FUSIONTREE_COMMON_H
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float load_bf16(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline bf16 store_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0; /* NaN stays NaN */
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float load_f32(float v) { return v; }
static inline float store_f32(float v) { return v; }

#endif
