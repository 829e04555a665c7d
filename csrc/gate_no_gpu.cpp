// GATE where the build has no GPU kernel.
#include "gate.h"

namespace teacache {

void require_gpu_gate() {
  throw std::runtime_error(
      "[gate] this build has no GPU kernel: run on the CPU with mx.set_default_device(mx.cpu) or stream=mx.cpu");
}

void Gate::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  require_gpu_gate();
}

}  // namespace teacache
