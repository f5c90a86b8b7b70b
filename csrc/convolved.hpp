// Images of each row convolved with a kernel that all rows share, plane by plane.
//
// The planes of an image that is padded already, [C, lines, line], are read as one long line each: what a kernel finds
// at a place lies at the same distance from it everywhere, so that a register holds places one after the other, with
// some between the lines that nobody asks for. Legend: O planes of a result [OH, OW], a kernel [O, C, h, v].
#pragma once

#include "matrices.hpp"
#include "program.hpp"
#include "simd.hpp"

namespace bptt::BPTT_VARIANT {

BPTT_INLINE long least_of(long a, long b) { return a < b ? a : b; }

// The sizes of a convolution, see `Op::convolve`.
struct Convolved {
    long O, C, OH, OW, h, v, down, right; // down, right: the distances between what a kernel finds

    explicit Convolved(const Instruction &in)
        : O(in.n[0]), C(in.n[1]), OH(in.n[2]), OW(in.n[3]), h(in.modes & 0xffff), v(in.modes >> 16 & 0xffff),
          down(in.modes >> 32 & 0xffff), right(in.modes >> 48 & 0x7fff) {}

    // Places from the first to the last one that is asked for, if lines lie so far apart.
    long places(long line) const { return (OH - 1) * line + OW; }
};

// M planes at so many places, of which the first is f, from where they lie one after the other, without those between
// the lines.
template <class T, int M>
void put_places(const Convolved &s, const T *flat, long count, long line, long f, T *out, long plane, long out_line) {
    constexpr int L = lanes<T>;
    const long end = least_of(f + count, s.places(line));
    for (int m = 0; m < M; ++m, out += plane, flat += count)
        for (long y = f / line; y * line < end; ++y) {
            const long from = y * line > f ? y * line : f, to = least_of(y * line + s.OW, end);
            T *place = out + y * out_line + (from - y * line);
            for (long i = from; i < to; i += L, place += L)
                store(place, load(flat + (i - f), (int)least_of(to - i, L)), (int)least_of(to - i, L));
        }
}

// M planes of the result, from plane o on, at V registers of places from f on.
template <class T, int M, int V>
void convolve_places(const Instruction &in, const Convolved &s, long o, long f, T *out, const T *x, const T *w,
                     const T *bias) {
    constexpr int L = lanes<T>;
    const auto &sx = in.x[1].strides, &sw = in.x[2].strides;
    Vec<T> sums[M][V];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int k = 0; k < V; ++k) sums[m][k] = broadcast(bias ? bias[(o + m) * in.x[3].strides[1]] : T(0));
    w += o * sw[0], x += f;
    for (long c = 0; c < s.C; ++c)
        for (long i = 0; i < s.h; ++i) {
            const T *from = x + c * sx[1] + i * s.down * sx[2], *of = w + c * sw[1] + i * sw[2];
            for (long j = 0; j < s.v; ++j, from += s.right, of += sw[3]) {
                Vec<T> found[V];
#pragma GCC unroll 4
                for (int k = 0; k < V; ++k) found[k] = load(from + k * L);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    const Vec<T> factor = broadcast(of[m * sw[0]]);
#pragma GCC unroll 4
                    for (int k = 0; k < V; ++k) sums[m][k] += factor * found[k];
                }
            }
        }
    alignas(BPTT_BYTES) T flat[M * V * L];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int k = 0; k < V; ++k) store(flat + (m * V + k) * L, sums[m][k]);
    const auto &so = in.x[0].strides;
    put_places<T, M>(s, flat, V * L, sx[2], f, out + o * so[1], so[1], so[2]);
}

// The convolution of one row. Up to a register too many is read of its padded image.
template <class T> void convolve_row(const Instruction &in, T *out, const T *x, const T *w, const T *bias) {
    constexpr int L = lanes<T>, most = BPTT_BYTES == 64 ? 4 : 2;
    const Convolved s(in);
    const long places = s.places(in.x[1].strides[2]);
    for (long f = 0; f < places;) {
        const long left = (places - f + L - 1) / L;
        const auto planes = [&]<int V>() {
            long o = 0;
            for (; o + 4 <= s.O; o += 4) convolve_places<T, 4, V>(in, s, o, f, out, x, w, bias);
            for (; o < s.O; ++o) convolve_places<T, 1, V>(in, s, o, f, out, x, w, bias);
            return V;
        };
        f += L * (left >= most ? planes.template operator()<most>()
                  : left > 1   ? planes.template operator()<2>()
                               : planes.template operator()<1>());
    }
}

// Adds up the lanes of `count` registers, and these sums to doubles: register m * J + j to sums[m * down + j * across].
template <class T, int count> void add_lanes(const T *all, int J, double *sums, long down, long across) {
    constexpr int L = lanes<T>;
    for (int first = 0; first < count; first += L) {
        Vec<T> some[L];
#pragma GCC unroll 16
        for (int k = 0; k < L; ++k) some[k] = first + k < count ? load(all + (first + k) * L) : Vec<T>{};
        T each[L];
        store(each, sums_of<T>(some));
        for (int k = first; k < first + L && k < count; ++k)
            sums[k / J * down + k % J * across] += (double)each[k - first];
    }
}

// Of the products of M planes of errors with what J places of a line of the kernel find in a plane, the sums over all
// rows and places, added to the doubles of that line.
template <class T, int M, int J>
void correlate_line(const Instruction &in, const Convolved &s, long rows, const T *errors, long error_row, const T *x,
                    long x_row, double *sums) {
    constexpr int L = lanes<T>;
    const long plane = in.x[1].strides[1], line = in.x[2].strides[2], error_line = in.x[1].strides[2];
    Vec<T> all[M][J] = {};
    for (long r = 0; r < rows; ++r, errors += error_row, x += x_row)
        for (long y = 0; y < s.OH; ++y)
            for (long p = 0; p < s.OW; p += L) {
                const int count = (int)least_of(s.OW - p, L);
                const T *of = errors + y * error_line + p, *from = x + y * line + p;
                Vec<T> found[J];
#pragma GCC unroll 4
                for (int j = 0; j < J; ++j) found[j] = load(from + j * s.right, count);
#pragma GCC unroll 4
                for (int m = 0; m < M; ++m) {
                    const Vec<T> error = load(of + m * plane, count);
#pragma GCC unroll 4
                    for (int j = 0; j < J; ++j) all[m][j] += error * found[j];
                }
            }
    alignas(BPTT_BYTES) T flat[M * J * L];
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int j = 0; j < J; ++j) store(flat + (m * J + j) * L, all[m][j]);
    add_lanes<T, M * J>(flat, J, sums, in.x[0].strides[0], in.x[0].strides[3]);
}

// The gradient of a kernel, summed over all rows.
template <class T>
void correlate_rows(const Instruction &in, long rows, double *sums, const T *errors, long error_row, const T *x,
                    long x_row) {
    const Convolved s(in);
    const auto &to = in.x[0].strides;
    for (long c = 0; c < s.C; ++c)
        for (long i = 0; i < s.h; ++i)
            for (long j = 0; j < s.v;) {
                const T *from = x + c * in.x[2].strides[1] + i * s.down * in.x[2].strides[2] + j * s.right;
                double *line = sums + c * to[1] + i * to[2] + j * to[3];
                const auto planes = [&]<int J>() {
                    const T *of = errors;
                    const long plane = in.x[1].strides[1];
                    long o = 0;
                    for (; o + 4 <= s.O; o += 4)
                        correlate_line<T, 4, J>(in, s, rows, of + o * plane, error_row, from, x_row, line + o * to[0]);
                    for (; o < s.O; ++o)
                        correlate_line<T, 1, J>(in, s, rows, of + o * plane, error_row, from, x_row, line + o * to[0]);
                    return J;
                };
                j += s.v - j >= 3   ? planes.template operator()<3>()
                     : s.v - j == 2 ? planes.template operator()<2>()
                                    : planes.template operator()<1>();
            }
}

} // namespace bptt::BPTT_VARIANT
