// BRANCH: evaluates a captured body, or nothing, by one bool that is read on the host.
#include "branch.h"

#include <cstdlib>

#include "mlx/backend/cpu/encoder.h"

namespace teacache {

namespace {

struct Spec {
  const mx::Shape& shape;
  mx::Dtype dtype;
};
std::ostream& operator<<(std::ostream& os, const Spec& spec) {
  return os << spec.dtype << " " << spec.shape;
}

bool is_state(const mx::array& a) {
  return a.dtype() == mx::float32 && a.shape() == mx::Shape{8};
}

bool is_decision(const mx::array& a) {
  if (!a.has_primitive()) {
    return false;
  }
  auto& primitive = a.primitive();
  return typeid(primitive) == typeid(Decide);
}

// `own` of branch.h for work on that stream; without one, for what the calling thread does by default.
mx::Stream own_stream(std::optional<mx::Stream> work) {
  if (gpu() == Gpu::cuda) {
    return work ? *work : mx::default_stream(mx::default_device());
  }
  return mx::default_stream(mx::Device::cpu);
}

Arrays relay(const Arrays& arrays, mx::Stream to) {
  std::vector<mx::Shape> shapes;
  std::vector<mx::Dtype> dtypes;
  for (auto& a : arrays) {
    shapes.push_back(a.shape());
    dtypes.push_back(a.dtype());
  }
  return mx::array::make_arrays(std::move(shapes), dtypes, std::make_shared<Relay>(to), arrays);
}

// The same memory, evaluated, without the array's event and history.
mx::array view_of(const mx::array& a) {
  mx::array view(a.shape(), a.dtype(), nullptr, {});
  view.copy_shared_buffer(a);
  view.set_status(mx::array::Status::evaluated);
  return view;
}

// A decision that has been read.
void store(mx::array& out, bool skip) {
  out.set_data(mx::allocator::malloc(sizeof(bool)));
  out.data<bool>()[0] = skip;
  branch_counters().reads++;
}

}  // namespace

BranchCounters& branch_counters() {
  static BranchCounters counters;
  return counters;
}

void check_inputs(const CapturedGraph& body, const Arrays& inputs) {
  const auto& in_shapes = body.input_shapes();
  const auto& in_dtypes = body.input_dtypes();
  if (inputs.size() != in_shapes.size()) {
    reject("[branch] inputs must be the ", in_shapes.size(), " that the body was traced with, got ", inputs.size());
  }
  for (size_t i = 0; i < inputs.size(); i++) {
    if (inputs[i].shape() != in_shapes[i] || inputs[i].dtype() != in_dtypes[i]) {
      reject(
          "[branch] inputs[", i, "] must be as the body was traced, ", Spec{in_shapes[i], in_dtypes[i]}, ", got ",
          Spec{inputs[i].shape(), inputs[i].dtype()});
    }
  }
}

Arrays branch(
    const mx::array& skip, const Arrays& on_skip, std::shared_ptr<const CapturedGraph> body, const Arrays& inputs) {
  const auto& shapes = body->output_shapes();
  const auto& dtypes = body->output_dtypes();
  if (on_skip.size() != shapes.size()) {
    reject(
        "[branch] on_skip must have one array for each of the body's ", shapes.size(), " outputs, got ",
        on_skip.size());
  }
  for (size_t i = 0; i < shapes.size(); i++) {
    if (on_skip[i].shape() != shapes[i] || on_skip[i].dtype() != dtypes[i]) {
      reject(
          "[branch] on_skip[", i, "] must be what the body returns, ", Spec{shapes[i], dtypes[i]}, ", got ",
          Spec{on_skip[i].shape(), on_skip[i].dtype()});
    }
  }

  check_inputs(*body, inputs);
  const auto work = body->output_stream().value_or(own_stream(std::nullopt));
  const auto own = own_stream(work);
  if (work.device == mx::Device::gpu) {
    require_gpu("branch");
    if (const char* set = std::getenv("MLX_METAL_FAST_SYNCH"); gpu() == Gpu::metal && set && std::atoi(set) != 0) {
      throw std::runtime_error(
          "[branch] MLX_METAL_FAST_SYNCH does not order a branch before its readers on other streams: unset it");
    }
  }
  Arrays all{is_decision(skip) ? skip : decide(skip)};
  all.insert(all.end(), on_skip.begin(), on_skip.end());
  all.insert(all.end(), inputs.begin(), inputs.end());
  auto outputs = mx::array::make_arrays(
      std::vector<mx::Shape>(shapes), dtypes, std::make_shared<Branch>(own, std::move(body)), all);
  // One relay for all of them: it also keeps those that nobody reads until the body has written them.
  return work == own ? outputs : relay(outputs, work);
}

// ---- The decision

mx::array decide(const mx::array& skip) {
  if (!is_state(skip) && !(skip.dtype() == mx::bool_ && skip.ndim() == 0)) {
    reject(
        "[branch] skip must be a bool scalar or a gate's state (float32 of shape (8)), got ",
        Spec{skip.shape(), skip.dtype()});
  }
  const auto own = own_stream(skip.has_primitive() ? std::optional(skip.primitive().stream()) : std::nullopt);
  return mx::array(mx::Shape{}, mx::bool_, std::make_shared<Decide>(own), {skip});
}

void Decide::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  // A GPU runs what has been committed to it, and MLX commits at the end of an evaluation.
  commit_gpu_streams();
  mx::synchronize(stream());  // which has been told to wait for the input, wherever that comes from
  const auto& skip = inputs[0];
  store(outputs[0], is_state(skip) ? skip.data<float>()[0] > 0.0f : skip.data<bool>()[0]);  // NaN computes
}

// CUDA. The host reads a bool of its own at once; the array that a state or a view is a part of, MLX would move to
// managed memory.
void Decide::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  const auto& skip = inputs[0];
  mx::array first(mx::Shape{}, skip.dtype(), nullptr, {});
  first.copy_shared_buffer(skip, {}, {.contiguous = true, .row_contiguous = true, .col_contiguous = true}, 1);
  first.set_status(mx::array::Status::evaluated);
  auto flag = mx::greater(first, mx::array(0, skip.dtype()), stream());  // NaN computes
  mx::async_eval({flag});
  mx::synchronize(stream());  // for what the stream has been given, which an evaluation launches at its end
  store(outputs[0], flag.data<bool>()[0]);
}

std::vector<mx::Shape> Decide::output_shapes(const Arrays&) {
  return {mx::Shape{}};
}

// ---- Between streams

void Relay::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  for (size_t i = 0; i < outputs.size(); i++) {
    outputs[i].copy_shared_buffer(inputs[i]);
  }
}

void Relay::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  eval_cpu(inputs, outputs);
}

std::vector<mx::Shape> Relay::output_shapes(const Arrays& inputs) {
  std::vector<mx::Shape> shapes;
  for (auto& in : inputs) {
    shapes.push_back(in.shape());
  }
  return shapes;
}

// ---- The conditional

void Branch::eval_cpu(const Arrays& inputs, Arrays& outputs) {
  if (!inputs[0].data_shared_ptr()) {  // see `nothing` below
    reject_second_try();
  }
  const bool skip = inputs[0].data<bool>()[0];  // written on this thread by Decide
  const size_t n_outputs = outputs.size();
  if (skip) {
    branch_counters().reused++;
    for (size_t i = 0; i < n_outputs; i++) {
      outputs[i].copy_shared_buffer(inputs[1 + i]);
    }
    return;
  }
  branch_counters().computed++;
  // Before anything here waits or fails: MLX limits the work in flight by waiting for some of it, and after an error it
  // waits for this stream, which may be waiting for a GPU.
  commit_gpu_streams();

  // The body gets views of its inputs without the events of an enclosing async_eval: those are signalled only when that
  // evaluation ends, so a body on another stream would wait for itself. Instead its inputs come by way of this stream,
  // which has been told to wait for them.
  const auto work = body_->output_stream().value_or(stream());
  const bool all_here = body_->runs_on(stream());
  Arrays body_inputs;
  for (size_t i = 1 + n_outputs; i < inputs.size(); i++) {
    body_inputs.push_back(all_here ? view_of(inputs[i]) : relay({view_of(inputs[i])}, stream())[0]);
  }

  // While the body runs, which is most of a step, nothing here may keep activations alive that only a skip needs, or
  // that the body is done with. The stream holds what it does not hand over until it gets here: what writes those
  // buffers may still be queued.
  Arrays until_here{view_of(inputs[0])};
  for (size_t i = 1; i < inputs.size(); i++) {
    if (i <= n_outputs || !body_->reads_input(int(i - 1 - n_outputs))) {
      until_here.push_back(view_of(inputs[i]));
    }
  }
  if (stream().device == mx::Device::cpu) {
    mx::cpu::get_command_encoder(stream()).dispatch([until_here = std::move(until_here)] {});
  } else {
    // MLX keeps the siblings of what is evaluated, here the decision.
    mx::async_eval({relay(until_here, stream())[0]});
    until_here.clear();
  }
  mx::array nothing(mx::Shape{}, mx::bool_, nullptr, {});
  nothing.set_status(mx::array::Status::available);
  for (auto& out : outputs) {
    if (!out.is_tracer()) {
      for (auto& in : out.inputs()) {  // `inputs` is one of these
        in.overwrite_descriptor(nothing);
      }
    }
  }

  Arrays results = (*body_)(body_inputs);
  body_inputs.clear();
  for (auto& r : results) {
    if (r.has_primitive() && r.primitive().stream() != work) {
      r = mx::contiguous(r, false, work);
    }
  }
  mx::async_eval(results);
  for (size_t i = 0; i < n_outputs; i++) {
    outputs[i].copy_shared_buffer(results[i]);
  }
}

void Branch::eval_gpu(const Arrays& inputs, Arrays& outputs) {
  eval_cpu(inputs, outputs);
}

bool Branch::is_equivalent(const mx::Primitive& other) const {
  return body_ == static_cast<const Branch&>(other).body_;
}

// Called by shapeless compilation: the body's graph holds for the traced shapes only.
std::vector<mx::Shape> Branch::output_shapes(const Arrays& inputs) {
  const auto& traced = body_->input_shapes();
  const size_t n_outputs = body_->output_shapes().size();
  for (size_t i = 0; i < traced.size(); i++) {
    const auto& got = inputs[1 + n_outputs + i].shape();
    if (got != traced[i]) {
      reject(
          "[branch] the body was traced with inputs[", i, "] of shape ", traced[i], " and cannot take ", got,
          ": compile without shapeless=True");
    }
  }
  return body_->output_shapes();
}

}  // namespace teacache
