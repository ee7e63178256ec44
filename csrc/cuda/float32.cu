#include "cuda/instances.cuh"

namespace gut_fast::cuda {

const Instances kFloat32Instances = instances<Plain<float>>();

}  // namespace gut_fast::cuda
