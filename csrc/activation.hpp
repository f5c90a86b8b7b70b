// tanh and sigmoid of a register of values. tanh of 16 floats is in pieces.hpp; what follows is of all others.
//
// Both rest on exp(r) = (a + b) / (a - b), with b / a = tanh(r / 2) an odd rational function of the small r that is
// left of the argument after n ln2 is taken out. exp's own division goes into the one that sigmoid and tanh need
// anyway, and half the degree of a polynomial is enough.
//
// a and b are our own minimax fits: a Remez exchange in 50 digits of tanh(v) = v B(v^2) / A(v^2) with A(0) = B(0), for
// the relative error, on |v| <= 1.0001 ln2 / 4. With the coefficients rounded it is at most 1e-9 for float (A and B of
// degree 1 in v^2) and 7e-18 for double (degree 2).
//
// Largest errors measured, in ulp:
//                      with fused multiply-add   without
//     sigmoid, float   2.46                      2.67      all 2^32 values, against the double version
//     tanh, float      2.83                      3.24      the same; by tables: 1.76
//     sigmoid, double  2.43                      2.64      54 million values: uniform, log-spaced, random bits and
//     tanh, double     3.28                      3.50      around the changes of n, against 80-bit arithmetic
//
// Results below the smallest normal number may be zero. tanh(+-0) = +-0, tanh(x) = x within the bound for tiny x
// (subnormals too), tanh(+-inf) = +-1, sigmoid(-inf) = 0, sigmoid(inf) = 1, NaN gives NaN, and no result leaves [-1, 1]
// or [0, 1].
#pragma once

#include "simd.hpp"

#if BPTT_BYTES == 16 && defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace bptt::BPTT_VARIANT {

template <class T> struct Bits {
    typedef typename Types<T>::UInt UInts __attribute__((vector_size(BPTT_BYTES)));
};

template <class T> using UInts = typename Bits<T>::UInts;

// round: adding it to a smaller number rounds that to an integer, which the sum then has in its lowest bits.
// ln2Hi has so few digits that n ln2Hi is exact for every n. The bounds are those beyond which results are constant;
// at sigmoid's lower one n is 128 (1024), whose 2^n is infinity in these bits and makes the result 0.
// tanh's A and B are scaled for B to have the leading coefficient 1, a sum in place of a product. sigmoid's are those
// of r = 2 v, and cannot be scaled so: 2^n (a - b) would overflow too early.
template <class T> struct Activation;

template <> struct Activation<float> {
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float round = 0x1.8p23f, log2e = 0x1.715476p0f, halfLn2 = 0x1.62e430p-2f;
    static constexpr float ln2Hi = 0x1.62e4p-1f, ln2Lo = 1.4286068e-06f;
    static constexpr float sigmoidLow = -88.6f, sigmoidHigh = 30, tanhHigh = 10;

    static BPTT_INLINE Vec<float> sigmoidA(Vec<float> u) { return 2.0f + u * 0.19996013f; }
    static BPTT_INLINE Vec<float> sigmoidB(Vec<float> u) { return 1.0f + u * 0.016646793f; }
    static BPTT_INLINE Vec<float> tanhA(Vec<float> u) { return 15.017907f + u * 6.005965f; }
    static BPTT_INLINE Vec<float> tanhB(Vec<float> u) { return 15.017907f + u; }
};

template <> struct Activation<double> {
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double round = 0x1.8p52, log2e = 0x1.71547652b82fep0, halfLn2 = 0x1.62e42fefa39efp-2;
    static constexpr double ln2Hi = 0x1.62e42fefa4p-1, ln2Lo = -1.7239444525614835e-13;
    static constexpr double sigmoidLow = -709.6, sigmoidHigh = 40, tanhHigh = 20;

    static BPTT_INLINE Vec<double> sigmoidA(Vec<double> u) {
        return 2.0 + u * (0.22221635695841913 + u * 0.001983540528363552);
    }
    static BPTT_INLINE Vec<double> sigmoidB(Vec<double> u) {
        return 1.0 + u * (0.027774845145877664 + u * 6.608872413113507e-05);
    }
    static BPTT_INLINE Vec<double> tanhA(Vec<double> u) {
        return 945.6983898794259 + u * (420.2993019608975 + u * 15.006648671471975);
    }
    static BPTT_INLINE Vec<double> tanhB(Vec<double> u) { return 945.6983898794259 + u * (105.06650533442757 + u); }
};

// x, but at most (at least) the bound; NaN stays NaN. Of the ternary GCC makes a comparison and a blend; x86 has one
// instruction for both, which returns its second operand if either is NaN. The masked forms, with all lanes on, are
// free of the warning that the plain ones give in GCC 12.
#if BPTT_BYTES == 64
#define BPTT_PICK(op, bound, x)                                                                                        \
    if constexpr (sizeof(T) == 4)                                                                                      \
        return (Vec<T>)_mm512_maskz_##op##_ps(0xffff, (__m512)(bound), (__m512)(x));                                   \
    else                                                                                                               \
        return (Vec<T>)_mm512_maskz_##op##_pd(0xff, (__m512d)(bound), (__m512d)(x))
#elif BPTT_BYTES == 32
#define BPTT_PICK(op, bound, x)                                                                                        \
    if constexpr (sizeof(T) == 4)                                                                                      \
        return (Vec<T>)_mm256_##op##_ps((__m256)(bound), (__m256)(x));                                                 \
    else                                                                                                               \
        return (Vec<T>)_mm256_##op##_pd((__m256d)(bound), (__m256d)(x))
#elif defined(__SSE2__)
#define BPTT_PICK(op, bound, x)                                                                                        \
    if constexpr (sizeof(T) == 4)                                                                                      \
        return (Vec<T>)_mm_##op##_ps((__m128)(bound), (__m128)(x));                                                    \
    else                                                                                                               \
        return (Vec<T>)_mm_##op##_pd((__m128d)(bound), (__m128d)(x))
#endif

template <class T> BPTT_INLINE Vec<T> atMost(Vec<T> x, T bound) {
    const Vec<T> b = broadcast(bound);
#ifdef BPTT_PICK
    BPTT_PICK(min, b, x);
#else
    return b < x ? b : x;
#endif
}

template <class T> BPTT_INLINE Vec<T> atLeast(Vec<T> x, T bound) {
    const Vec<T> b = broadcast(bound);
#ifdef BPTT_PICK
    BPTT_PICK(max, b, x);
#else
    return b > x ? b : x;
#endif
}

#undef BPTT_PICK

// 1 / (1 + exp(-x)) = (a + b) / ((a + b) + 2^n (a - b)), where -x = n ln2 - r, so that exp(-x) = 2^n exp(-r).
template <class T> BPTT_INLINE Vec<T> sigmoid(Vec<T> x) {
    using C = Activation<T>;
    constexpr T base = C::round + C::bias;
    x = atLeast<T>(atMost<T>(x, C::sigmoidHigh), C::sigmoidLow);
    const Vec<T> m = base - x * C::log2e, n = m - base;
    const Vec<T> s = (Vec<T>)((UInts<T>)m << C::mantissa); // n + bias shifted into the exponent: 2^n
    const Vec<T> r = (x + n * C::ln2Hi) + n * C::ln2Lo;
    const Vec<T> u = r * r, a = C::sigmoidA(u), b = r * C::sigmoidB(u);
    const Vec<T> p = a + b;
    return p / (p + s * (a - b));
}

// Of |x|, with exp(2|x|) = 2^n (a + b) / (a - b) where |x| = n ln2 / 2 + r:
//     (exp(2|x|) - 1) / (exp(2|x|) + 1) = (b + h (a + b)) / (a + h (a + b)), h = (2^n - 1) / 2
// which does not cancel near 0, where h = 0, nor exceeds 1 however it is rounded, since b < a and h >= 0. ln2 needs no
// second part here: where n is large enough for its error to count, tanh no longer depends on r.
template <class T> BPTT_INLINE Vec<T> tanh(Vec<T> x) {
    using C = Activation<T>;
    constexpr T base = C::round + (C::bias - 1);
    const UInts<T> sign = (UInts<T>)x & (UInts<T>)broadcast(T(-0.0));
    x = atMost<T>((Vec<T>)((UInts<T>)x ^ sign), C::tanhHigh);
    const Vec<T> m = base + x * (2 * C::log2e), n = m - base;
    const Vec<T> h = (Vec<T>)((UInts<T>)m << C::mantissa) - T(0.5);
    const Vec<T> r = x - n * C::halfLn2;
    const Vec<T> u = r * r, a = C::tanhA(u), b = r * C::tanhB(u);
    const Vec<T> p = a + b;
    return (Vec<T>)((UInts<T>)((b + h * p) / (a + h * p)) ^ sign);
}

} // namespace bptt::BPTT_VARIANT

#if BPTT_BYTES == 64
#include "pieces.hpp"
#endif

namespace bptt::BPTT_VARIANT {

// Of N registers, each in its place.
template <class T, int N> BPTT_INLINE void tanhs(Vec<T> (&x)[N]) {
#if BPTT_BYTES == 64
    if constexpr (sizeof(T) == sizeof(float)) return tanh_of(x);
#endif
    for (Vec<T> &each : x) each = tanh<T>(each);
}

template <class T, int N> BPTT_INLINE void sigmoids(Vec<T> (&x)[N]) {
#if BPTT_BYTES == 64
    if constexpr (sizeof(T) == sizeof(float)) return sigmoid_of(x);
#endif
    for (Vec<T> &each : x) each = sigmoid<T>(each);
}

} // namespace bptt::BPTT_VARIANT
