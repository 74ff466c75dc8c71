/* One-token decoding on a CPU. Every weight is read once per token, so memory sets the pace; a general library spends
 * more time on preparing such small calls than on reading. Each kernel exists for bf16 and fp32 data (T), with sums in
 * fp32. Threads are those of the OpenMP runtime that torch has loaded.
 */
#include "common.h"

#define SMALL 32768 /* fewer multiplications than this are not worth waking threads for */

/* y[m][o] = sum_i x[m][i] * w[o][i]; x is fp32: the caller widens it, it is tiny and serves every row of w. */
#define GEMV(NAME, T, LOAD, STORE)                                                                              \
    void NAME(const T *restrict w, const float *restrict x, T *restrict y, long rows, long out, long in) {      \
        _Pragma("omp parallel for schedule(static) if (out * in > SMALL)") for (long o = 0; o < out; o++) {     \
            const T *restrict row = w + o * in;                                                                 \
            for (long m = 0; m < rows; m++) {                                                                   \
                const float *restrict xm = x + m * in;                                                          \
                float sum = 0.0f;                                                                               \
                _Pragma("omp simd reduction(+ : sum)") for (long i = 0; i < in; i++) sum += LOAD(row[i]) * xm[i]; \
                y[m * out + o] = STORE(sum);                                                                    \
            }                                                                                                   \
        }                                                                                                       \
    }

/* y = x / sqrt(mean(x^2) + eps) * weight, row by row. */
#define RMS_NORM(NAME, T, LOAD, STORE)                                                                          \
    void NAME(const T *restrict x, const T *restrict weight, T *restrict y, long rows, long size, float eps) {  \
        for (long m = 0; m < rows; m++) {                                                                       \
            const T *restrict xm = x + m * size;                                                                \
            float sum = 0.0f;                                                                                   \
            _Pragma("omp simd reduction(+ : sum)") for (long i = 0; i < size; i++) sum += LOAD(xm[i]) * LOAD(xm[i]); \
            float inverse = 1.0f / sqrtf(sum / (float)size + eps);                                              \
            for (long i = 0; i < size; i++) y[m * size + i] = STORE(LOAD(xm[i]) * inverse * LOAD(weight[i]));   \
        }                                                                                                       \
    }

static inline float silu(float v) { return v / (1.0f + expf(-v)); }
static inline float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

/* One head of the recurrence: state (P, N) → next, y[p] = sum_n next[p][n] c[n] + d x[p]. */
static void step_head(const float *restrict state, float *restrict next, const float *restrict x,
                      const float *restrict b, const float *restrict c, float *restrict y, float dt, float decay,
                      float d, long P, long N) {
    for (long p = 0; p < P; p++) {
        const float *restrict s = state + p * N;
        float *restrict t = next + p * N;
        float write = dt * x[p], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (long n = 0; n < N; n++) {
            float v = s[n] * decay + write * b[n];
            t[n] = v;
            sum += v * c[n];
        }
        y[p] = sum + d * x[p];
    }
}

/* The Mamba-2 mixer between its two projections, one token: convolution, recurrence, gate, group norm.
 * projected: (rows, E + channels + H) = z, xBC, dt; conv (rows, channels, K-1) and ssm (rows, H, P, N) are read, their
 * successors written; y (rows, E). channels = E + 2 G N, E = H P. scratch: rows * (channels + E) floats.
 */
#define MAMBA_STEP(NAME, T, LOAD, STORE)                                                                        \
    void NAME(const T *restrict projected, const T *restrict conv, T *restrict conv_next,                       \
              const float *restrict ssm, float *restrict ssm_next, const T *restrict conv_weight,               \
              const T *restrict conv_bias, const float *restrict dt_bias, const float *restrict A_log,          \
              const float *restrict D, const T *restrict norm_weight, T *restrict y, float *restrict scratch,   \
              long rows, long H, long P, long N, long G, long K, float dt_low, float dt_high, float eps) {      \
        long E = H * P, channels = E + 2 * G * N, width = E + channels + H;                                     \
        _Pragma("omp parallel for schedule(static) if (rows > 1)") for (long m = 0; m < rows; m++) {            \
            const T *z = projected + m * width, *in = z + E, *dt_in = in + channels;                            \
            float *mixed = scratch + m * (channels + E), *out = mixed + channels;                               \
            for (long d = 0; d < channels; d++) {                                                               \
                const T *past = conv + (m * channels + d) * (K - 1), *w = conv_weight + d * K;                  \
                T *next = conv_next + (m * channels + d) * (K - 1);                                             \
                float sum = LOAD(conv_bias[d]) + LOAD(in[d]) * LOAD(w[K - 1]);                                  \
                for (long k = 0; k < K - 1; k++) sum += LOAD(past[k]) * LOAD(w[k]);                             \
                for (long k = 0; k + 1 < K - 1; k++) next[k] = past[k + 1];                                     \
                if (K > 1) next[K - 2] = in[d];                                                                 \
                mixed[d] = LOAD(STORE(silu(sum)));                                                              \
            }                                                                                                   \
            _Pragma("omp parallel for schedule(static) if (E * N > SMALL)") for (long h = 0; h < H; h++) {      \
                float dt = softplus(LOAD(dt_in[h]) + dt_bias[h]);                                               \
                dt = dt < dt_low ? dt_low : (dt > dt_high ? dt_high : dt);                                      \
                long g = h / (H / G), cell = (m * H + h) * P * N;                                               \
                step_head(ssm + cell, ssm_next + cell, mixed + h * P, mixed + E + g * N,                        \
                          mixed + E + (G + g) * N, out + h * P, dt, expf(-dt * expf(A_log[h])), D[h], P, N);    \
            }                                                                                                   \
            for (long g = 0; g < G; g++) {                                                                      \
                long size = E / G, begin = g * size;                                                            \
                float sum = 0.0f;                                                                               \
                for (long i = begin; i < begin + size; i++) {                                                   \
                    out[i] = LOAD(STORE(out[i])) * silu(LOAD(z[i]));                                            \
                    sum += out[i] * out[i];                                                                     \
                }                                                                                               \
                float inverse = 1.0f / sqrtf(sum / (float)size + eps);                                          \
                for (long i = begin; i < begin + size; i++)                                                     \
                    y[m * E + i] = STORE(out[i] * inverse * LOAD(norm_weight[i]));                              \
            }                                                                                                   \
        }                                                                                                       \
    }

GEMV(gemv_bf16, bf16, load_bf16, store_bf16)
GEMV(gemv_f32, float, load_f32, store_f32)
RMS_NORM(rms_norm_bf16, bf16, load_bf16, store_bf16)
RMS_NORM(rms_norm_f32, float, load_f32, store_f32)
MAMBA_STEP(mamba_step_bf16, bf16, load_bf16, store_bf16)
MAMBA_STEP(mamba_step_f32, float, load_f32, store_f32)
