#if defined(__x86_64__)
#include "cpu/loop.h"

namespace gut_fast::cpu {

extern const Tier kX86V4;
const Tier kX86V4 = make_tier<X86V4>();

}  // namespace gut_fast::cpu
#endif
