// The variants this build has, the widest first.
#pragma once

#include "program.hpp"
#include "walks.hpp"

namespace bptt {

#define BPTT_DECLARE(name)                                                                                             \
    namespace name {                                                                                                   \
    extern const Variant variant;                                                                                      \
    extern const Interpreter interpreter;                                                                              \
    }
#ifdef BPTT_X86
BPTT_DECLARE(avx512)
BPTT_DECLARE(avx2)
#endif
BPTT_DECLARE(portable)
#undef BPTT_DECLARE

} // namespace bptt
