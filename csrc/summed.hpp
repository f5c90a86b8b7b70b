// Stage 4: sums over the rows of all steps, (6.4). Legend and arguments: walks.hpp.
#pragma once

#include "product.hpp"
#include "scratch.hpp"
#include "small.hpp"
#include "walks.hpp"

namespace bptt::BPTT_VARIANT {

// The sums of da over all rows, for units u0 to u1: of b_ih, and of b_hh, which sees a GRU's dm in place of da_n.
template <class T> void bias_sums(const Sweep<T> &a, long width, long u0, long u1) {
    constexpr long block = 8, L = lanes<T>; // vectors side by side
    const long rows = a.rows();
    const T *all = a.sums ? a.sums : a.da;
    for (long u = u0; u < u1; u += block * L) {
        Vec<T> sums[block] = {};
        const auto add = [&](auto some) __attribute__((always_inline)) {
            for (long row = 0; row < rows; ++row) {
                const T *da = all + row * width + u;
#pragma GCC unroll 8
                for (int v = 0; v < block; ++v) some(sums[v], da + v * L, u1 - u - v * L);
            }
        };
        if (u1 - u >= block * L)
            add([](Vec<T> &sum, const T *da, long) __attribute__((always_inline)) { sum += load(da); });
        else
            add([](Vec<T> &sum, const T *da, long left) __attribute__((always_inline)) {
                if (left > 0) sum += load(da, (int)least(left, lanes<T>));
            });
        for (int v = 0; v < block && u + v * L < u1; ++v) {
            alignas(BPTT_BYTES) T values[lanes<T>];
            store(values, sums[v]);
            for (long i = 0; i < least(u1 - u - v * L, L); ++i) {
                const long unit = u + v * L + i, H = a.H;
                if (a.cell != Cell::gru) {
                    a.db_ih[unit] = a.db_hh[unit] = values[i];
                } else { // (dm, da_r, da_z, da_n)
                    if (unit >= H) a.db_ih[unit - H] = values[i];
                    if (unit < H) a.db_hh[2 * H + unit] = values[i];
                    if (unit >= H && unit < 3 * H) a.db_hh[unit - H] = values[i];
                }
            }
        }
    }
}

// A tile is `tile_columns` columns of a times `tile_vectors` vectors of b, whose sums stay in registers over a block of
// rows. Blocks of a and of b are packed in the order in which tiles read them: b once, a once for all of b.
constexpr int tile_vectors = 3, tile_columns = accumulators / tile_vectors;

static_assert(8 % tile_columns == 0, "a tile lies on one side of RowSums::inner");

// out[m][v] = the sum over K rows of a[k][m] * b[k][v], added to what it holds where `adds`; of the last vector only
// `last` values count.
template <class T, int NV, int M> void outer(const T *a, const T *b, long K, T *out, long stride, int last, bool adds) {
    constexpr int L = lanes<T>;
    Vec<T> sum[M][NV] = {};
    for (long k = 0; k < K; ++k, a += tile_columns, b += NV * L) {
        Vec<T> y[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) y[v] = load(b + v * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vec<T> x = broadcast(a[m]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[m][v] += x * y[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m, out += stride)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) {
            const int count = v + 1 < NV ? L : last;
            store(out + v * L, adds ? load(out + v * L, count) + sum[m][v] : sum[m][v], count);
        }
}

template <class T> using Outer = void (*)(const T *, const T *, long, T *, long, int, bool);

template <class T, int NV, int M> constexpr Outer<T> outer_if_it_fits() {
    if constexpr (M <= tile_columns)
        return outer<T, NV, M>;
    else
        return nullptr;
}

template <class T, int NV>
constexpr Outer<T> outers_of[8] = {
    outer<T, NV, 1>,
    outer<T, NV, 2>,
    outer<T, NV, 3>,
    outer<T, NV, 4>,
    outer_if_it_fits<T, NV, 5>(),
    outer_if_it_fits<T, NV, 6>(),
    outer_if_it_fits<T, NV, 7>(),
    outer_if_it_fits<T, NV, 8>(),
};

// By the vectors and columns of a tile.
template <class T>
constexpr const Outer<T> *outers[tile_vectors + 1] = {nullptr, outers_of<T, 1>, outers_of<T, 2>, outers_of<T, 3>};

// One factor b [.., K] and how its block is packed: panels of one to `tile_vectors` vectors, as equal as they can be.
template <class S> struct Factor {
    using T = RealOf<S>;
    const S *b;
    T *out;
    long K, stride, vectors, panels;
    T *packed = nullptr;

    Factor(const S *b, T *out, long K, long stride)
        : b(b), out(out), K(out ? K : 0), stride(stride), vectors((this->K + lanes<T> - 1) / lanes<T>),
          panels((vectors + tile_vectors - 1) / tile_vectors) {}

    long first(long p) const { return vectors * p / panels; }

    // The block's row k, of which `row` is the place.
    void pack(long k, long rows, const S *row) {
        for (long p = 0; p < panels; ++p) {
            const long v0 = first(p), v1 = first(p + 1);
            T *to = packed + (v0 * rows + k * (v1 - v0)) * lanes<T>;
            for (long v = v0; v < v1; ++v, to += lanes<T>)
                store(to, load(row + v * lanes<T>, (int)least(K - v * lanes<T>, lanes<T>)));
        }
    }
};

template <class S> struct RowSumsMemory {
    using T = RealOf<S>;
    static constexpr long block = 256;                                 // rows
    static constexpr long near = 2 * near_bytes / (block * sizeof(T)); // columns of a whose block stays near
    Factor<S> one, two;
    long first, end, together; // this worker's columns of a, and how many are packed at a time
    T *a = nullptr;
    long bytes;

    RowSumsMemory(const RowSums<S> &s, void *memory, int id, int workers)
        : one(s.b, s.out, s.K, s.b_stride), two(s.b2, s.out2, s.K2, s.b2_stride) {
        const long tiles = (s.M + tile_columns - 1) / tile_columns;
        first = tiles * id / workers * tile_columns;
        end = least(tiles * (id + 1) / workers * tile_columns, s.M);
        together = least(near / tile_columns * tile_columns, tiles * tile_columns);
        Scratch scratch(memory);
        for (int i = 0; i < workers; ++i) {
            T *own_a = scratch.take<T>(block * together);
            T *b = scratch.take<T>(block * one.vectors * lanes<T>),
              *b2 = scratch.take<T>(block * two.vectors * lanes<T>);
            if (i == id) a = own_a, one.packed = b, two.packed = b2;
        }
        bytes = scratch.bytes();
    }
};

// Columns m0 to m1 of K rows of a, `at` their places, in the order of tiles; their sums are added to `sums`.
template <class S, class T> void pack_columns_of(const S *const *at, long K, long m0, long m1, T *packed, T *sums) {
    constexpr int L = lanes<T>, some = 8; // rows at a time, so that whole lines are written
    for (long k0 = 0; k0 < K; k0 += some) {
        const long k1 = least(k0 + some, K);
        for (long m = m0; m < m1; m += tile_columns) {
            T *to = packed + (m - m0) * K + k0 * tile_columns;
            const long count = least(m1 - m, tile_columns);
            for (long k = k0; k < k1; ++k, to += tile_columns) {
                if constexpr (keeps_near<S>)
                    copy(at[k] + m, count, to);
                else if (count == tile_columns)
                    __builtin_memcpy(to, at[k] + m, tile_columns * sizeof(T));
                else
                    for (long i = 0; i < count; ++i) to[i] = at[k][m + i];
            }
        }
        if (!sums) continue;
        for (long m = m0; m < m1; m += L) {
            const int count = (int)least(m1 - m, L);
            Vec<T> sum = load(sums + m, count);
            for (long k = k0; k < k1; ++k) sum += load(at[k] + m, count);
            store(sums + m, sum, count);
        }
    }
}

template <class S> void row_sums(const RowSums<S> &s, void *memory, const Worker &worker) {
    using T = RealOf<S>;
    RowSumsMemory<S> own(s, memory, worker.id, worker.count);
    constexpr long block = RowSumsMemory<S>::block;
    const S *at[block];
    for (long m = own.first; s.sums && m < own.end; ++m) s.sums[m] = T(0);
    for (long n0 = 0; n0 < s.N && own.first < own.end; n0 += block) {
        const long K = least(block, s.N - n0);
        for (long k = 0; k < K; ++k) {
            const long row = s.rows ? s.rows[n0 + k] : n0 + k;
            at[k] = s.a + row * s.a_stride;
            if (own.one.panels) own.one.pack(k, K, s.b + row * s.b_stride);
            if (own.two.panels) own.two.pack(k, K, s.b2 + row * s.b2_stride);
        }
        for (long m0 = own.first; m0 < own.end; m0 += own.together) {
            const long m1 = least(m0 + own.together, own.end);
            pack_columns_of(at, K, m0, m1, own.a, s.sums);
            for (const Factor<S> *f = &own.one; f; f = f == &own.one ? &own.two : nullptr)
                for (long p = 0; p < f->panels; ++p) {
                    const long v0 = f->first(p), v1 = f->first(p + 1);
                    const int last = (int)least(f->K - (v1 - 1) * lanes<T>, lanes<T>);
                    for (long m = m0; m < m1; m += tile_columns) {
                        if (f == &own.one ? m < s.inner : m >= s.M - s.inner) continue;
                        const long row = f == &own.two && m < s.inner ? s.M - 2 * s.inner + m : m - s.inner;
                        outers<T>[v1 - v0][least(m1 - m, tile_columns) - 1](
                            own.a + (m - m0) * K, f->packed + v0 * K * lanes<T>, K, f->out + row * f->K + v0 * lanes<T>,
                            f->K, last, n0 > 0);
                    }
                }
        }
    }
}

template <class S> long row_sums_bytes(const RowSums<S> &s, int workers, Split) {
    return RowSumsMemory<S>(s, nullptr, 0, workers).bytes;
}

} // namespace bptt::BPTT_VARIANT
