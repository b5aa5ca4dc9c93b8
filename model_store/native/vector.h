// Sixteen numbers at a time: loads, stores, and the few functions that an encoder needs.
//
// Compiler vectors rather than intrinsics wherever the compiler does as well: one source serves every
// instruction set. `bf16` is a float's upper half; arithmetic is always in float.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace taskbone {

constexpr int LANES = 16;

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));
typedef uint16_t bf16;

inline floats all(float x) { return floats{} + x; }

inline floats load(const float* from) {
    floats x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline floats load(const bf16* from) {
    halves x;
    std::memcpy(&x, from, sizeof x);
    return reinterpret_cast<floats>(__builtin_convertvector(x, words) << 16);
}

inline void store(float* to, floats x) { std::memcpy(to, &x, sizeof x); }

inline void store(bf16* to, floats x) {
#if defined(__AVX512BF16__)
    const __m256bh y = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(x));
    std::memcpy(to, &y, sizeof y);
#else
    const words bits = reinterpret_cast<words>(x);
    const words rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    const halves y = __builtin_convertvector(rounded, halves);
    std::memcpy(to, &y, sizeof y);
#endif
}

// A NaN in `x` stays one.
inline floats at_least(floats x, float low) {
#if defined(__AVX512F__)
    return (floats)_mm512_max_ps(_mm512_set1_ps(low), (__m512)x);
#else
    return x < low ? all(low) : x;
#endif
}

inline floats at_most(floats x, float high) {
#if defined(__AVX512F__)
    return (floats)_mm512_min_ps(_mm512_set1_ps(high), (__m512)x);
#else
    return x > high ? all(high) : x;
#endif
}

inline floats larger(floats x, floats y) {
#if defined(__AVX512F__)
    return (floats)_mm512_max_ps((__m512)x, (__m512)y);
#else
    return x > y ? x : y;
#endif
}

inline floats smaller(floats x, floats y) { return -larger(-x, -y); }

inline float sum(floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    float total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += x[lane];
    return total;
#endif
}

inline float maximum(floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int lane = 1; lane < LANES; ++lane) most = x[lane] > most ? x[lane] : most;
    return most;
#endif
}

// The nearest whole number, for |x| < 2^22.
inline floats nearest(floats x) {
    const floats magic = all(12582912.0f);
    return (x + magic) - magic;
}

#if defined(__AVX512F__)
// Rounded to the nearest of 0 to 255.
inline void store(uint8_t* to, floats x) {
    const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32((__m512)x), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtusepi32_epi8(whole));
}
#endif

// e^x to about 2e-7 relative: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. Zero below -87.
inline floats exp(floats x) {
    const floats clamped = at_most(at_least(x, -87.3f), 88.3f);
    const floats n = nearest(clamped * 1.44269504f);
    const floats r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
    floats p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const ints exponent = (__builtin_convertvector(n, ints) + 127) << 23;
    const floats y = p * reinterpret_cast<floats>(exponent);
    return x < -87.3f ? all(0.0f) : y;
}

enum Activation : int32_t { NONE = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

// x Phi(x), with erf by Abramowitz and Stegun 7.1.26: to 2e-7.
inline floats gelu(floats x) {
    const floats z = (x < 0.0f ? -x : x) * 0.70710678f;
    const floats t = 1.0f / (1.0f + 0.3275911f * z);
    floats p = all(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    const floats tail = 0.5f * p * t * exp(-z * z);  // of the normal distribution, beyond |x|
    return x * (x < 0.0f ? tail : 1.0f - tail);
}

// The same to 1.3e-4, which is below what bf16 resolves: Phi - 1/2 as an odd polynomial, fitted on
// |x| <= 4 so that it ends at exactly 1/2.
inline floats gelu_rounded(floats x) {
    const floats c = at_most(at_least(x, -4.0f), 4.0f);
    const floats s = c * c;
    floats p = all(-4.4409967868e-10f);
    p = p * s + 5.0921297614e-8f;
    p = p * s - 2.3202989119e-6f;
    p = p * s + 5.7538574559e-5f;
    p = p * s - 8.8384336722e-4f;
    p = p * s + 9.0438926659e-3f;
    p = p * s - 6.5071829327e-2f;
    p = p * s + 3.9819139915e-1f;
    return x * (c * p + 0.5f);
}

inline floats gelu_tanh(floats x) {
    const floats inner = 1.5957691216f * (x + 0.044715f * x * x * x);
    return x / (1.0f + exp(-inner));
}

template <bool ROUNDED>
inline floats activate(floats x, int32_t activation) {
    switch (activation) {
        case GELU: return ROUNDED ? gelu_rounded(x) : gelu(x);
        case GELU_TANH: return gelu_tanh(x);
        case RELU: return at_least(x, 0.0f);
        default: return x;
    }
}

}  // namespace taskbone
