// Vectors of one register, in one source for every element type and every width.
//
// This file and all that include it are compiled once per variant (see CMakeLists.txt): BPTT_VARIANT names the
// variant's namespace and BPTT_BYTES is the width of its registers. Nothing from the C++ library is used here, since an
// inline function shared between variants could be linked in the widest one's instructions.
#pragma once

#include <cstdint>

#if BPTT_BYTES >= 32
#include <immintrin.h>
#endif

#define BPTT_INLINE inline __attribute__((always_inline))

namespace bptt::BPTT_VARIANT {

template <class T> struct Types;

template <> struct Types<float> {
    using UInt = std::uint32_t;
};

template <> struct Types<double> {
    using UInt = std::uint64_t;
};

template <class T> struct Register {
    typedef T Vec __attribute__((vector_size(BPTT_BYTES)));
    typedef T Unaligned __attribute__((vector_size(BPTT_BYTES), aligned(sizeof(T)), may_alias));
};

// As many values as one register holds.
template <class T> using Vec = typename Register<T>::Vec;

template <class T> constexpr int lanes = BPTT_BYTES / sizeof(T);

template <class T> BPTT_INLINE Vec<T> broadcast(T x) { return x - Vec<T>{}; }

template <class T> BPTT_INLINE Vec<T> load(const T *p) {
    return *reinterpret_cast<const typename Register<T>::Unaligned *>(p);
}

template <class T> BPTT_INLINE void store(T *p, Vec<T> x) {
    *reinterpret_cast<typename Register<T>::Unaligned *>(p) = x;
}

// The first `count` values, the rest zero; nothing beyond them is read or written.
template <class T> BPTT_INLINE Vec<T> load(const T *p, int count) {
    if (count >= lanes<T>) return load(p);
#if BPTT_BYTES == 64
    if constexpr (sizeof(T) == 4)
        return (Vec<T>)_mm512_maskz_loadu_ps((__mmask16)((1u << count) - 1), p);
    else
        return (Vec<T>)_mm512_maskz_loadu_pd((__mmask8)((1u << count) - 1), p);
#else
    Vec<T> x{};
    for (int i = 0; i < count; ++i) x[i] = p[i];
    return x;
#endif
}

template <class T> BPTT_INLINE void store(T *p, Vec<T> x, int count) {
    if (count >= lanes<T>) return store(p, x);
#if BPTT_BYTES == 64
    if constexpr (sizeof(T) == 4)
        _mm512_mask_storeu_ps(p, (__mmask16)((1u << count) - 1), (__m512)x);
    else
        _mm512_mask_storeu_pd(p, (__mmask8)((1u << count) - 1), (__m512d)x);
#else
    for (int i = 0; i < count; ++i) p[i] = x[i];
#endif
}

// Asks for the line of a value that will be read or written.
BPTT_INLINE void fetch(const void *p) { __builtin_prefetch(p, 1, 2); }

// All values of a register, where a count would be asked for.
struct All {};

template <class T> BPTT_INLINE Vec<T> load(const T *p, All) { return load(p); }
template <class T> BPTT_INLINE void store(T *p, Vec<T> x, All) { store(p, x); }

// f(all or as many as are left before `end`), for the register of values from u on.
template <class T, class F> BPTT_INLINE void with_count(long u, long end, F f) {
    if (end - u >= lanes<T>)
        f(All{});
    else
        f((int)(end - u));
}

// a keeps its lanes whose number has no bit `D`, and takes b's in place of the others, which go to b for those. Done
// for every D below `lanes`, over all pairs of `lanes` vectors whose numbers differ in that bit, it makes rows columns.
template <int D, class T> BPTT_INLINE void exchange(Vec<T> &a, Vec<T> &b) {
    constexpr int L = lanes<T>;
    const Vec<T> x = a, y = b;
#if defined(__clang__) // which makes one instruction of these, and does not know the other form
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) a[i] = i & D ? y[i ^ D] : x[i], b[i] = i & D ? y[i] : x[i ^ D];
#else
    typedef typename Types<T>::UInt Numbers __attribute__((vector_size(BPTT_BYTES)));
    Numbers first{}, second{}; // lanes of y are numbered from L on
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) first[i] = i & D ? L + (i ^ D) : i, second[i] = i & D ? L + i : i ^ D;
    a = __builtin_shuffle(x, y, first), b = __builtin_shuffle(x, y, second);
#endif
}

// Lane i is that of x whose number is index(i), which is the same in all calls.
template <class T, class Index> BPTT_INLINE Vec<T> shuffled(Vec<T> x, Index index) {
    constexpr int L = lanes<T>;
#if defined(__clang__)
    Vec<T> y{};
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) y[i] = x[index(i)];
    return y;
#else
    typedef typename Types<T>::UInt Numbers __attribute__((vector_size(BPTT_BYTES)));
    Numbers from{};
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) from[i] = index(i);
    return __builtin_shuffle(x, from);
#endif
}

// Row i of `lanes` vectors becomes column i.
template <class T, int D = 1> BPTT_INLINE void transpose(Vec<T> *v) {
    if constexpr (D < lanes<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; ++i)
            if (!(i & D)) exchange<D, T>(v[i], v[i | D]);
        transpose<T, 2 * D>(v);
    }
}

// Lane i of the result is the sum of the lanes of v[i], for `lanes` vectors.
template <class T, int D = 1> BPTT_INLINE Vec<T> sums_of(Vec<T> *v) {
    if constexpr (D < lanes<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < lanes<T>; i += 2 * D) {
            exchange<D, T>(v[i], v[i + D]);
            v[i] += v[i + D];
        }
        return sums_of<T, 2 * D>(v);
    } else {
        return v[0];
    }
}

// The sums of `lanes` groups of N values each, which lie in N vectors one after the other, in the order of `sums_of`.
template <class T, int N, int D = 1> BPTT_INLINE Vec<T> sums_of_groups(Vec<T> *v) {
    constexpr int in_one = lanes<T> / N; // groups in a vector
    if constexpr (D < N) {
#pragma GCC unroll 16
        for (int i = 0; i < N; i += 2 * D) {
            exchange<D, T>(v[i], v[i + D]);
            v[i] += v[i + D];
        }
        return sums_of_groups<T, N, 2 * D>(v);
    } else {
        return shuffled<T>(v[0], [](int i) __attribute__((always_inline)) { return i % in_one * N + i / in_one; });
    }
}

} // namespace bptt::BPTT_VARIANT
