// A program for calls of the same sizes: all that is the same in them is kept. What a call adds is where its memories
// begin. Who makes one (kernels/bound.py) has computed every distance from the sizes, and checks the memories.
#pragma once

#include "program.hpp"

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace bptt {

template <class Real> class Bound {
  public:
    using Address = std::uintptr_t;
    using Numbers = std::vector<std::int64_t>;

    // addresses: of every place, as in Program: outside, arriving, leaving. parts: (number of an address, number of a
    // memory, distance in it in bytes) of those that a call sets; an address in a memory that is not given is 0. moves:
    // (memory, distance, memory, distance, bytes), to and from, of which `before` are made before the walk.
    Bound(const Program<Real> &program, Numbers addresses, Numbers parts, Numbers moves, long before)
        : program(program), addresses(std::move(addresses)), parts(std::move(parts)), moves(std::move(moves)),
          before(before) {}

    // function: runs the program of one call. memories: where they begin, or 0.
    template <class Function> void run(const std::vector<Address> &memories, Function function) const {
        const std::size_t places = addresses.size(), copies = moves.size() / 5;
        std::vector<Address> own(addresses.begin(), addresses.end());
        std::vector<Move> made(copies);
        for (std::size_t i = 0; i < parts.size(); i += 3) {
            const Address memory = memories.at(parts[i + 1]);
            own[parts[i]] = memory ? memory + parts[i + 2] : 0;
        }
        for (std::size_t i = 0; i < copies; ++i) {
            const std::int64_t *move = &moves[5 * i];
            made[i] = {memories.at(move[0]) + move[1], memories.at(move[2]) + move[3], move[4]};
        }
        Program<Real> call = program;
        call.outside = own.data();
        call.arriving = own.data() + places / 3;
        call.leaving = own.data() + 2 * places / 3;
        call.moves = made.data();
        call.before = before;
        call.after = (long)copies - before;
        function(call);
    }

  private:
    Program<Real> program;
    Numbers addresses, parts, moves;
    long before;
};

} // namespace bptt
