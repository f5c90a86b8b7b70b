// tanh of 16 floats by tables of 32 numbers, which lie in two registers and one instruction picks from: no division,
// which alone takes longer than all other instructions. And tanh and sigmoid of several registers at once, step by
// step, so that instructions that do not wait for one another follow one another.
//
// The leading bits of |x| scaled, plus 1, number a piece: 8 in each octave from 1 to 16. A piece has a polynomial of
// degree 4 in the distance from a place near its middle, chosen for tanh to be almost a float there; the first one's
// begins with x itself. They are our own fits of least largest relative error by Lawson's iteration, coefficient by
// coefficient with those before rounded; the error is at most 0.8 / 2^24.
//
// Largest error measured, of all values from 2^-13 to 9.45, against the double version: 1.76 ulp, 1.4e-7 relative.
// Larger ones give 1. What activation.hpp says of results holds here too; sigmoid's formula and error are those there.
#pragma once

#include "simd.hpp"

namespace bptt::BPTT_VARIANT {

struct Pieces {
    static constexpr float scale = 0x1.965966p0f, bound = 0x1.2e6664p3f;
    alignas(64) static constexpr float centre[32] = {
        0x1.6ae38ap-1f, 0x1.bb832ap-1f, 0x1.0612eep0f,  0x1.2e6698p0f,  0x1.56b8bep0f,
        0x1.7f0c6ep0f,  0x1.a75b94p0f,  0x1.cfae4ep0f,  0x1.06137cp1f,  0x1.2e644ep1f,
        0x1.56b80ep1f,  0x1.7f0a48p1f,  0x1.a75aecp1f,  0x1.cfaeacp1f,  0x1.f80036p1f,
        0x1.102b2ep2f,  0x1.2e66f2p2f,  0x1.56b7a6p2f,  0x1.7f0c96p2f,  0x1.a75e8p2f,
        0x1.cfb06cp2f,  0x1.f7fda8p2f,  0x1.102b4ep3f,  0x1.245444p3f,  0,
        0x1.e3d746p-4f, 0x1.9334p-3f,   0x1.1a3c1ep-2f, 0x1.6ae096p-2f, 0x1.bb83b4p-2f,
        0x1.06146ep-1f, 0x1.2e641p-1f};
    alignas(64) static constexpr float c0[32] = {
        0x1.38453cp-1f, 0x1.661f2p-1f,  0x1.8af25p-1f,  0x1.a7db78p-1f, 0x1.be24a2p-1f,
        0x1.cf1744p-1f, 0x1.dbd648p-1f, 0x1.e55ae4p-1f, 0x1.ef3912p-1f, 0x1.f6fecp-1f,
        0x1.fb2f5p-1f,  0x1.fd6e0cp-1f, 0x1.fea124p-1f, 0x1.ff450ap-1f, 0x1.ff9c64p-1f,
        0x1.ffcaf4p-1f, 0x1.ffeb6p-1f,  0x1.fffa26p-1f, 0x1.fffe58p-1f, 0x1.ffff88p-1f,
        0x1.ffffdep-1f, 0x1.fffff6p-1f, 0x1.fffffep-1f, 0x1p0f,         0,
        0x1.e19a5cp-4f, 0x1.8e12bep-3f, 0x1.134c7ap-2f, 0x1.5c69d4p-2f, 0x1.a1b71ep-2f,
        0x1.e2b7dep-2f, 0x1.0f87b2p-1f};
    alignas(64) static constexpr float c1[32] = {
        0x1.418baep-1f,  0x1.05828ep-1f,  0x1.9eb15ep-2f,  0x1.423912p-2f,  0x1.ecf8cp-3f,   0x1.7495bp-3f,
        0x1.171638p-3f,  0x1.9f39e2p-4f,  0x1.08080ep-4f,  0x1.1d9deap-5f,  0x1.32b75p-6f,   0x1.4824a6p-7f,
        0x1.5e619ap-8f,  0x1.75a556p-9f,  0x1.8e46b8p-10f, 0x1.a8474p-11f,  0x1.49d784p-12f, 0x1.76576ap-14f,
        0x1.a8c0cap-16f, 0x1.e1eca8p-18f, 0x1.11659ap-19f, 0x1.3651eep-21f, 0x1.5f4892p-23f, 0x1.8cef3cp-25f,
        0x1p0f,          0x1.f8ebf2p-1f,  0x1.eca80cp-1f,  0x1.dafe52p-1f,  0x1.c4ba02p-1f,  0x1.aacd3ep-1f,
        0x1.8e38e4p-1f,  0x1.6fffb6p-1f};
    alignas(64) static constexpr float c2[32] = {
        -0x1.883942p-2f, -0x1.6dd478p-2f,  -0x1.3fe2d6p-2f,  -0x1.0ac056p-2f,  -0x1.ad9002p-3f,  -0x1.50fe5ep-3f,
        -0x1.035ffcp-3f, -0x1.899e26p-4f,  -0x1.fec3dcp-5f,  -0x1.1898a6p-5f,  -0x1.2fd584p-6f,  -0x1.467fa8p-7f,
        -0x1.5d723ap-8f, -0x1.751d8ap-9f,  -0x1.8dfa2ap-10f, -0x1.a81bdep-11f, -0x1.49d3d6p-12f, -0x1.765e72p-14f,
        -0x1.c6348p-16f, -0x1.173498p-17f, -0x1.49146p-19f,  0x1.21251cp-23f,  -0x1.04c98ap-19f, -0x1.fdb1c8p-20f,
        0x1.8dd7a4p-17f, -0x1.daf1ccp-4f,  -0x1.7f0868p-3f,  -0x1.feccf4p-3f,  -0x1.341404p-2f,  -0x1.5c34c4p-2f,
        -0x1.7773d6p-2f, -0x1.865318p-2f};
    alignas(64) static constexpr float c3[32] = {
        0x1.85c56cp-6f,  0x1.444f4p-4f,   0x1.b0b932p-4f,  0x1.c4dd08p-4f,  0x1.a3974p-4f,   0x1.692042p-4f,
        0x1.281dbap-4f,  0x1.d5b7c4p-5f,  0x1.3f326ap-5f,  0x1.6aabecp-6f,  0x1.8fa8aap-7f,  0x1.b17818p-8f,
        0x1.d2371ap-9f,  0x1.f319e4p-10f, 0x1.0a89e4p-10f, 0x1.1c42d8p-11f, 0x1.c2a4cp-13f,  0x1.ffa158p-15f,
        0x1.1e40aap-16f, 0x1.45003cp-18f, 0x1.712bd8p-20f, 0x1.a84f98p-22f, 0x1.05222p-23f,  0x1.6a9b0cp-25f,
        -0x1.56452ep-2f, -0x1.426b3p-2f,  -0x1.230a96p-2f, -0x1.efc2fp-3f,  -0x1.89d4b4p-3f, -0x1.1d0418p-3f,
        -0x1.6228eap-4f, -0x1.331224p-5f};
    alignas(64) static constexpr float c4[32] = {
        0x1.ceb11ap-4f,   0x1.0497ecp-4f,   0x1.72a918p-6f,   -0x1.323a74p-8f,  -0x1.3c7d3ap-6f,  -0x1.96fcdcp-6f,
        -0x1.984658p-6f,  -0x1.6cf9ep-6f,   -0x1.12ed1ap-6f,  -0x1.500778p-7f,  -0x1.7fffaap-8f,  -0x1.a847f6p-9f,
        -0x1.ccc796p-10f, -0x1.efe07ap-11f, -0x1.097fecp-11f, -0x1.1ba942p-12f, -0x1.c124eap-14f, -0x1.fe1628p-16f,
        0x1.1c4c1ep-17f,  0x1.28c1a4p-17f,  0x1.caefep-19f,   -0x1.eac91ap-18f, 0x1.292a2cp-16f,  0x1.3615a4p-16f,
        0x1.49150ep-6f,   0x1.3507fap-4f,   0x1.dfcde8p-4f,   0x1.2ef66ep-3f,   0x1.534ecap-3f,   0x1.5c00dcp-3f,
        0x1.536f8cp-3f,   0x1.2dfe1ap-3f};
};

// Of the number in the lowest five bits.
BPTT_INLINE Vec<float> picked(const float (&table)[32], UInts<float> number) {
    return (Vec<float>)_mm512_permutex2var_ps(_mm512_load_ps(table), (__m512i)number, _mm512_load_ps(table + 16));
}

// Of N registers, step by step: so many independent instructions follow one another.
#define BPTT_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)

template <int N> BPTT_INLINE void tanh_of(Vec<float> (&x)[N]) {
    using P = Pieces;
    Vec<float> t[N], y[N];
    UInts<float> piece[N];
    BPTT_EACH t[i] = atMost<float>((Vec<float>)((UInts<float>)x[i] & 0x7fffffff), P::bound); // NaN stays NaN
    BPTT_EACH piece[i] = (UInts<float>)(t[i] * P::scale + 1.0f) >> 20;
    BPTT_EACH t[i] -= picked(P::centre, piece[i]);
    BPTT_EACH y[i] = picked(P::c4, piece[i]);
    BPTT_EACH y[i] = y[i] * t[i] + picked(P::c3, piece[i]);
    BPTT_EACH y[i] = y[i] * t[i] + picked(P::c2, piece[i]);
    BPTT_EACH y[i] = y[i] * t[i] + picked(P::c1, piece[i]);
    BPTT_EACH y[i] = y[i] * t[i] + picked(P::c0, piece[i]);
    const __m512i sign = (__m512i)broadcast(-0.0f);
    BPTT_EACH x[i] = (Vec<float>)_mm512_ternarylogic_epi32((__m512i)x[i], (__m512i)y[i], sign, 0xe4); // sign ? x : y
}

template <int N> BPTT_INLINE void sigmoid_of(Vec<float> (&x)[N]) {
    using C = Activation<float>;
    constexpr float base = C::round + C::bias;
    Vec<float> m[N], n[N], r[N], a[N], b[N], p[N];
    BPTT_EACH x[i] = atLeast<float>(atMost<float>(x[i], C::sigmoidHigh), C::sigmoidLow);
    BPTT_EACH m[i] = base - x[i] * C::log2e;
    BPTT_EACH n[i] = m[i] - base;
    BPTT_EACH m[i] = (Vec<float>)((UInts<float>)m[i] << C::mantissa);
    BPTT_EACH r[i] = x[i] + n[i] * C::ln2Hi;
    BPTT_EACH r[i] = r[i] + n[i] * C::ln2Lo;
    BPTT_EACH n[i] = r[i] * r[i];
    BPTT_EACH a[i] = C::sigmoidA(n[i]);
    BPTT_EACH b[i] = C::sigmoidB(n[i]);
    BPTT_EACH b[i] = r[i] * b[i];
    BPTT_EACH p[i] = a[i] + b[i];
    BPTT_EACH a[i] = a[i] - b[i];
    BPTT_EACH a[i] = p[i] + m[i] * a[i];
    BPTT_EACH x[i] = p[i] / a[i];
}

#undef BPTT_EACH

template <> BPTT_INLINE Vec<float> tanh<float>(Vec<float> x) {
    Vec<float> y[1] = {x};
    tanh_of(y);
    return y[0];
}

} // namespace bptt::BPTT_VARIANT
