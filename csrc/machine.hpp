// The instructions of a program, each for the rows of a tile. Legend and arguments: program.hpp.
//
// Instructions between products are carried out for so few rows together that what one writes is in the first cache
// when the next one reads it; a product takes all rows of the tile, for its weights to be read once, and so does a sum
// of products over rows, for its sums.
#pragma once

#include "convolved.hpp"
#include "indexed.hpp"
#include "matrices.hpp"
#include "narrow.hpp"
#include "operations.hpp"
#include "packed.hpp"
#include "program.hpp"
#include "reduced.hpp"

namespace bptt::BPTT_VARIANT {

constexpr long near_bytes = 48 * 1024; // of rows that instructions between products are carried out for together

template <class T> struct Machine {
    static constexpr int L = lanes<T>;

    const Program<T> &a;
    void *const *base;  // [places]
    const long *stride; // [places] from row to row
    long rows_packed;   // rows that weights are packed for
    long first = 0;     // row that instructions begin with

    struct At {
        T *p;
        long row;
    };

    BPTT_INLINE At at(const Operand &x) const {
        const long row = stride[x.place];
        return {static_cast<T *>(base[x.place]) + first * row + x.offset, row};
    }

    BPTT_INLINE At at_or(const Operand &x, const At &other) const { return x.place >= 0 ? at(x) : At{other.p, 0}; }

    // Instructions i0 to i1 for so many rows of the tile.
    void run(long i0, long i1, long rows) {
        const long bytes = a.row_values * (long)sizeof(T), near = bytes ? near_bytes / bytes : rows;
        const long together = near < 1 ? 1 : near;
        for (long i = i0; i < i1;) {
            long end = i + 1;
            if (!takes_all(a.code[i]))
                while (end < i1 && !takes_all(a.code[end])) ++end;
            const long most = end - i > 1 && together < rows ? together : rows;
            for (first = 0; first < rows; first += most)
                for (long j = i; j < end; ++j) one(a.code[j], rows - first < most ? rows - first : most);
            first = 0;
            i = end;
        }
    }

    static bool takes_all(const Instruction &in) {
        return in.op == (long)Op::product || in.op == (long)Op::add_outer || in.op == (long)Op::correlate;
    }

    void one(const Instruction &in, long rows) const {
        if (in.op >= (long)Op::element_wise) return element_wise(in, rows);
        switch ((Op)in.op) {
        case Op::copy: return copy(in, rows);
        case Op::product: return product(in, rows);
        case Op::pack: return pack(in);
        case Op::small: return small(in, rows);
        case Op::solve: return solve(in, rows);
        case Op::cumsum:
        case Op::cumprod: return by_line(in, rows, cumulated_row<T>);
        case Op::gather: return by_index(in, rows, gather_row<T>);
        case Op::scatter:
        case Op::scatter_add: return by_index(in, rows, scatter_row<T>);
        case Op::argmax:
        case Op::argmin: return by_line(in, rows, extreme_index<T>);
        case Op::order: return by_line(in, rows, order_row<T>);
        case Op::add_rows: return add_rows(in, rows);
        case Op::add_outer: return add_outer(in, rows);
        case Op::convolve: return convolve(in, rows);
        case Op::correlate: return correlate(in, rows);
        default: return reduce(in, rows);
        }
    }

    // For all n[0], n[1], and up to n[dimensions - 1]: f(the distances of the operands).
    template <int operands, int dimensions, class F> BPTT_INLINE void nest(const Instruction &in, F f) const {
        for (long i0 = 0; i0 < in.n[0]; ++i0)
            for (long i1 = 0; i1 < in.n[1]; ++i1)
                for (long i2 = 0; i2 < (dimensions > 2 ? in.n[2] : 1); ++i2) {
                    long d[operands];
                    for (int x = 0; x < operands; ++x) {
                        const auto &s = in.x[x].strides;
                        d[x] = i0 * s[0] + i1 * s[1] + i2 * s[2];
                    }
                    f(d);
                }
    }

    void element_wise(const Instruction &in, long rows) const {
        const Each<T> *all = operations<T>[in.op - (long)Op::element_wise].each;
        const At out = at(in.x[0]), x = at(in.x[1]), y = at_or(in.x[2], x), z = at_or(in.x[3], x);
        const long n = in.n[3];
        if (in.n[0] * in.n[1] * in.n[2] == 1) {
            const auto follows = [&](const At &p, int i) {
                return in.x[i].place < 0 || p.row == (in.modes & (1 << (i - 1)) ? 0 : n);
            };
            const Each<T> each = all[in.modes];
            if (rows == 1 || (out.row == n && follows(x, 1) && follows(y, 2) && follows(z, 3)))
                return each(1, rows * n, out.p, 0, x.p, 0, y.p, 0, z.p, 0);
            return each(rows, n, out.p, out.row, x.p, x.row, y.p, y.row, z.p, z.row);
        }
        const bool narrow = n < 2 * L && n <= spread_most && in.x[0].strides[2] == n;
        for (long r = 0; r < rows; ++r)
            nest<4, 2>(in, [&](const long *d) {
                T *to = out.p + d[0] + r * out.row;
                const T *from[3] = {x.p + d[1] + r * x.row, y.p + d[2] + r * y.row, z.p + d[3] + r * z.row};
                if (narrow)
                    narrow_rows<T>(in, all, to, from);
                else
                    all[in.modes](in.n[2], n, to, in.x[0].strides[2], from[0], in.x[1].strides[2], from[1],
                                  in.x[2].strides[2], from[2], in.x[3].strides[2]);
            });
    }

    void copy(const Instruction &in, long rows) const {
        const At out = at(in.x[0]), x = at(in.x[1]);
        const long n = in.n[3], to = in.x[0].strides[3], from = in.x[1].strides[3];
        const auto of_each = [&](auto values) __attribute__((always_inline)) {
            nest<2, 3>(in, [&](const long *d) __attribute__((always_inline)) {
                T *p = out.p + d[0];
                const T *q = x.p + d[1];
                for (long r = 0; r < rows; ++r, p += out.row, q += x.row) values(p, q);
            });
        };
        const auto few = [&]<int N>() __attribute__((always_inline)) { // a loop would cost more than the values
            of_each([&](T *p, const T *q) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int i = 0; i < N; ++i) p[i * to] = q[i * from];
            });
        };
        if (n == 2) return few.template operator()<2>();
        if (n == 3) return few.template operator()<3>();
        if (n == 4) return few.template operator()<4>();
        of_each([&](T *p, const T *q) __attribute__((always_inline)) {
            for (long i = 0; i < n; ++i) p[i * to] = q[i * from];
        });
    }

    void pack(const Instruction &in) const {
        pack_weights<T>(at(in.x[1]).p, in.x[1].strides[0], in.x[1].strides[1], in.n[1], in.n[2], rows_packed,
                        at(in.x[0]).p);
    }

    void product(const Instruction &in, long rows) const {
        const long k = in.n[0], K = in.n[1], units = in.n[2], inner = in.n[3];
        const At out = at(in.x[0]), x = at(in.x[1]);
        const bool starts = in.x[3].place >= 0;
        const At s = starts ? at(in.x[3]) : At{nullptr, 0};
        const Packing<T> packing(units, rows_packed);
        const T *panel = at(in.x[2]).p;
        const long length = inner ? inner : k, lines = k / length;
        for (long p = 0; p < packing.panels; ++p) {
            const int vectors = packing.vectors_of(p);
            const long first = p * packing.V * L;
            const int last = (int)(units - first - (vectors - 1) * L < L ? units - first - (vectors - 1) * L : L);
            const Multiply<T> *const multiply =
                a.back && packing.few && vectors <= 4 ? multiplies_in_parts<T>[vectors] : multiplies<T>[vectors];
            const long count = rows * k;
            long row = 0, line = 0, place = 0; // of the next one: in the tile, and in the grid of its row
            for (long m0 = 0; m0 < count;) {
                const long left = (count - m0 + packing.together - 1) / packing.together;
                const int M = (int)((count - m0 + left - 1) / left);
                const T *from[most_rows], *start[most_rows];
                T *to[most_rows];
                for (int m = 0; m < M; ++m) {
                    const auto within = [&](const Operand &x) { return line * x.strides[1] + place * x.strides[2]; };
                    from[m] = x.p + row * x.row + within(in.x[1]);
                    to[m] = out.p + row * out.row + within(in.x[0]) + first;
                    start[m] = starts ? s.p + row * s.row + within(in.x[3]) + first : nullptr;
                    if (++place == length) place = 0, ++line;
                    if (line == lines) line = 0, ++row;
                }
                multiply[M - 1](from, K, panel, starts ? start : nullptr, to, last);
                m0 += M;
            }
            panel += K * vectors * L;
        }
    }

    void convolve(const Instruction &in, long rows) const {
        const At out = at(in.x[0]), x = at(in.x[1]), w = at(in.x[2]), s = at_or(in.x[3], At{nullptr, 0});
        for (long r = 0; r < rows; ++r) convolve_row<T>(in, out.p + r * out.row, x.p + r * x.row, w.p, s.p + r * s.row);
    }

    void correlate(const Instruction &in, long rows) const {
        double *sums = static_cast<double *>(base[in.x[0].place]) + in.x[0].offset;
        const At errors = at(in.x[1]), x = at(in.x[2]);
        correlate_rows<T>(in, rows, sums, errors.p, errors.row, x.p, x.row);
    }

    // A product of small matrices [I, K] and [K, J] of each row. One with a vector on the right is turned round.
    void small(const Instruction &in, long rows) const {
        const bool turned = in.n[3] == 1 && in.n[1] > 1;
        const Operand &left = in.x[turned ? 2 : 1], &right = in.x[turned ? 1 : 2];
        const At out = at(in.x[0]), x = at(left), y = at(right);
        const long I = turned ? 1 : in.n[1], K = in.n[2], J = turned ? in.n[1] : in.n[3];
        const long so[3] = {in.x[0].strides[0], in.x[0].strides[turned ? 2 : 1], in.x[0].strides[turned ? 1 : 2]};
        const long sx[3] = {left.strides[0], left.strides[turned ? 2 : 1], left.strides[turned ? 1 : 2]};
        const long sy[3] = {right.strides[0], right.strides[turned ? 2 : 1], right.strides[turned ? 1 : 2]};
        for (long r = 0; r < rows; ++r) {
            T *to = out.p + r * out.row;
            const T *p = x.p + r * x.row, *q = y.p + r * y.row;
            const bool dots = sx[2] == 1 && sy[1] == 1, along = sy[2] == 1 && so[2] == 1;
            if (along && !(dots && J == 1)) {
                for (long b = 0; b < in.n[0]; ++b)
                    for (long i = 0; i < I; ++i)
                        combine<T>(to + b * so[0] + i * so[1], p + b * sx[0] + i * sx[1], sx[2], q + b * sy[0], sy[1],
                                   K, J);
            } else if (dots) {
                LanesOfSums<T> sums;
                for (long b = 0; b < in.n[0]; ++b)
                    for (long i = 0; i < I; ++i)
                        for (long j = 0; j < J; ++j) {
                            const T *u = p + b * sx[0] + i * sx[1], *w = q + b * sy[0] + j * sy[2];
                            Vec<T> sum{};
                            long k = 0;
                            for (; k + L <= K; k += L) sum += load(u + k) * load(w + k);
                            if (k < K) sum += load(u + k, (int)(K - k)) * load(w + k, (int)(K - k));
                            sums.add(sum, to + b * so[0] + i * so[1] + j * so[2]);
                        }
                sums.finish();
            } else {
                for (long b = 0; b < in.n[0]; ++b)
                    for (long i = 0; i < I; ++i)
                        for (long j = 0; j < J; ++j) {
                            T sum = 0;
                            for (long k = 0; k < K; ++k)
                                sum += p[b * sx[0] + i * sx[1] + k * sx[2]] * q[b * sy[0] + k * sy[1] + j * sy[2]];
                            to[b * so[0] + i * so[1] + j * so[2]] = sum;
                        }
            }
        }
    }

    void solve(const Instruction &in, long rows) const {
        const At out = at(in.x[0]), a = at(in.x[1]), b = at(in.x[2]);
        for (long r = 0; r < rows; ++r) solve_systems<T>(in, out.p + r * out.row, a.p + r * a.row, b.p + r * b.row);
    }

    void reduce(const Instruction &in, long rows) const {
        const At out = at(in.x[0]), x = at(in.x[1]);
        const Op op = (Op)in.op;
        const long n = in.n[3], along = in.x[1].strides[3];
        if (along != 1) return reduce_across(in, rows);
        if ((op == Op::sum || op == Op::mean) && fill_registers<T>(n) && in.x[0].strides[2] == 1 &&
            in.x[1].strides[2] == n) {
            for (long r = 0; r < rows; ++r)
                nest<2, 2>(in, [&](const long *d) {
                    sums_of_narrow_rows<T>(out.p + d[0] + r * out.row, x.p + d[1] + r * x.row, in.n[2], n,
                                           op == Op::mean);
                });
            return;
        }
        if (op != Op::sum && op != Op::mean) {
            nest<2, 3>(in, [&](const long *d) {
                for (long r = 0; r < rows; ++r) out.p[d[0] + r * out.row] = extreme<T>(op, x.p + d[1] + r * x.row, n);
            });
            return;
        }
        LanesOfSums<T> sums;
        for (long r = 0; r < rows; ++r)
            nest<2, 3>(in, [&](const long *d) {
                const T *p = x.p + d[1] + r * x.row;
                Vec<T> part[4] = {};
                long i = 0;
                for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
                    for (int v = 0; v < 4; ++v) part[v] += load(p + i + v * L);
#pragma GCC unroll 4
                for (int v = 0; v < 4; ++v)
                    if (i + v * L < n) part[v] += load(p + i + v * L, (int)(n - i - v * L < L ? n - i - v * L : L));
                Vec<T> sum = (part[0] + part[1]) + (part[2] + part[3]);
                if (op == Op::mean) sum = sum / T(n);
                sums.add(sum, out.p + d[0] + r * out.row);
            });
        sums.finish();
    }

    // Along a dimension whose values are not one after the other: those of n[2] are.
    void reduce_across(const Instruction &in, long rows) const {
        const At out = at(in.x[0]), x = at(in.x[1]);
        const long n = in.n[3], along = in.x[1].strides[3];
        const Op op = (Op)in.op;
        for (long r = 0; r < rows; ++r)
            nest<2, 2>(in, [&](const long *d) {
                T *to = out.p + d[0] + r * out.row;
                const T *from = x.p + d[1] + r * x.row;
                for (long j = 0; j < in.n[2]; j += L) {
                    const int count = (int)(in.n[2] - j < L ? in.n[2] - j : L);
                    Vec<T> found = load(from + j, count);
                    long i = 1;
                    if (op == Op::sum || op == Op::mean) { // several at once: each waits for the one before
                        Vec<T> part[3] = {};
                        for (; i + 4 <= n; i += 4) {
                            found += load(from + i * along + j, count);
#pragma GCC unroll 3
                            for (int k = 0; k < 3; ++k) part[k] += load(from + (i + k + 1) * along + j, count);
                        }
                        found = (found + part[0]) + (part[1] + part[2]);
                    }
                    for (; i < n; ++i) {
                        const Vec<T> next = load(from + i * along + j, count);
                        found = op == Op::most    ? Maximum::of<T>(found, next)
                                : op == Op::least ? Minimum::of<T>(found, next)
                                                  : found + next;
                    }
                    store(to + j, op == Op::mean ? found / T(n) : found, count);
                }
            });
    }

    template <class F> void by_index(const Instruction &in, long rows, F f) const {
        const At out = at(in.x[0]), x = at(in.x[1]), index = at(in.x[2]);
        for (long r = 0; r < rows; ++r) f(in, out.p + r * out.row, x.p + r * x.row, index.p + r * index.row);
    }

    template <class F> void by_line(const Instruction &in, long rows, F f) const {
        const At out = at(in.x[0]), x = at(in.x[1]);
        for (long r = 0; r < rows; ++r) f(in, out.p + r * out.row, x.p + r * x.row);
    }

    // The rows at hand are added up as they are, and then to doubles: there are many of them in a walk.
    void add_rows(const Instruction &in, long rows) const {
        double *sums = static_cast<double *>(base[in.x[0].place]) + in.x[0].offset;
        constexpr long most = 8;
        const At x = at(in.x[1]);
        const long to = in.x[0].strides[3], from = in.x[1].strides[3], n = in.n[3];
        nest<2, 3>(in, [&](const long *d) {
            double *out = sums + d[0];
            long i = 0;
            if (to == 1 && from == 1)
                for (; i + L <= n; i += L) {
                    for (long r = 0; r < rows;) {
                        const long end = rows - r < most ? rows : r + most;
                        Vec<T> sum = load(x.p + d[1] + r * x.row + i);
                        while (++r < end) sum += load(x.p + d[1] + r * x.row + i);
                        *reinterpret_cast<Wide<T> *>(out + i) += __builtin_convertvector(sum, Wide<T>);
                    }
                }
            for (long r = 0; i < n && r < rows; ++r)
                for (long j = i; j < n; ++j) out[j * to] += (double)x.p[d[1] + r * x.row + j * from];
        });
    }

    static constexpr long outer_rows = 128;

    // Whether the sums of an instruction are those of one turn, of so many rows in all.
    static bool sets_sums(const Instruction &in, long rows) {
        return in.op == (long)Op::add_outer && in.n[1] == 1 && rows <= outer_rows;
    }

    // The products of so many rows are added up as they are, and then to doubles. Where the sums have a distance
    // between rows, they are values of the caller's, and set.
    void add_outer(const Instruction &in, long rows) const {
        if (stride[in.x[0].place])
            outers<true>(in, rows, static_cast<T *>(base[in.x[0].place]) + in.x[0].offset);
        else
            outers<false>(in, rows, static_cast<double *>(base[in.x[0].place]) + in.x[0].offset);
    }

    template <bool sets, class To> void outers(const Instruction &in, long rows, To *sums) const {
        constexpr long most = outer_rows;
        const At x = at(in.x[1]), y = at(in.x[2]);
        const long I = in.n[2], J = in.n[3], down = in.x[0].strides[2], along = in.x[1].strides[2];
        for (long r = 0; r < rows; r += most)
            for (long k = 0; k < in.n[1]; ++k)
                for (long j = 0; j < J; j += 2 * L) {
                    const long count = rows - r < most ? rows - r : most;
                    const int last = (int)(J - j <= L ? J - j : J - j < 2 * L ? J - j - L : L);
                    const T *q = y.p + r * y.row + k * in.x[2].strides[1] + j;
                    for (long i = 0; i < I;) {
                        const int M = I - i >= 8 ? 8 : 1;
                        const auto outer = M == 8 ? (J - j > L ? outer_of<T, 8, 2, sets> : outer_of<T, 8, 1, sets>)
                                                  : (J - j > L ? outer_of<T, 1, 2, sets> : outer_of<T, 1, 1, sets>);
                        const T *p = x.p + r * x.row + k * in.x[1].strides[1] + i * along;
                        outer(sums + i * down + j, down, p, x.row, along, q, y.row, count, last);
                        i += M;
                    }
                }
    }
};

} // namespace bptt::BPTT_VARIANT
