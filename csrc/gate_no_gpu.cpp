// GATE where the build has no GPU code.
#include "gate.h"

namespace teacache {

bool gpu_supported() {
  return false;
}

void commit_gpu_streams() {}

void Gate::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  require_gpu(op_name());
}

}  // namespace teacache
