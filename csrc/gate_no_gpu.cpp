// The ops where the build has no GPU code.
#include "gate.h"

namespace teacache {

void reject_gpu(const char* op_name) {
  throw std::runtime_error(
      std::string("[") + op_name +
      "] this build has no GPU code: run on the CPU with mx.set_default_device(mx.cpu) or stream=mx.cpu");
}

void Gate::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  reject_gpu(op_name());
}

}  // namespace teacache
