// exp, log and their kin, sin, cos, erf, square roots and floor of a register of values.
//
// Polynomials are Taylor series, cut where the next term no longer counts in the last place: of exp on |r| <= ln2 / 2,
// of log by atanh on |s| <= 3 - 2 sqrt(2), of sin and cos on |r| <= pi / 4, of erf on |x| <= 1.
//
// Largest errors measured, in ulp, of 2 million values each (random bits, uniform, log-spaced), against 80-bit
// arithmetic; with fused multiply-add, then without:
//                   float          double
//     exp           1.01   0.99    0.99   0.93     subnormal results too; infinity above, zero below
//     expm1         1.60   1.71    1.78   1.90
//     log           0.83   0.83    0.78   0.81     subnormal arguments too
//     log1p         1.44   1.44    1.43   1.43
//     sin, cos      2.17   2.17    1.87   1.87     |x| <= 8192 (float), 8000 (double); beyond 8192, 1e6: libm's
//     erf           2.38   2.62    2.00   2.00     of 40,000 values
//     1 / sqrt      1.47   1.47    1.49   1.49     the square root alone is rounded correctly
// NaN gives NaN, and zeros keep their signs where the function has it so.
#pragma once

#include "activation.hpp"

namespace bptt::BPTT_VARIANT {

template <class T> struct Constants;

template <> struct Constants<float> {
    static constexpr float expLow = -104, expHigh = 89, expm1Low = -50;
    static constexpr float smallest = 0x1p-126f, scale = 0x1p25f, infinity = __builtin_inff();
    static constexpr int scaled = 25, expTerms = 8, logTerms = 6, sinTerms = 5;
    static constexpr float halfRoot = 0.70710678f;
    static constexpr float twoOverPi = 0.636619772f, most = 8192;
    static constexpr float pi1 = 0x1.92p0f, pi2 = 0x1.fb4p-12f, pi3 = 0x1.444p-24f, pi4 = 0x1.68c234p-39f;
    static constexpr int erfTerms = 12;
    static constexpr float erfHigh = 4, erfMiddle = 1.6f;
    static constexpr float erfFar[] = {-0.0002969190194f, 0.002887445291f, 0.002471440821f, -0.0168381751f,
                                       -0.02460938956f,   0.2084880782f,   -0.4778546828f,  0.3059529918f};
};

template <> struct Constants<double> {
    static constexpr double expLow = -746, expHigh = 710, expm1Low = -50;
    static constexpr double smallest = 0x1p-1022, scale = 0x1p54, infinity = __builtin_inf();
    static constexpr int scaled = 54, expTerms = 14, logTerms = 11, sinTerms = 9;
    static constexpr double halfRoot = 0.70710678118654752;
    static constexpr double twoOverPi = 0.63661977236758134, most = 1e6;
    static constexpr double pi1 = 0x1.921fb544p0, pi2 = 0x1.0b4611a6p-34, pi3 = 0x1.3198a2e037073p-69, pi4 = 0;
    static constexpr int erfTerms = 19;
    static constexpr double erfHigh = 6, erfMiddle = 2;
    static constexpr double erfFar[] = {
        -1.135257147727362645e-6,  1.272567661840228019e-6,    4.011749647325066927e-6,   1.305857712227801648e-6,
        -0.0000139982837727849769, -0.00002756220916112935301, 0.00002752717555722724734, 0.0001743594740020515756,
        0.00004355558686575481596, -0.0009819769411038642652,  -0.0008471432529919500476, 0.006997461736971578745,
        0.003732892404397833773,   -0.078978581015706104,      0.2416581942424658465,     -0.4271858474139584861,
        0.2553956763105057445};
};

template <class T> BPTT_INLINE Vec<T> absolute(Vec<T> x) {
    return (Vec<T>)((UInts<T>)x & ~(UInts<T>)broadcast(T(-0.0)));
}

template <class T> BPTT_INLINE Vec<T> sign_of(Vec<T> x) { return (Vec<T>)((UInts<T>)x & (UInts<T>)broadcast(T(-0.0))); }

template <class T> BPTT_INLINE Vec<T> with_sign(Vec<T> x, Vec<T> sign) {
    return (Vec<T>)((UInts<T>)x | (UInts<T>)sign);
}

template <class T> BPTT_INLINE Vec<T> root(Vec<T> x) {
#if BPTT_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
    else
        return (Vec<T>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
#elif BPTT_BYTES == 32
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm256_sqrt_ps((__m256)x);
    else
        return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__SSE2__)
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm_sqrt_ps((__m128)x);
    else
        return (Vec<T>)_mm_sqrt_pd((__m128d)x);
#else
    for (int i = 0; i < lanes<T>; ++i)
        if constexpr (sizeof(T) == 4)
            x[i] = __builtin_sqrtf(x[i]);
        else
            x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}

// The largest integer that is not above x. Beyond 2^mantissa every number is one; NaN stays.
template <class T> BPTT_INLINE Vec<T> floored(Vec<T> x) {
    constexpr T whole = T(1ull << Activation<T>::mantissa);
    const Vec<T> size = absolute<T>(x);
    Vec<T> n = with_sign<T>((size + whole) - whole, sign_of<T>(x));
    n = n > x ? n - T(1) : n;
    return size < broadcast(whole) ? with_sign<T>(n, sign_of<T>(x)) : x;
}

// 1 / k!, for the series.
template <class T> constexpr T inverse_factorial(int k) {
    long double f = 1;
    for (int i = 2; i <= k; ++i) f *= i;
    return T(1 / f);
}

// 1 / 2! + r / 3! + ..., the terms of exp(r) after 1 + r, over r^2.
template <class T> BPTT_INLINE Vec<T> exp_tail(Vec<T> r) {
    constexpr int last = Constants<T>::expTerms - 1;
    Vec<T> p = broadcast(inverse_factorial<T>(last));
#pragma GCC unroll 16
    for (int k = last - 1; k >= 2; --k) p = p * r + inverse_factorial<T>(k);
    return p;
}

// x = n ln2 + r.
template <class T> struct Reduced {
    Vec<T> n, r;

    BPTT_INLINE explicit Reduced(Vec<T> x) {
        using C = Activation<T>;
        n = (x * C::log2e + C::round) - C::round;
        r = (x - n * C::ln2Hi) - n * C::ln2Lo;
    }
};

// 2^n of an integer n between the exponents of normal numbers.
template <class T> BPTT_INLINE Vec<T> power_of_two(Vec<T> n) {
    using C = Activation<T>;
    return (Vec<T>)((UInts<T>)(n + (C::round + C::bias)) << C::mantissa);
}

// 2^n in two factors, since neither it nor the result need be a normal number: infinity above, zero below.
template <class T> BPTT_INLINE Vec<T> exponential(Vec<T> x) {
    using C = Activation<T>;
    const Reduced<T> d(atLeast<T>(atMost<T>(x, Constants<T>::expHigh), Constants<T>::expLow));
    const Vec<T> p = (d.r + d.r * d.r * exp_tail<T>(d.r)) + T(1);
    const Vec<T> half = (d.n * T(0.5) + C::round) - C::round;
    return p * power_of_two<T>(half) * power_of_two<T>(d.n - half);
}

// 2^n (exp(r) - 1) + (2^n - 1), halved while it is added up, so that the largest 2^n is finite.
template <class T> BPTT_INLINE Vec<T> exponential_minus_1(Vec<T> x) {
    const Reduced<T> d(atLeast<T>(atMost<T>(x, Constants<T>::expHigh), Constants<T>::expm1Low));
    const Vec<T> p = d.r + d.r * d.r * exp_tail<T>(d.r);
    const Vec<T> s = power_of_two<T>(d.n - T(1));
    const Vec<T> y = (p * s + (s - T(0.5))) * T(2);
    return d.n == Vec<T>{} ? with_sign<T>(absolute<T>(p), sign_of<T>(x)) : y;
}

// x = 2^k (1 + f) with 1 + f from sqrt(1/2) to sqrt(2); log(1 + f) = f - (f^2 / 2 - s (f^2 / 2 + R)) where
// s = f / (2 + f) and R = 2 (s^2 / 3 + s^4 / 5 + ...), so that the largest term is exact.
template <class T> BPTT_INLINE Vec<T> logarithm(Vec<T> x) {
    using C = Activation<T>;
    using K = Constants<T>;
    const Vec<T> zero{};
    const auto tiny = x < broadcast(K::smallest);
    const Vec<T> y = tiny ? x * K::scale : x;
    const UInts<T> bits = (UInts<T>)y;
    const UInts<T> fraction = (bits & ((UInts<T>){} + ((typename Types<T>::UInt)1 << C::mantissa) - 1));
    Vec<T> m = (Vec<T>)(fraction | (UInts<T>)broadcast(T(0.5))); // from 1/2 to 1
    const UInts<T> exponent = bits >> C::mantissa;               // the sign is zero where it counts
    // An integer in the lowest bits of `round` is its distance from it.
    Vec<T> k = (Vec<T>)(exponent | (UInts<T>)broadcast(C::round)) - (C::round + T(C::bias - 1));
    k = tiny ? k - T(K::scaled) : k;
    const auto low = m < broadcast(K::halfRoot);
    k = low ? k - T(1) : k;
    const Vec<T> f = low ? (m - T(0.5)) * T(2) : m - T(1);
    const Vec<T> s = f / (f + T(2)), z = s * s;
    Vec<T> p = broadcast(T(2) / T(2 * K::logTerms + 1));
#pragma GCC unroll 16
    for (int i = K::logTerms - 1; i >= 1; --i) p = p * z + T(2) / T(2 * i + 1);
    const Vec<T> half = f * f * T(0.5);
    Vec<T> result = k * C::ln2Hi - ((half - (s * (half + p * z) + k * C::ln2Lo)) - f);
    result = x == zero ? broadcast(-K::infinity) : result;
    result = x < zero ? broadcast(T(__builtin_nan(""))) : result;
    return (x < broadcast(K::infinity)) ? result : x; // infinity and NaN
}

// log(u) of u = 1 + x, and what rounding has taken from u.
template <class T> BPTT_INLINE Vec<T> logarithm_of_1_plus(Vec<T> x) {
    using K = Constants<T>;
    const Vec<T> u = x + T(1), lost = (x - (u - T(1))) / u;
    const Vec<T> y = logarithm<T>(u);
    const Vec<T> sum = y + (u > Vec<T>{} ? lost : Vec<T>{});
    const Vec<T> result = u < broadcast(K::infinity) ? sum : y;
    return absolute<T>(x) < broadcast(K::smallest) ? x : result;
}

// Where x is within `most`, x = n pi / 2 + r in three parts of pi; beyond, the C library's, value by value.
template <bool cosine, class T> BPTT_INLINE Vec<T> wave(Vec<T> x) {
    using C = Activation<T>;
    using K = Constants<T>;
    const Vec<T> size = absolute<T>(x);
    bool far = false;
    const auto near = size <= broadcast(K::most);
    for (int i = 0; i < lanes<T>; ++i) far |= !near[i];
    if (__builtin_expect(far, 0)) {
        for (int i = 0; i < lanes<T>; ++i)
            if constexpr (sizeof(T) == 4)
                x[i] = cosine ? __builtin_cosf(x[i]) : __builtin_sinf(x[i]);
            else
                x[i] = cosine ? __builtin_cos(x[i]) : __builtin_sin(x[i]);
        return x;
    }
    const Vec<T> m = x * K::twoOverPi + C::round, n = m - C::round;
    const Vec<T> r = ((x - n * K::pi1) - n * K::pi2) - n * K::pi3 - n * K::pi4, z = r * r;
    Vec<T> s = broadcast(inverse_factorial<T>(2 * K::sinTerms - 1)),
           c = broadcast(inverse_factorial<T>(2 * K::sinTerms));
    if constexpr (K::sinTerms % 2 == 0) s = -s;
    if constexpr (K::sinTerms % 2 == 1) c = -c;
#pragma GCC unroll 16
    for (int i = K::sinTerms - 1; i >= 2; --i) {
        s = s * z + (i % 2 ? inverse_factorial<T>(2 * i - 1) : -inverse_factorial<T>(2 * i - 1));
        c = c * z + (i % 2 ? -inverse_factorial<T>(2 * i) : inverse_factorial<T>(2 * i));
    }
    s = r + r * z * s;
    const Vec<T> half = z * T(0.5), one = T(1) - half;
    c = one + (((T(1) - one) - half) + z * z * c);
    const UInts<T> quarter = (UInts<T>)m + (cosine ? 1 : 0);
    const UInts<T> swaps = (UInts<T>){} - (quarter & 1), turned = (quarter & 2) << (8 * sizeof(T) - 2);
    const UInts<T> y = ((UInts<T>)c & swaps) | ((UInts<T>)s & ~swaps);
    const Vec<T> result = (Vec<T>)(y ^ turned);
    return cosine ? result : (x == Vec<T>{} ? x : result);
}

// 2 / sqrt(pi) (-1)^n / (n! (2 n + 1)): erf(x) = x (this + ... x^2 ...).
template <class T> constexpr T erf_term(int n) {
    const long double term = 1.128379167095512573896158903121545172L * inverse_factorial<long double>(n) / (2 * n + 1);
    return T(n % 2 ? -term : term);
}

// The Taylor series up to 1; beyond, 1 - exp(-x^2) q(x), with q a polynomial in (x - m) / (x + m) that is our own fit,
// by Chebyshev nodes in 40 digits, of exp(x^2) erfc(x).
template <class T> BPTT_INLINE Vec<T> error_function(Vec<T> x) {
    using K = Constants<T>;
    const Vec<T> size = absolute<T>(x), square = x * x;
    Vec<T> near = broadcast(erf_term<T>(K::erfTerms - 1));
#pragma GCC unroll 20
    for (int n = K::erfTerms - 2; n >= 0; --n) near = near * square + erf_term<T>(n);
    const Vec<T> c = atMost<T>(size, K::erfHigh), t = (c - K::erfMiddle) / (c + K::erfMiddle);
    constexpr int terms = sizeof K::erfFar / sizeof K::erfFar[0];
    Vec<T> q = broadcast(K::erfFar[0]);
#pragma GCC unroll 20
    for (int i = 1; i < terms; ++i) q = q * t + K::erfFar[i];
    const Vec<T> far = T(1) - exponential<T>(-(c * c)) * q;
    return size <= broadcast(T(1)) ? x * near : with_sign<T>(far, sign_of<T>(x));
}

} // namespace bptt::BPTT_VARIANT
