// The interpreter: a program, row tile by row tile, each through all of its steps. Legend and arguments: program.hpp.
//
// Places by row have an address and a distance between rows, which are set anew for every step: where the rows of a
// tile lie at equal distances in a caller's tensor, as they mostly do, they are read and written there; else they are
// gathered in a buffer of the tile first, and scattered from it last. Whatever lies in rows one after the other is gone
// through as one row.
#pragma once

#include "operations.hpp"
#include "product.hpp"
#include "program.hpp"
#include "scratch.hpp"

namespace bptt::BPTT_VARIANT {

constexpr long tile_rows = 32; // of a tile at most

template <class T>
using Multiply = void (*)(const T *const *rows, long K, const T *panel, const T *const *start, T *const *out, int last);

// out[m] = start[m] + the sum over k of rows[m][k] * panel[k], for M rows and NV vectors, of the last of which only
// `last` values count. start null: 0. The order of a sum is the same whatever M and NV are.
template <class T, int NV, int M>
void multiply(const T *const *rows, long K, const T *panel, const T *const *start, T *const *out, int last) {
    constexpr int L = lanes<T>;
    Vec<T> sum[M][NV];
    const T *row[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
        row[m] = rows[m];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) sum[m][v] = Vec<T>{};
    }
    if (start)
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[m][v] = v + 1 < NV ? load(start[m] + v * L) : load(start[m] + v * L, last);
    for (long k = 0; k < K; ++k, panel += NV * L) {
        Vec<T> w[NV];
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v) w[v] = load(panel + v * L);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) {
            const Vec<T> x = broadcast(row[m][k]);
#pragma GCC unroll 8
            for (int v = 0; v < NV; ++v) sum[m][v] += x * w[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
        for (int v = 0; v < NV; ++v)
            if (v + 1 < NV)
                store(out[m] + v * L, sum[m][v]);
            else
                store(out[m] + v * L, sum[m][v], last);
}

template <class T, int NV, int M> constexpr Multiply<T> multiply_if_it_fits() {
    if constexpr (NV * M <= accumulators)
        return multiply<T, NV, M>;
    else
        return nullptr;
}

template <class T, int NV>
constexpr Multiply<T> multiply_of[most_rows] = {
    multiply_if_it_fits<T, NV, 1>(), multiply_if_it_fits<T, NV, 2>(), multiply_if_it_fits<T, NV, 3>(),
    multiply_if_it_fits<T, NV, 4>(), multiply_if_it_fits<T, NV, 5>(), multiply_if_it_fits<T, NV, 6>(),
};

template <class T>
constexpr const Multiply<T> *multiplies[9] = {nullptr,           multiply_of<T, 1>, multiply_of<T, 2>,
                                              multiply_of<T, 3>, multiply_of<T, 4>, multiply_of<T, 5>,
                                              multiply_of<T, 6>, multiply_of<T, 7>, multiply_of<T, 8>};

// How weights [K, units] are packed: panels of V vectors of units, each K rows.
template <class T> struct Packing {
    static constexpr int L = lanes<T>;
    int V, together; // rows at once
    long vectors, panels;

    Packing(long units, long rows) {
        V = rows < 4 ? 8 : accumulators / 6;
        together = accumulators / V < most_rows ? accumulators / V : most_rows;
        vectors = (units + L - 1) / L;
        panels = (vectors + V - 1) / V;
    }

    static long values(long K, long units) { return (units + L - 1) / L * L * K; }
    int vectors_of(long p) const { return (int)(vectors - p * V < V ? vectors - p * V : V); }
};

// w[k * down + unit * across].
template <class T> void pack_weights(const T *w, long down, long across, long K, long units, long rows, T *out) {
    constexpr int L = lanes<T>;
    const Packing<T> packing(units, rows);
    for (long p = 0; p < packing.panels; ++p) {
        const long width = (long)packing.vectors_of(p) * L, first = p * packing.V * L;
        if (across == 1) {
            for (long k = 0; k < K; ++k)
                for (long i = 0; i < width; i += L) {
                    const long unit = first + i;
                    store(out + k * width + i, load(w + k * down + unit, (int)(units - unit < L ? units - unit : L)));
                }
        } else {
            for (long i = 0; i < width; i += L) {
                long k = 0;
                if (down == 1 && first + i + L <= units)
                    for (; k + L <= K; k += L) {
                        Vec<T> v[L];
#pragma GCC unroll 16
                        for (int r = 0; r < L; ++r) v[r] = load(w + (first + i + r) * across + k);
                        transpose<T>(v);
#pragma GCC unroll 16
                        for (int r = 0; r < L; ++r) store(out + (k + r) * width + i, v[r]);
                    }
                for (; k < K; ++k)
                    for (long r = i; r < i + L; ++r)
                        out[k * width + r] = first + r < units ? w[k * down + (first + r) * across] : T(0);
            }
        }
        out += K * width;
    }
}

// The sum, mean, largest or smallest of n values; NaN if one is.
template <class T> T reduced(Op op, const T *x, long n) {
    constexpr int L = lanes<T>;
    if (op == Op::sum || op == Op::mean) {
        Vec<T> sums[4] = {};
        long i = 0;
        for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
            for (int v = 0; v < 4; ++v) sums[v] += load(x + i + v * L);
        for (int v = 0; i < n; i += L, ++v) sums[v] += load(x + i, (int)(n - i < L ? n - i : L));
        const Vec<T> sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        T total[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) total[i] = sum[i];
#pragma GCC unroll 16
        for (int D = L / 2; D > 0; D /= 2)
            for (int i = 0; i < D; ++i) total[i] += total[i + D];
        return op == Op::mean ? total[0] / T(n) : total[0];
    }
    T found = x[0];
    for (long i = 1; i < n; ++i)
        found = (op == Op::most ? found > x[i] : found < x[i]) || found != found ? found : x[i];
    return found;
}

template <class T> struct Machine {
    const Program<T> &a;
    void *const *base;  // [places]
    const long *stride; // [places] from row to row
    long rows_packed;   // rows that weights are packed for

    struct At {
        T *p;
        long row;
    };

    BPTT_INLINE At at(const Operand &x) const { return {static_cast<T *>(base[x.place]) + x.offset, stride[x.place]}; }

    // Instructions i0 to i1 for so many rows of the tile.
    void run(long i0, long i1, long rows) const {
        for (long i = i0; i < i1; ++i) {
            const Instruction &in = a.code[i];
            if (in.op >= (long)Op::element_wise) {
                element_wise(in, rows);
                continue;
            }
            switch ((Op)in.op) {
            case Op::copy: copy(in, rows); break;
            case Op::product: product(in, rows); break;
            case Op::pack: pack(in); break;
            case Op::small: small(in, rows); break;
            case Op::add_rows: add_rows(in, rows); break;
            default: reduce(in, rows);
            }
        }
    }

    // For all n[0], n[1], n[2]: f(the distances of the operands).
    template <int operands, class F> BPTT_INLINE void nest(const Instruction &in, F f) const {
        for (long i0 = 0; i0 < in.n[0]; ++i0)
            for (long i1 = 0; i1 < in.n[1]; ++i1)
                for (long i2 = 0; i2 < in.n[2]; ++i2) {
                    long d[operands];
                    for (int x = 0; x < operands; ++x) {
                        const auto &s = in.x[x].strides;
                        d[x] = i0 * s[0] + i1 * s[1] + i2 * s[2];
                    }
                    f(d);
                }
    }

    void element_wise(const Instruction &in, long rows) const {
        const Each<T> each = operations<T>[in.op - (long)Op::element_wise].each[in.modes];
        const At out = at(in.x[0]), x = at(in.x[1]);
        const At y = in.x[2].place >= 0 ? at(in.x[2]) : At{x.p, 0}, z = in.x[3].place >= 0 ? at(in.x[3]) : At{x.p, 0};
        const long n = in.n[3];
        if (in.n[0] * in.n[1] * in.n[2] == 1) {
            const auto follows = [&](const At &p, int i) {
                return in.x[i].place < 0 || p.row == (in.modes & (1 << (i - 1)) ? 0 : n);
            };
            if (rows == 1 || (out.row == n && follows(x, 1) && follows(y, 2) && follows(z, 3)))
                return each(1, rows * n, out.p, 0, x.p, 0, y.p, 0, z.p, 0);
            return each(rows, n, out.p, out.row, x.p, x.row, y.p, y.row, z.p, z.row);
        }
        nest<4>(in, [&](const long *d) {
            each(rows, n, out.p + d[0], out.row, x.p + d[1], x.row, y.p + d[2], y.row, z.p + d[3], z.row);
        });
    }

    void copy(const Instruction &in, long rows) const {
        const At out = at(in.x[0]), x = at(in.x[1]);
        const long n = in.n[3], to = in.x[0].strides[3], from = in.x[1].strides[3];
        nest<2>(in, [&](const long *d) {
            for (long r = 0; r < rows; ++r) {
                T *p = out.p + d[0] + r * out.row;
                const T *q = x.p + d[1] + r * x.row;
                for (long i = 0; i < n; ++i) p[i * to] = q[i * from];
            }
        });
    }

    void pack(const Instruction &in) const {
        pack_weights<T>(at(in.x[1]).p, in.x[1].strides[0], in.x[1].strides[1], in.n[1], in.n[2], rows_packed,
                        at(in.x[0]).p);
    }

    void product(const Instruction &in, long rows) const {
        constexpr int L = lanes<T>;
        const long k = in.n[0], K = in.n[1], units = in.n[2];
        const At out = at(in.x[0]), x = at(in.x[1]);
        const bool starts = in.x[3].place >= 0;
        const At s = starts ? at(in.x[3]) : At{nullptr, 0};
        const Packing<T> packing(units, rows_packed);
        const T *panel = at(in.x[2]).p;
        for (long p = 0; p < packing.panels; ++p) {
            const int vectors = packing.vectors_of(p);
            const long first = p * packing.V * L;
            const int last = (int)(units - first - (vectors - 1) * L < L ? units - first - (vectors - 1) * L : L);
            const long count = rows * k;
            for (long m0 = 0; m0 < count;) {
                const long left = (count - m0 + packing.together - 1) / packing.together;
                const int M = (int)((count - m0 + left - 1) / left);
                const T *from[most_rows], *start[most_rows];
                T *to[most_rows];
                for (int m = 0; m < M; ++m) {
                    const long row = k == 1 ? m0 + m : (m0 + m) / k, part = k == 1 ? 0 : (m0 + m) % k;
                    from[m] = x.p + row * x.row + part * in.x[1].strides[2];
                    to[m] = out.p + row * out.row + part * in.x[0].strides[2] + first;
                    start[m] = starts ? s.p + row * s.row + part * in.x[3].strides[2] + first : nullptr;
                }
                multiplies<T>[vectors][M - 1](from, K, panel, starts ? start : nullptr, to, last);
                m0 += M;
            }
            panel += K * vectors * L;
        }
    }

    void small(const Instruction &in, long rows) const {
        constexpr int L = lanes<T>;
        const At out = at(in.x[0]), x = at(in.x[1]), y = at(in.x[2]);
        const auto &so = in.x[0].strides, &sx = in.x[1].strides, &sy = in.x[2].strides;
        const long K = in.n[2], J = in.n[3];
        for (long r = 0; r < rows; ++r)
            for (long b = 0; b < in.n[0]; ++b)
                for (long i = 0; i < in.n[1]; ++i) {
                    T *to = out.p + r * out.row + b * so[0] + i * so[1];
                    const T *p = x.p + r * x.row + b * sx[0] + i * sx[1];
                    const T *q = y.p + r * y.row + b * sy[0];
                    if (sy[2] == 1 && so[2] == 1) {
                        for (long j = 0; j < J; j += L) {
                            const int count = (int)(J - j < L ? J - j : L);
                            Vec<T> sum{};
                            for (long k = 0; k < K; ++k)
                                sum += broadcast(p[k * sx[2]]) * load(q + k * sy[1] + j, count);
                            store(to + j, sum, count);
                        }
                    } else {
                        for (long j = 0; j < J; ++j) {
                            const T *w = q + j * sy[2];
                            T sum = 0;
                            if (sx[2] == 1 && sy[1] == 1) {
                                Vec<T> sums{};
                                for (long k = 0; k < K; k += L) {
                                    const int count = (int)(K - k < L ? K - k : L);
                                    sums += load(p + k, count) * load(w + k, count);
                                }
                                for (int l = 0; l < L; ++l) sum += sums[l];
                            } else {
                                for (long k = 0; k < K; ++k) sum += p[k * sx[2]] * w[k * sy[1]];
                            }
                            to[j * so[2]] = sum;
                        }
                    }
                }
    }

    void reduce(const Instruction &in, long rows) const {
        const At out = at(in.x[0]), x = at(in.x[1]);
        nest<2>(in, [&](const long *d) {
            for (long r = 0; r < rows; ++r)
                out.p[d[0] + r * out.row] = reduced<T>((Op)in.op, x.p + d[1] + r * x.row, in.n[3]);
        });
    }

    // Sums are of doubles: there are many rows.
    void add_rows(const Instruction &in, long rows) const {
        double *sums = static_cast<double *>(base[in.x[0].place]) + in.x[0].offset;
        const At x = at(in.x[1]);
        const long to = in.x[0].strides[3], from = in.x[1].strides[3];
        nest<2>(in, [&](const long *d) {
            for (long r = 0; r < rows; ++r)
                for (long i = 0; i < in.n[3]; ++i) sums[d[0] + i * to] += (double)x.p[d[1] + r * x.row + i * from];
        });
    }
};

template <class T> BPTT_INLINE void copy_row(T *to, const T *from, long n) {
    for (long i = 0; i < n; i += lanes<T>) {
        const int count = (int)(n - i < lanes<T> ? n - i : lanes<T>);
        store(to + i, load(from + i, count), count);
    }
}

template <class T> BPTT_INLINE void zero_row(T *to, long n) {
    for (long i = 0; i < n; ++i) to[i] = T(0);
}

// Everything a worker needs besides the program, from one scratch memory.
template <class T> struct ProgramMemory {
    long rows; // of a tile
    T *tile = nullptr, *zeros = nullptr;
    void **base = nullptr; // [places] this worker's
    long *stride = nullptr;
    long *columns = nullptr, *at = nullptr; // [N] this worker's columns; [rows] where they are
    void **shared = nullptr;                // [places] what is computed once, of all workers
    double **sums = nullptr;                // [places, workers]
    long bytes;

    ProgramMemory(const Program<T> &a, void *memory, int id, int workers) {
        Scratch scratch(memory);
        const long all = a.back ? a.N : a.B, own = (all + workers - 1) / workers;
        const long tiles = (own + tile_rows - 1) / tile_rows;
        rows = tiles ? (own + tiles - 1) / tiles : 1;
        if (a.overlaps && workers > 1) rows = tile_rows; // shares of lanes are not equal ones of columns
        shared = scratch.take<void *>(a.places);
        sums = scratch.take<double *>(a.places * workers);
        long widest = 1;
        for (long p = 0; p < a.places; ++p) {
            const Place &place = a.place[p];
            if (place.kind != Kind::packed && place.width > widest) widest = place.width;
            void *values = nullptr;
            if (place.kind == Kind::once) values = scratch.take<T>(place.width);
            if (place.kind == Kind::packed) values = scratch.take<T>(Packing<T>::values(place.at, place.width));
            if (shared && id == 0) shared[p] = values;
            if (place.kind == Kind::sum)
                for (int i = 0; i < workers; ++i) {
                    double *values = scratch.take<double>(place.width);
                    if (sums && id == 0) sums[p * workers + i] = values;
                }
        }
        zeros = scratch.take<T>(widest);
        for (int i = 0; i < workers; ++i) {
            T *own_tile = scratch.take<T>(a.row_values * rows);
            void **own_base = scratch.take<void *>(a.places);
            long *own_stride = scratch.take<long>(a.places);
            long *own_columns = a.back ? scratch.take<long>(a.N) : nullptr, *own_at = scratch.take<long>(rows);
            if (i == id) tile = own_tile, base = own_base, stride = own_stride, columns = own_columns, at = own_at;
        }
        bytes = scratch.bytes();
    }
};

template <class T> struct Walk {
    const Program<T> &a;
    const Worker &worker;
    ProgramMemory<T> s;
    Machine<T> machine;

    Walk(const Program<T> &a, void *memory, const Worker &worker)
        : a(a), worker(worker), s(a, memory, worker.id, worker.count), machine{a, s.base, s.stride, s.rows} {}

    T *outside(long p) const { return reinterpret_cast<T *>(a.outside[p]); }
    T *buffer(long at) const { return s.tile + at * s.rows; }

    // What is computed once, by the first worker; the places that do not move from step to step.
    void begin() {
        if (worker.id == 0)
            for (long p = 0; p < a.places; ++p)
                if (a.place[p].kind == Kind::sum)
                    for (int i = 0; i < worker.count; ++i)
                        for (long j = 0; j < a.place[p].width; ++j) s.sums[p * worker.count + i][j] = 0;
        if (worker.id == 0) {
            long widest = 1;
            for (long p = 0; p < a.places; ++p)
                if (a.place[p].kind != Kind::packed && a.place[p].width > widest) widest = a.place[p].width;
            zero_row(s.zeros, widest);
        }
        if (worker.id != 0) worker.wait();
        for (long p = 0; p < a.places; ++p) {
            const Place &place = a.place[p];
            s.stride[p] = 0;
            s.base[p] = nullptr;
            switch (place.kind) {
            case Kind::outside: s.base[p] = outside(p); break;
            case Kind::once:
            case Kind::packed: s.base[p] = s.shared[p]; break;
            case Kind::sum: s.base[p] = s.sums[p * worker.count + worker.id]; break;
            default: s.base[p] = place.at >= 0 ? buffer(place.at) : nullptr, s.stride[p] = place.width;
            }
        }
        if (worker.id == 0) {
            machine.run(0, a.once, 1);
            worker.wait();
        }
    }

    void forward() {
        const long b0 = a.B * worker.id / worker.count, b1 = a.B * (worker.id + 1) / worker.count;
        for (long first = b0; first < b1; first += s.rows) {
            const long rows = b1 - first < s.rows ? b1 - first : s.rows;
            for (long t = 0; t < a.T; ++t) {
                const long row = t * a.B + first;
                bool resets = false;
                if (a.resets)
                    for (long r = 0; r < rows; ++r) resets |= a.resets[row + r] != 0;
                for (long p = 0; p < a.places; ++p) {
                    const Place &place = a.place[p];
                    const long width = place.width;
                    switch (place.kind) {
                    case Kind::input:
                    case Kind::output: s.base[p] = outside(p) + row * width; break;
                    case Kind::next: s.base[p] = outside(p) + (row + a.B) * width; break;
                    case Kind::carry: {
                        T *from = outside(p) + row * width, *to = buffer(place.at);
                        s.base[p] = resets ? to : from;
                        for (long r = 0; resets && r < rows; ++r)
                            if (a.resets[row + r])
                                zero_row(to + r * width, width);
                            else
                                copy_row(to + r * width, from + r * width, width);
                        break;
                    }
                    default: break;
                    }
                }
                machine.run(a.once, a.count, rows);
            }
        }
    }

    long top(long n) const { return a.columns[n]; }
    long lane(long n) const { return a.columns[a.N + n]; }
    long length(long n) const { return a.columns[2 * a.N + n]; }
    long slot(long n) const { return a.columns[3 * a.N + n]; }
    long own(long n) const { return a.columns[4 * a.N + n]; }
    long arrives(long n) const { return a.columns[5 * a.N + n]; }

    // This worker's columns, in their order: a range of equal work, or, where rows of several columns add up, those of
    // a range of lanes, so that no two workers write to the same row.
    long choose() {
        long count = 0;
        if (a.overlaps && worker.count > 1) {
            const long b0 = a.B * worker.id / worker.count, b1 = a.B * (worker.id + 1) / worker.count;
            for (long n = 0; n < a.N; ++n)
                if (lane(n) >= b0 && lane(n) < b1) s.columns[count++] = n;
            return count;
        }
        long total = 0, sum = 0;
        for (long n = 0; n < a.N; ++n) total += length(n);
        for (long n = 0; n < a.N; sum += length(n), ++n)
            if (sum * worker.count >= total * worker.id && sum * worker.count < total * (worker.id + 1))
                s.columns[count++] = n;
        return count;
    }

    void sweep() {
        const long count = choose();
        for (long first = 0; first < count; first += s.rows)
            tile(s.columns + first, count - first < s.rows ? count - first : s.rows);
        bool sums = false;
        for (long p = 0; p < a.places; ++p) sums |= a.place[p].kind == Kind::sum;
        if (!sums) return;
        worker.wait();
        if (worker.id != 0) return;
        for (long p = 0; p < a.places; ++p)
            if (a.place[p].kind == Kind::sum)
                for (long i = 0; i < a.place[p].width; ++i) {
                    double sum = 0;
                    for (int w = 0; w < worker.count; ++w) sum += s.sums[p * worker.count + w][i];
                    outside(p)[i] = T(sum);
                }
    }

    // The walk of some columns, the longest first.
    void tile(const long *columns, long size) {
        long least_own = own(columns[0]), most_own = least_own;
        for (long r = 0; r < size; ++r) {
            const long n = columns[r];
            s.at[r] = top(n) * a.B + lane(n);
            if (own(n) < least_own) least_own = own(n);
            if (own(n) > most_own) most_own = own(n);
        }
        const long distance = size > 1 ? s.at[1] - s.at[0] : 1;
        long regular = 1; // so many lie at equal distances
        while (regular < size && s.at[regular] - s.at[regular - 1] == distance) ++regular;
        for (long p = 0; p < a.places; ++p) {
            const Place &place = a.place[p];
            if (place.kind == Kind::back) s.base[p] = buffer(place.at);
            if (place.kind != Kind::adjoint) continue;
            T *to = buffer(place.at);
            s.base[p] = to;
            const T *arriving = reinterpret_cast<const T *>(a.arriving[p]);
            for (long r = 0; r < size; ++r) {
                const long row = arriving ? arrives(columns[r]) : -1;
                if (row >= 0)
                    copy_row(to + r * place.width, arriving + row * place.width, place.width);
                else
                    zero_row(to + r * place.width, place.width);
            }
        }
        long rows = size;
        for (long j = 0; rows > 0; ++j) {
            place(columns, rows, j, rows <= regular, distance, least_own, most_own);
            machine.run(a.once, a.count, rows);
            spread(rows, rows <= regular);
            long going = rows;
            while (going > 0 && length(columns[going - 1]) <= j + 1) --going;
            hand_on(columns, rows, going);
            for (long r = 0; r < going; ++r) s.at[r] -= a.B;
            rows = going;
        }
    }

    // Where the rows of the j-th step of the walk lie.
    void place(const long *columns, long rows, long j, bool regular, long distance, long least_own, long most_own) {
        for (long p = 0; p < a.places; ++p) {
            const Place &place = a.place[p];
            const long width = place.width;
            if (place.kind == Kind::output) {
                const bool there = regular && !a.overlaps;
                s.base[p] = there ? outside(p) + s.at[0] * width : buffer(place.at);
                s.stride[p] = there ? distance * width : width;
            } else if (place.kind == Kind::owned && j >= most_own) {
                s.base[p] = s.zeros, s.stride[p] = 0;
            } else if (place.kind == Kind::input || place.kind == Kind::owned) {
                const bool whole = place.kind == Kind::input || j < least_own;
                const T *from = outside(p);
                if (regular && whole) {
                    s.base[p] = const_cast<T *>(from) + s.at[0] * width, s.stride[p] = distance * width;
                    continue;
                }
                T *to = buffer(place.at);
                s.base[p] = to, s.stride[p] = width;
                for (long r = 0; r < rows; ++r)
                    if (whole || j < own(columns[r]))
                        copy_row(to + r * width, from + s.at[r] * width, width);
                    else
                        zero_row(to + r * width, width);
            }
        }
    }

    // Rows that are not written where they belong.
    void spread(long rows, bool regular) {
        if (regular && !a.overlaps) return;
        for (long p = 0; p < a.places; ++p) {
            const long width = a.place[p].width;
            if (a.place[p].kind != Kind::output) continue;
            const T *from = static_cast<const T *>(s.base[p]);
            for (long r = 0; r < rows; ++r, from += width) {
                T *to = outside(p) + s.at[r] * width;
                if (!a.overlaps)
                    copy_row(to, from, width);
                else
                    for (long i = 0; i < width; i += lanes<T>) {
                        const int count = (int)(width - i < lanes<T> ? width - i : lanes<T>);
                        store(to + i, load(to + i, count) + load(from + i, count), count);
                    }
            }
        }
    }

    // What goes on to the step before, and of the columns that end here, out. A closed edge stops NaN too.
    void hand_on(const long *columns, long rows, long going) {
        for (long p = 0; p < a.places; ++p) {
            const Place &place = a.place[p];
            const long width = place.width;
            if (place.kind == Kind::back) {
                T *leaving = reinterpret_cast<T *>(a.leaving[p]), *from = static_cast<T *>(s.base[p]);
                for (long r = 0; r < rows; ++r) {
                    T *row = from + r * width;
                    const T factor = a.edge_factors ? a.edge_factors[s.at[r]] : T(1);
                    if (factor == T(0))
                        zero_row(row, width);
                    else if (factor != T(1))
                        for (long i = 0; i < width; ++i) row[i] *= factor;
                    if (r >= going && leaving) copy_row(leaving + slot(columns[r]) * width, row, width);
                }
            }
        }
        for (long p = 0; p < a.places; ++p) {
            const Place &place = a.place[p];
            if (place.kind != Kind::adjoint) continue;
            if (place.partner >= 0) {
                void *sent = s.base[place.partner];
                s.base[place.partner] = s.base[p], s.base[p] = sent;
            } else {
                zero_row(static_cast<T *>(s.base[p]), going * place.width);
            }
        }
    }
};

template <class T> long program_bytes(const Program<T> &a, int workers, Split) {
    return ProgramMemory<T>(a, nullptr, 0, workers).bytes;
}

template <class T> void program_run(const Program<T> &a, void *memory, const Worker &worker) {
    Walk<T> walk(a, memory, worker);
    walk.begin();
    if (a.back)
        walk.sweep();
    else
        walk.forward();
}

} // namespace bptt::BPTT_VARIANT
