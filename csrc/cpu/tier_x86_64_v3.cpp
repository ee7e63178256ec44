#if defined(__x86_64__)
#include "cpu/loops.h"

namespace gut_fast::cpu {

extern const TierEntry kX86V3;
const TierEntry kX86V3 = tier_entry<X86V3>();

}  // namespace gut_fast::cpu
#endif
