// Values of a tape as bfloat16, which are computed with as float: read and written a register at a time, by conversion.
#pragma once

#include "simd.hpp"
#include "walks.hpp"

namespace bptt::BPTT_VARIANT {

// So that the functions of a type find the register that its values are computed in.
template <> struct Register<Bfloat16> {
    using Vec = Register<float>::Vec;
};

typedef std::uint16_t Halves __attribute__((vector_size(BPTT_BYTES / 2)));
typedef std::uint16_t HalvesUnaligned __attribute__((vector_size(BPTT_BYTES / 2), aligned(2), may_alias));
typedef std::uint32_t Words __attribute__((vector_size(BPTT_BYTES)));

BPTT_INLINE Vec<float> widened(Halves x) { return (Vec<float>)(__builtin_convertvector(x, Words) << 16); }

// To the nearest, of two equally near ones to the even one; NaN stays one.
BPTT_INLINE Halves narrowed(Vec<float> x) {
    const Words bits = (Words)x, nearest = bits + 0x7fff + (bits >> 16 & 1);
    return __builtin_convertvector((x != x ? bits | 0x400000 : nearest) >> 16, Halves);
}

template <> BPTT_INLINE Vec<float> load<Bfloat16>(const Bfloat16 *p) {
    return widened(*reinterpret_cast<const HalvesUnaligned *>(p));
}

template <> BPTT_INLINE void store<Bfloat16>(Bfloat16 *p, Vec<float> x) {
    *reinterpret_cast<HalvesUnaligned *>(p) = narrowed(x);
}

template <> BPTT_INLINE Vec<float> load<Bfloat16>(const Bfloat16 *p, int count) {
    if (count >= lanes<float>) return load(p);
#if BPTT_BYTES == 64
    return widened((Halves)_mm256_maskz_loadu_epi16((__mmask16)((1u << count) - 1), p));
#else
    Halves x{};
    for (int i = 0; i < count; ++i) x[i] = p[i].bits;
    return widened(x);
#endif
}

template <> BPTT_INLINE void store<Bfloat16>(Bfloat16 *p, Vec<float> x, int count) {
    if (count >= lanes<float>) return store(p, x);
#if BPTT_BYTES == 64
    _mm256_mask_storeu_epi16(p, (__mmask16)((1u << count) - 1), (__m256i)narrowed(x));
#else
    const Halves halves = narrowed(x);
    for (int i = 0; i < count; ++i) p[i].bits = halves[i];
#endif
}

// Whether values are stored as another type than is computed with. Then a walk keeps those that its next step computes
// from near, as they are.
template <class S> constexpr bool keeps_near = sizeof(S) != sizeof(RealOf<S>);

template <class From, class To> BPTT_INLINE void copy(const From *from, long count, To *to) {
    constexpr int L = lanes<RealOf<To>>;
    for (long i = 0; i < count; i += L) {
        const int some = (int)(count - i < L ? count - i : L);
        store(to + i, load(from + i, some), some);
    }
}

// A row of states on the tape, and where it is kept near.
template <class S> struct Kept {
    S *tape;
    RealOf<S> *near;

    template <class Count> BPTT_INLINE void put(long u, Vec<RealOf<S>> x, Count count) const {
        store(tape + u, x, count);
        if constexpr (keeps_near<S>) store(near + u, x, count);
    }
};

// The state in a row of the tape, which is the initial one of a lane unless that is negative; or where it is kept near,
// in row n. apart: whether the initial ones are not on the tape.
template <class S, class T>
BPTT_INLINE const T *kept_state(const S *tape, const T *initial, const T *near, long row, long lane, long n, long size,
                                bool apart = false) {
    if constexpr (keeps_near<S>)
        return lane >= 0 ? initial + lane * size : near + n * size;
    else
        return apart && lane >= 0 ? initial + lane * size : tape + row * size;
}

} // namespace bptt::BPTT_VARIANT
