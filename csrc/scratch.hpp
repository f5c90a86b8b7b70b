// Scratch memory of a call, handed out piece by piece; the pieces' sizes are counted the same way beforehand.
#pragma once

#include "simd.hpp"

namespace bptt::BPTT_VARIANT {

class Scratch {
  public:
    explicit Scratch(void *memory) : start(static_cast<char *>(memory)) {}

    // `count` values, on a cache line of their own; null while sizes are only counted.
    template <class V> V *take(long count) {
        char *p = start ? start + used : nullptr;
        used += (count * (long)sizeof(V) + 63) / 64 * 64;
        return reinterpret_cast<V *>(p);
    }

    long bytes() const { return used; }

  private:
    char *start;
    long used = 0;
};

} // namespace bptt::BPTT_VARIANT
