#include "cuda/instances.cuh"

namespace gut_fast::cuda {

const Instances kMixedInstances = instances<Mixed>();

}  // namespace gut_fast::cuda
