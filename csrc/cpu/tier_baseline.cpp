#include "cpu/loops.h"

namespace gut_fast::cpu {

extern const TierEntry kBaseline;
const TierEntry kBaseline = tier_entry<Baseline>();

}  // namespace gut_fast::cpu
