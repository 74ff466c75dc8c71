/* Matrix-vector products for one-token decoding: y[m][o] = sum_i x[m][i] * w[o][i], sums in fp32.
 *
 * Decoding reads every weight once per token, so memory sets the pace; a library's general product spends more time on
 * preparing such a call than on reading. Threads are those of the OpenMP runtime that torch has loaded.
 */
#include <stdint.h>
#include <string.h>

#define SMALL 32768 /* fewer multiplications than this are not worth waking threads for */
#define MAX_ROWS 8

static inline float widen(uint16_t v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

/* Round to nearest even, NaN stays NaN. */
static inline uint16_t narrow(float f) {
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

/* x is fp32 here (the caller widens it: it is tiny and serves every row of w). */
void gemv_bf16(const uint16_t *restrict w, const float *restrict x, uint16_t *restrict y, long rows, long out, long in) {
#pragma omp parallel for schedule(static) if (out * in > SMALL)
    for (long o = 0; o < out; o++) {
        const uint16_t *restrict row = w + o * in;
        for (long m = 0; m < rows; m++) {
            const float *restrict xm = x + m * in;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < in; i++) sum += widen(row[i]) * xm[i];
            y[m * out + o] = narrow(sum);
        }
    }
}

void gemv_f32(const float *restrict w, const float *restrict x, float *restrict y, long rows, long out, long in) {
#pragma omp parallel for schedule(static) if (out * in > SMALL)
    for (long o = 0; o < out; o++) {
        const float *restrict row = w + o * in;
        for (long m = 0; m < rows; m++) {
            const float *restrict xm = x + m * in;
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (long i = 0; i < in; i++) sum += row[i] * xm[i];
            y[m * out + o] = sum;
        }
    }
}
