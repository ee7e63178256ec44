#if defined(__x86_64__)
#include "cpu/loop.h"

namespace gut_fast::cpu {

extern const Tier kX86V3;
const Tier kX86V3 = make_tier<X86V3>();

}  // namespace gut_fast::cpu
#endif
