// The interpreter: a program, row tile by row tile, each through all of its steps. Legend and arguments: program.hpp.
//
// Places by row have an address and a distance between rows, which are set anew for every step: where the rows of a
// tile lie at equal distances in a caller's tensor, as they mostly do, they are read and written there; else they are
// gathered in a buffer of the tile first, and scattered from it last. Whatever lies in rows one after the other is gone
// through as one row.
#pragma once

#include "machine.hpp"
#include "scratch.hpp"

#include <cstring>

namespace bptt::BPTT_VARIANT {

constexpr long tile_rows = 32; // of a tile at most

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
    long *moving = nullptr;                 // [places] this worker's: those that lie elsewhere at each step
    void **shared = nullptr;                // [places] what is computed once, of all workers
    double **sums = nullptr;                // [places, workers]
    long bytes;

    ProgramMemory(const Program<T> &a, void *memory, int id, int workers) {
        Scratch scratch(memory);
        const long all = a.back ? a.N : a.B, own = (all + workers - 1) / workers;
        const long tiles = (own + tile_rows - 1) / tile_rows;
        rows = tiles ? (own + tiles - 1) / tiles : 1;
        if (!a.row_values) rows = own;                   // nothing of a tile has to stay near
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
            long *own_moving = scratch.take<long>(a.places);
            if (i == id) tile = own_tile, base = own_base, stride = own_stride, columns = own_columns, at = own_at;
            if (i == id) moving = own_moving;
        }
        bytes = scratch.bytes();
    }
};

template <class T> struct Walk {
    const Program<T> &a;
    const Worker &worker;
    ProgramMemory<T> s;
    Machine<T> machine;
    long moving = 0, handed = 0; // places that lie elsewhere at each step; after them, adjoints and what is sent back

    Walk(const Program<T> &a, void *memory, const Worker &worker)
        : a(a), worker(worker), s(a, memory, worker.id, worker.count), machine{a, s.base, s.stride, s.rows} {}

    T *outside(long p) const { return reinterpret_cast<T *>(a.outside[p]); }
    T *buffer(long at) const { return s.tile + at * s.rows; }

    // Of sums that one worker makes in one turn, so that they need no doubles: the distance is not 0.
    void set_directly() {
        if (worker.count > 1 || a.back || a.T > 1 || a.B > s.rows) return;
        for (long i = a.once; i < a.count; ++i)
            if (Machine<T>::sets_sums(a.code[i], a.B)) {
                const long p = a.code[i].x[0].place;
                s.base[p] = outside(p), s.stride[p] = a.place[p].width;
            }
    }

    // What is computed once, by the first worker; the places that do not move from step to step.
    void begin() {
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
        set_directly();
        const auto gather = [&](auto wanted) {
            for (long p = 0; p < a.places; ++p)
                if (wanted(a.place[p].kind)) s.moving[moving + handed++] = p;
        };
        gather([](Kind k) {
            return k == Kind::input || k == Kind::output || k == Kind::owned || k == Kind::next || k == Kind::carry;
        });
        moving = handed, handed = 0;
        gather([](Kind k) { return k == Kind::adjoint || k == Kind::back; });
        for (long p = 0; p < a.places; ++p)
            if (a.place[p].kind == Kind::sum && !s.stride[p])
                std::memset(s.base[p], 0, a.place[p].width * sizeof(double));
        if (worker.id == 0) {
            machine.run(0, a.once, 1);
            worker.wait();
        }
    }

    void forward() {
        const long b0 = a.B * worker.id / worker.count, b1 = a.B * (worker.id + 1) / worker.count;
        for (long first = b0; first < b1; first += s.rows) {
            const long rows = b1 - first < s.rows ? b1 - first : s.rows;
            for (long p = 0; p < a.places; ++p)
                if (a.place[p].kind == Kind::lane) s.base[p] = outside(p) + first * a.place[p].width;
            for (long t = 0; t < a.T; ++t) {
                const long row = t * a.B + first;
                bool resets = false;
                if (a.resets)
                    for (long r = 0; r < rows; ++r) resets |= a.resets[row + r] != 0;
                for (long i = 0; i < moving; ++i) {
                    const long p = s.moving[i];
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
        add_up();
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
        add_up();
    }

    // The sums of all workers.
    void add_up() {
        bool sums = false;
        for (long p = 0; p < a.places; ++p) sums |= a.place[p].kind == Kind::sum;
        if (!sums) return;
        worker.wait();
        if (worker.id != 0) return;
        for (long p = 0; p < a.places; ++p)
            if (a.place[p].kind == Kind::sum && !s.stride[p]) {
                const long n = a.place[p].width;
                long i = 0;
                for (; i + lanes<T> <= n; i += lanes<T>) {
                    Wide<T> sum{};
                    for (int w = 0; w < worker.count; ++w)
                        sum += *reinterpret_cast<const Wide<T> *>(s.sums[p * worker.count + w] + i);
                    store(outside(p) + i, __builtin_convertvector(sum, Vec<T>));
                }
                for (; i < n; ++i) {
                    double sum = 0;
                    for (int w = 0; w < worker.count; ++w) sum += s.sums[p * worker.count + w][i];
                    outside(p)[i] = T(sum);
                }
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
            if (place.kind == Kind::lane) place_lanes(p, columns, size);
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

    // What is the same at every step lies where the caller has it, or is gathered once.
    void place_lanes(long p, const long *columns, long size) {
        const long width = a.place[p].width, distance = size > 1 ? lane(columns[1]) - lane(columns[0]) : 1;
        long regular = 1;
        while (regular < size && lane(columns[regular]) - lane(columns[regular - 1]) == distance) ++regular;
        const T *from = outside(p);
        if (regular == size) {
            s.base[p] = const_cast<T *>(from) + lane(columns[0]) * width, s.stride[p] = distance * width;
            return;
        }
        T *to = buffer(a.place[p].at);
        s.base[p] = to, s.stride[p] = width;
        for (long r = 0; r < size; ++r) copy_row(to + r * width, from + lane(columns[r]) * width, width);
    }

    // Where the rows of the j-th step of the walk lie.
    void place(const long *columns, long rows, long j, bool regular, long distance, long least_own, long most_own) {
        for (long i = 0; i < moving; ++i) {
            const long p = s.moving[i];
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
        for (long i = 0; i < moving; ++i) {
            const long p = s.moving[i], width = a.place[p].width;
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
        for (long i = moving; i < moving + handed; ++i) {
            const long p = s.moving[i];
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
        for (long i = moving; i < moving + handed; ++i) {
            const long p = s.moving[i];
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
