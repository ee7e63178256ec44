#include "cpu/loops.h"

namespace gut_fast::cpu {

Loops narrow_loops(const Instance& instance, int storage) {
  for (const Instance& narrow : instances<Narrow, Baseline>) {
    if (narrow.num_states == instance.num_states && narrow.num_messages == instance.num_messages &&
        narrow.zero_bits == instance.zero_bits && narrow.one_bits == instance.one_bits) {
      return narrow.loops[storage];
    }
  }
  return {};
}

}  // namespace gut_fast::cpu
