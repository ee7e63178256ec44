#if defined(__x86_64__)
#include "cpu/loops.h"

namespace gut_fast::cpu {

extern const TierEntry kX86V4;
const TierEntry kX86V4 = tier_entry<X86V4>();

}  // namespace gut_fast::cpu
#endif
