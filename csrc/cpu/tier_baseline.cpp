#include "cpu/loop.h"

namespace gut_fast::cpu {

extern const Tier kBaseline;
const Tier kBaseline = make_tier<Baseline>();

}  // namespace gut_fast::cpu
