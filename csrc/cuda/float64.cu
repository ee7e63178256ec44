#include "cuda/instances.cuh"

namespace gut_fast::cuda {

const Instances kFloat64Instances = instances<Plain<double>>();

}  // namespace gut_fast::cuda
